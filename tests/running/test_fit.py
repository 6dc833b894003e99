"""Whole runs of the tiny Wan, from clips to an adapter."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from runs import ADAPTER, KEYS, Write, adapter, alive, column, lines, names, run_cli, same_tensors, status, train
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import Dinov2Model, UMT5EncoderModel

from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.running.events import StepLaunched


@pytest.fixture(scope="module")
def finished(wan: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps on all clips at once."""
    root = tmp_path_factory.mktemp("finished")
    config = {
        "model_family": "wan",
        "pretrained_model_name_or_path": str(wan),
        "train_data": str(clips),
        "output_dir": str(root / "run"),
        "output_name": "squares",
        "cache_dir": str(root / "cache"),
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "max_train_steps": 12,
        "checkpointing_steps": 5,
        "mixed_precision": "no",
        "dataloader_num_workers": 0,
        "train_batch_size": 3,
        "lora_rank": 4,
        "learning_rate": 5e-3,
        "crepa_enabled": True,
        "crepa_encoder": str(wan / "encoder"),
        "crepa_encoder_image_size": "grid",
    }
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    fit(read_plan(root / "config.json"), Screen(quiet=True))
    return root / "run"


def test_every_line_has_every_key_and_adds_up(finished: Path):
    assert column(finished, "step") == list(range(1, 13))
    for line in lines(finished):
        assert set(line) == KEYS
        assert line["peak_memory_gib"] is None
        numbers = [value for key, value in line.items() if key not in {"peak_memory_gib", "crepa_cutoff", "sigma_loss"}]
        assert all(math.isfinite(number) for number in numbers)
        assert line["loss"] == pytest.approx(line["diffusion_loss"] + line["crepa_loss"], abs=1e-6)
        assert line["crepa_loss"] == pytest.approx(-line["crepa_weight"] * line["crepa_alignment_score"], abs=1e-6)
        assert line["crepa_weight"] == 0.5
        assert line["crepa_cutoff"] is False
        assert line["learning_rate"] == 5e-3
        assert line["step_seconds"] > 0
        assert line["samples_per_second"] == pytest.approx(3 / line["step_seconds"])
    assert "NaN" not in (finished / "metrics.jsonl").read_text(encoding="utf-8")


def test_the_ema_is_that_of_the_scores(finished: Path):
    scores = column(finished, "crepa_alignment_score")
    ema = scores[0]
    for score, logged in zip(scores, column(finished, "crepa_alignment_score_ema"), strict=True):
        ema = 0.99 * ema + 0.01 * score if logged != scores[0] else ema
        assert logged == pytest.approx(ema)


def test_self_similarity_rises(finished: Path):
    for key in ("crepa_similarity_self", "crepa_alignment_score"):
        values = column(finished, key)
        assert sum(values[-4:]) / 4 > sum(values[:4]) / 4 + 0.02


def test_the_folder_is_laid_out_as_designed(finished: Path):
    files = ["config.json", "dataset.json", "metrics.jsonl", ADAPTER, "report.html", "status.json"]
    assert names(finished) == sorted([".lock", "adapters", "checkpoints", "clip-lists", "tensorboard", *files])
    assert names(finished / "checkpoints") == ["step-000005", "step-000010", "step-000012"]
    assert names(finished / "adapters") == [f"squares-{step:06d}.safetensors" for step in (5, 10, 12)]
    inside = names(finished / "checkpoints" / "step-000012")
    for name in ("adapter.safetensors", "projector.safetensors", "state.json", "fingerprint.json"):
        assert name in inside
    assert status(finished)["status"] == "completed"
    assert status(finished)["step"] == 12
    config = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    assert config["fps"] == 16.0
    assert config["crepa_block_index"] == 8
    assert config["lora_alpha"] == 4.0
    assert config["crepa_adjacent_tau"] == 1.0


def test_the_exported_adapter_is_the_last_and_holds_no_projector(finished: Path):
    last = adapter(finished)
    assert same_tensors(last, load_file(finished / "adapters" / "squares-000012.safetensors"))
    assert not same_tensors(last, load_file(finished / "adapters" / "squares-000005.safetensors"))
    assert all(name.startswith("diffusion_model.blocks.") and ".lora_" in name for name in last)
    assert any(tensor.abs().max() > 0 for name, tensor in last.items() if "lora_B" in name)
    assert {tensor.dtype for tensor in last.values()} == {torch.float32}


def test_the_command_line_trains_and_ends_with_0(
    config_file: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = config_file(max_train_steps=1)
    assert run_cli(monkeypatch, "fit", str(path), "--crepa_lambda", "0.25", "--max-train-steps=2") == 0
    output = capsys.readouterr().out
    assert "step 2/2" in output
    assert ADAPTER in output.replace("\n", "").replace(" ", "")
    assert column(path.parent / "run", "crepa_weight") == [0.25, 0.25]


@pytest.mark.parametrize(
    "changes",
    [
        {"crepa_feature_source": "pixels"},
        {"crepa_feature_source": "latents"},
        {"crepa_feature_source": "latents", "crepa_drop_vae_encoder": True},
        {"crepa_feature_source": "backbone", "crepa_block_index": 3, "crepa_teacher_block_index": 9},
        {"crepa_cache_dtype": "int8"},
        {"attention_backend": "native"},
        {"crepa_projector": "conv"},
        {"crepa_projector": "conv", "crepa_encoder_image_size": 70},
        {"crepa_encoder_image_size": 56},
        {"crepa_spatial_align": False},
        {"crepa_normalize_by_frames": False},
        {"crepa_adjacent_distance": 5, "crepa_cumulative_neighbors": True},
        {"crepa_threshold_metric": "self", "crepa_similarity_threshold": 0.9},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "gradient_checkpointing": False, "crepa_feature_source": "pixels"},
        {"vae_dtype": "bfloat16"},
        {"optimizer": "adafactor"},
        {"timestep_sampling": "shifted"},
        {"lora_targets": "all-linear", "lora_alpha": 16.0},
        {"aspect_buckets": True, "train_batch_size": 2},
        {"num_frames": 1, "crepa_adjacent_distance": 0},
    ],
    ids=lambda changes: " ".join(f"{key}={value}" for key, value in changes.items()),
)
def test_every_way_trains(config_file: Write, changes: dict[str, Any]):
    folder = train(config_file, max_train_steps=2, **changes)
    for line in lines(folder):
        assert set(line) == KEYS
        if changes.get("crepa_normalize_by_frames", True):
            assert line["crepa_loss"] == pytest.approx(-0.5 * line["crepa_alignment_score"], abs=1e-5)
        assert line["loss"] == pytest.approx(line["diffusion_loss"] + line["crepa_loss"], abs=1e-6)
        assert line["crepa_similarity_self"] != 0
        assert line["grad_norm"] > 0
    projector = load_file(folder / "checkpoints" / "step-000002" / "projector.safetensors")
    assert {tensor.dtype for tensor in projector.values()} == {torch.float32}
    assert {tensor.dtype for tensor in adapter(folder).values()} == {torch.float32}


@pytest.mark.parametrize("crepa", [True, False])
def test_layersync_adds_its_loss(config_file: Write, crepa: bool):
    folder = train(config_file, crepa_enabled=crepa, layersync_enabled=True, layersync_student_block=2, layersync_teacher_block=7)
    for line in lines(folder):
        assert set(line) == KEYS | {"layersync_loss"}
        assert -0.2 <= line["layersync_loss"] < 0.2
        expected = line["diffusion_loss"] + (line["crepa_loss"] or 0) + line["layersync_loss"]
        assert line["loss"] == pytest.approx(expected, abs=1e-6)


def test_epochs_are_counted_in_windows(config_file: Write):
    """Three clips of two windows each."""
    folder = train(config_file, max_train_steps=..., num_train_epochs=2, train_batch_size=2, gradient_accumulation_steps=2)
    assert column(folder, "step") == [1, 2, 3, 4]
    assert status(folder) == status(folder) | {"status": "completed", "step": 4, "reason": ""}


def test_a_line_over_several_steps_holds_means(config_file: Write, tmp_path: Path):
    changes = {"max_train_steps": 5, "crepa_warmup_steps": 4}
    single = lines(train(config_file, output_dir=str(tmp_path / "single"), **changes))
    paired = lines(train(config_file, output_dir=str(tmp_path / "paired"), logging_steps=2, **changes))
    assert [line["step"] for line in paired] == [2, 4, 5]
    for line, steps in zip(paired, (single[:2], single[2:4], single[4:]), strict=True):
        for key in ("loss", "diffusion_loss", "grad_norm"):
            assert line[key] == pytest.approx(sum(step[key] for step in steps) / len(steps))
        assert line["crepa_loss"] == pytest.approx(sum(step["crepa_loss"] or 0 for step in steps) / len(steps))
        scores = [step["crepa_alignment_score"] for step in steps if step["crepa_alignment_score"] is not None]
        assert line["crepa_alignment_score"] == pytest.approx(sum(scores) / len(scores))
        assert line["crepa_weight"] == steps[-1]["crepa_weight"]
        assert line["crepa_alignment_score_ema"] == steps[-1]["crepa_alignment_score_ema"]
        assert line["loss"] == pytest.approx(line["diffusion_loss"] + line["crepa_loss"], abs=1e-6)


def test_old_checkpoints_are_rotated_and_adapters_are_kept(config_file: Write):
    folder = train(config_file, max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    assert names(folder / "checkpoints") == ["step-000003", "step-000004"]
    assert names(folder / "adapters") == [f"adapter-{step:06d}.safetensors" for step in (1, 2, 3, 4)]


def test_neither_vae_nor_encoders_are_in_memory_while_training(config_file: Write, tmp_path: Path):
    kinds = (UMT5EncoderModel, AutoencoderKLWan, Dinov2Model, WanPipeline, WanTransformer3DModel)
    before = alive(*kinds)
    found: set[type] = set()

    def look(_step: int) -> None:
        found.update(map(type, alive(*kinds, but=before)))

    train(config_file, after_step=look, cache_dir=str(tmp_path / "fresh"), max_train_steps=2)
    assert found == {WanTransformer3DModel}


def test_the_base_weights_are_untouched(config_file: Write, wan: Path):
    files = sorted((wan / "transformer").glob("*.safetensors"))
    before = [file.read_bytes() for file in files]
    expected = load_file(files[0])
    compared: list[int] = []

    def compare(event: object) -> None:
        if not isinstance(event, StepLaunched) or event.run.state.step < 3:
            return
        transformer = event.run.transformer.module
        state = {name.replace(".base_layer", ""): tensor for name, tensor in transformer.state_dict().items()}
        base = {name: tensor for name, tensor in state.items() if "lora_" not in name}
        assert same_tensors(base, expected)
        assert not any(parameter.grad is not None for parameter in transformer.parameters())
        compared.append(len(base))

    train(config_file, subscribers=[compare], max_train_steps=3, learning_rate=1e-2, adam_weight_decay=0.5)
    assert compared == [len(expected)]
    assert [file.read_bytes() for file in files] == before


def test_an_adapter_of_a_model_with_one_transformer_names_no_expert(finished: Path):
    with safe_open(finished / ADAPTER, framework="pt") as file:
        assert "crepatrain.expert" not in file.metadata()
