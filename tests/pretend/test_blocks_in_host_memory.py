"""A GPU that holds half of a transformer's weights, and the run of one that holds them all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_runs_on_cuda import expect_clean_steps, expect_ended

from crepatrain.config.plan import read_plan
from crepatrain.families import family_class
from crepatrain.families.random import write_random_pipeline
from crepatrain.memory.account import allocated_bytes
from crepatrain.memory.offload import BlockSizes
from crepatrain.memory.stages import empty_trained
from crepatrain.training.lora import trainable_parameters

LAYERS = 24
NUMBERS = ("loss", "diffusion_loss", "crepa_loss", "crepa_alignment_score", "grad_norm")


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan whose weights outweigh what a step computes."""
    wan = family_class("wan")
    tiny, folder = wan.tiny["tiny"], tmp_path_factory.mktemp("heavy")
    write_random_pipeline(wan, folder, replace(tiny, transformer={**tiny.transformer, "num_layers": LAYERS, "ffn_dim": 1024}))
    return folder


def numbers(run: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [[line[key] for key in NUMBERS] for line in lines]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pytorch_lora_weights.safetensors")


@pytest.mark.slow
def test_half_of_the_weights_is_enough(config_file, on_cuda, heavy, tmp_path):
    models = {"pretrained_model_name_or_path": str(heavy), "crepa_encoder": str(heavy / "encoder")}
    path = config_file(cache_dir=str(tmp_path / "cache"), mixed_precision="bf16", lora_rank=1, lora_targets=["to_q"], **models)
    plan = read_plan(path)
    transformer = empty_trained(plan)["transformer"]
    trained = {id(parameter) for parameter in trainable_parameters(transformer)}
    weights = allocated_bytes([parameter for parameter in transformer.parameters() if id(parameter) not in trained])
    sizes = BlockSizes.of(plan)

    def run(name: str, *options: Any, **limits: Any) -> dict[str, Any]:
        return {"arguments": ["fit", str(path), "--output_dir", str(tmp_path / name), *map(str, options)], **limits}

    resident, without, ringed, continued = on_cuda(
        [
            run("resident", "--max_train_steps", 4),
            run("without", limit=weights // 2),
            run("ringed", "--block_offload", LAYERS, limit=weights // 2),
            run("ringed", "--block_offload", LAYERS - 10, "--max_train_steps", 4),
        ]
    )
    expect_ended(resident)
    expect_ended(without, 2)
    assert "out of GPU memory while the model was loaded" in without["said"]
    assert "set memory to auto" in without["said"]
    expect_ended(ringed)
    expect_ended(continued)
    buffer = max(sizes.laid_out)  # the one that is filled ahead: the other is the weights of a block
    expect_clean_steps(ringed, range(3), apart=buffer)
    expect_clean_steps(continued, range(3, 4), apart=buffer)
    assert ringed["peak"] <= weights // 2
    for step in ringed["steps"]:
        copied = sum(count for what, count in step["launch"]["copy"].items() if "placement/queues.py" in what)
        assert copied >= 2 * (LAYERS - 2), "forward and backward"
    saved = resident["steps"][1]["held"] - ringed["steps"][1]["live"]
    assert saved == sizes.saved(LAYERS)
    assert numbers(tmp_path / "ringed") == numbers(tmp_path / "resident")
    found, expected = adapter(tmp_path / "ringed"), adapter(tmp_path / "resident")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
