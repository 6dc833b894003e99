"""A run that keeps the inputs of its blocks in host memory holds less on a GPU, to the byte, and is the same run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_blocks_in_host_memory import adapter, numbers
from test_runs_on_cuda import expect_clean_steps, expect_ended

from crepatrain.config.plan import read_plan
from crepatrain.data.buckets import Bucket
from crepatrain.families import family_class
from crepatrain.families.random import write_random_pipeline
from crepatrain.memory.stages import training_stage

LAYERS = 16
SAVING = ("--checkpoint_offload", "true")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan with many blocks."""
    wan = family_class("wan")
    tiny, folder = wan.tiny["tiny"], tmp_path_factory.mktemp("deep")
    write_random_pipeline(wan, folder, replace(tiny, transformer={**tiny.transformer, "num_layers": LAYERS}))
    return folder


@pytest.mark.slow
def test_the_device_holds_two_inputs_in_place_of_all(config_file, on_cuda, deep, tmp_path):
    path = config_file(
        cache_dir=str(tmp_path / "cache"),
        pretrained_model_name_or_path=str(deep),
        crepa_encoder=str(deep / "encoder"),
        mixed_precision="bf16",
        vae_dtype="bfloat16",
        gradient_accumulation_steps=2,
        max_train_steps=3,
        height=192,
        width=192,
    )
    plan = read_plan(path)

    def run(name: str, *options: Any) -> dict[str, Any]:
        return {"arguments": ["fit", str(path), "--output_dir", str(tmp_path / name), *map(str, options)]}

    _, plain, offloaded, both, selective, ringed, continued = on_cuda(
        [
            {"arguments": ["cache", str(path)]},
            run("plain"),
            run("offloaded", *SAVING),
            run("both", *SAVING, "--nested_checkpointing", "true"),
            run("selective", *SAVING, "--gradient_checkpointing", "selective"),
            run("ringed", *SAVING, "--nested_checkpointing", "true", "--block_offload", LAYERS, "--max_train_steps", 2),
            run("ringed"),
        ]
    )
    for done in (plain, offloaded, both, selective, ringed, continued):
        expect_ended(done)
    expect_clean_steps(offloaded, range(3))
    expect_clean_steps(both, range(3))
    expect_clean_steps(selective, range(3))
    for done in (plain, offloaded):
        for step in done["steps"]:
            copied = sum(count for what, count in step["launch"]["copy"].items() if "placement/queues.py" in what)
            # To the host and back, in both micro-batches; the last block's stay.
            assert copied == (2 * 2 * (LAYERS - 1) if done is offloaded else 0)
    saving = replace(plan, config=plan.config.changed(checkpoint_offload=True))
    estimated = [training_stage(each, Bucket(*plan.size)).allocated for each in (plan, saving)]
    saved = (LAYERS - 2) * plan.grid.tokens * plan.geometry.width * torch.bfloat16.itemsize
    assert plain["peak"] - offloaded["peak"] == saved == estimated[0] - estimated[1]
    assert both["peak"] < offloaded["peak"]
    for name in ("offloaded", "both", "selective", "ringed"):
        assert numbers(tmp_path / name) == numbers(tmp_path / "plain"), name
        found, expected = adapter(tmp_path / name), adapter(tmp_path / "plain")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name
