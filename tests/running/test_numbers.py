"""The numbers of a run: CREPA's weight and cutoff over it, and different ways to the same losses."""

import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from common import render_clip
from runs import (
    CUT,
    KEYS,
    MEASURED,
    Write,
    adapter,
    column,
    expect_same_run,
    last_checkpoint,
    lines,
    losses_of,
    names,
    same_tensors,
    status,
    train,
)
from safetensors.torch import load_file

from crepatrain.alignment.encoders import VisionEncoder
from crepatrain.alignment.teachers import PixelTeacher
from crepatrain.running.events import StepLaunched


def in_two_processes(config: Path, *, expected: int = 0) -> bytes:
    """Train a config with two processes; gives what they printed, and their errors where they are expected to end with another
    exit code than 0."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "crepatrain", "fit", str(config)]
    ended = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert ended.returncode == expected, ended.stderr.decode()
    return ended.stdout + (ended.stderr if expected else b"")


def expect_same_columns(left: list[dict[str, Any]], right: list[dict[str, Any]], *keys: str) -> None:
    """As near as sums in another order are."""
    for key in keys:
        pairs = zip([line.get(key) for line in left], [line.get(key) for line in right], strict=True)
        assert all(a == b or a == pytest.approx(b, rel=1e-5) for a, b in pairs), key


def test_two_processes_are_one_with_twice_the_batch(config_file: Write, tmp_path: Path):
    changes = {"max_train_steps": 4, "gradient_accumulation_steps": 2, "crepa_cutoff_step": 3, "crepa_warmup_steps": 1}
    alone = train(config_file, output_dir=str(tmp_path / "alone"), train_batch_size=2, **changes)
    both = tmp_path / "both"
    shown = in_two_processes(config_file(output_dir=str(both), **changes))
    assert shown.count(b"reading clips") == 1
    assert len(lines(both)) == 4
    assert column(both, "crepa_alignment_score")[0] is None  # the warm-up's first step
    expect_same_columns(lines(both), lines(alone), "loss", "diffusion_loss", "crepa_alignment_score", "grad_norm")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(config_file: Write, tmp_path: Path):
    """Wherever a step keeps its samples, here and back again."""
    changes = {"caption_dropout": 0.5, "crepa_similarity_threshold": 1.2}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=6, gradient_accumulation_steps=2, **changes)
    parts = tmp_path / "parts"
    common = {"output_dir": str(parts), **changes}
    train(config_file, max_train_steps=2, gradient_accumulation_steps=2, **common)
    refused = in_two_processes(config_file(max_train_steps=4, gradient_accumulation_steps=2, **common), expected=1).decode()
    assert "a step of this run has 2 samples (1 process x train_batch_size 1 x gradient_accumulation_steps 2)" in refused
    assert "set gradient_accumulation_steps to 1 for 2 processes" in refused
    in_two_processes(config_file(max_train_steps=4, gradient_accumulation_steps=1, **common))
    train(config_file, max_train_steps=6, gradient_accumulation_steps=2, **common)
    expect_same_columns(lines(whole), lines(parts), "step", "loss", "diffusion_loss", "crepa_alignment_score", "grad_norm")


@pytest.mark.slow
def test_two_processes_look_at_and_continue_a_run_as_one_does(config_file: Write, tmp_path: Path):
    """Averaged weights, held-out clips, videos, checkpoints, and a second command that goes on from these."""
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    render_clip(held_out / "other.mp4", seed=77)
    (held_out / "other.txt").write_text("something else\n", encoding="utf-8")
    changes = {"gradient_accumulation_steps": 2, "crepa_cutoff_step": 3, "crepa_warmup_steps": 1, "checkpointing_steps": 2}
    changes |= {"use_ema": True, "ema_decay": 0.5, "eval_data": str(held_out)}
    changes |= {"validation_prompts": ["a square"], "validation_steps": 2, "validation_sampling_steps": 2}
    alone = train(config_file, output_dir=str(tmp_path / "alone"), train_batch_size=2, max_train_steps=4, **changes)
    both = tmp_path / "both"
    for steps in (2, 4):
        shown = in_two_processes(config_file(output_dir=str(both), max_train_steps=steps, **changes))
        assert shown.count(b"reading clips") == 2, "those to train on and the held-out ones, in the first process alone"
        assert (b"continuing from" in shown) == (steps == 4)
        assert status(both) == status(both) | {"status": "completed", "step": steps, "reason": ""}
    trained, measured = ([[line for line in lines(run) if key in line] for run in (both, alone)] for key in ("loss", "eval_loss"))
    expect_same_columns(*trained, "step", "loss", "diffusion_loss", "crepa_alignment_score", "grad_norm")
    assert [line["step"] for line in measured[0]] == [0, 2, 4]
    expect_same_columns(*measured, "step", "eval_loss", "eval_alignment")
    assert names(both / "samples") == names(alone / "samples")
    for file in ("adapter", "ema", "projector"):
        left, right = (load_file(last_checkpoint(run) / f"{file}.safetensors") for run in (both, alone))
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            torch.testing.assert_close(tensor, right[name], rtol=1e-5, atol=1e-5)


def test_a_run_that_was_cut_off_stays_cut_off(config_file: Write, wan: Path, tmp_path: Path):
    """And neither features nor encoder are read any more."""
    encoder, cache = tmp_path / "encoder", tmp_path / "cache"
    shutil.copytree(wan / "encoder", encoder)
    common = {"crepa_encoder": str(encoder), "cache_dir": str(cache), "checkpointing_steps": 1, **CUT}
    folder = train(config_file, max_train_steps=3, **common)
    assert column(folder, "crepa_cutoff") == [False, True, True]
    assert column(folder, "crepa_weight") == [0.5, 0.0, 0.0]
    shutil.rmtree(cache / "teacher")
    for weights in encoder.glob("*.safetensors"):
        weights.write_bytes(b"no weights")
    train(config_file, max_train_steps=5, **common)
    after = lines(folder)
    assert column(folder, "step") == [1, 2, 3, 4, 5]
    assert not (cache / "teacher").exists()
    for line in after[1:]:
        assert line["crepa_cutoff"] is True
        assert line["crepa_weight"] == 0.0
        assert [line[key] for key in MEASURED] == [None] * 3
        assert line["loss"] == line["diffusion_loss"]
        assert line["crepa_alignment_score_ema"] == after[0]["crepa_alignment_score"]
    saved = [load_file(folder / "checkpoints" / f"step-{step:06d}" / "projector.safetensors") for step in (3, 5)]
    assert same_tensors(*saved)


def test_the_projector_is_frozen_once_crepa_is_cut_off(config_file: Write):
    folder = train(config_file, max_train_steps=3, checkpointing_steps=1, **CUT)
    saved = [load_file(folder / "checkpoints" / f"step-{step:06d}" / "projector.safetensors") for step in (1, 2, 3)]
    assert same_tensors(saved[0], saved[1])
    assert same_tensors(saved[1], saved[2])
    adapters = [load_file(folder / "adapters" / f"adapter-{step:06d}.safetensors") for step in (1, 3)]
    assert not same_tensors(*adapters)


def test_a_recoverable_cutoff_probes(config_file: Write):
    changes = {"crepa_threshold_mode": "recoverable", "crepa_probe_interval": 2, "checkpointing_steps": 1, **CUT}
    folder = train(config_file, max_train_steps=6, **changes)
    assert column(folder, "crepa_cutoff") == [False, True, True, True, True, True]
    assert column(folder, "crepa_weight") == [0.5, 0, 0, 0, 0, 0]
    measured = [line["crepa_alignment_score"] is not None for line in lines(folder)]
    assert measured == [True, False, True, False, True, False]
    for line in lines(folder)[1:]:
        assert line["loss"] == line["diffusion_loss"]
        assert not line["crepa_loss"]
    assert not (folder / "checkpoints" / "step-000001").exists()
    saved = [load_file(folder / "checkpoints" / f"step-{step:06d}" / "projector.safetensors") for step in (4, 5, 6)]
    assert same_tensors(saved[0], saved[2])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_recoverable_cutoff_comes_back(config_file: Write, tmp_path: Path, workers: int):
    for seed in range(10):
        free = train(config_file, output_dir=str(tmp_path / f"free-{seed}"), seed=seed, max_train_steps=2)
        first, second = column(free, "crepa_alignment_score")
        if second < first:
            break
    assert second < first
    folder = train(
        config_file,
        seed=seed,
        crepa_similarity_threshold=(first + second) / 2,
        crepa_similarity_ema_decay=0.0,
        crepa_threshold_mode="recoverable",
        crepa_probe_interval=1,
        dataloader_num_workers=workers,
        max_train_steps=3,
    )
    assert column(folder, "crepa_alignment_score")[:2] == pytest.approx([first, second])
    assert column(folder, "crepa_weight") == [0.5, 0.0, 0.5]
    assert column(folder, "crepa_cutoff") == [False, True, False]


def test_the_first_step_of_a_warm_up_measures_nothing(config_file: Write):
    folder = train(config_file, crepa_warmup_steps=2, max_train_steps=4)
    assert column(folder, "crepa_weight") == [0.0, 0.25, 0.5, 0.5]
    first, second = lines(folder)[:2]
    assert [first[key] for key in (*MEASURED, "crepa_alignment_score_ema")] == [None] * 4
    assert first["loss"] == first["diffusion_loss"]
    assert first["crepa_cutoff"] is False
    assert second["crepa_alignment_score"] == second["crepa_alignment_score_ema"]


def test_a_cutoff_step_frees_the_teacher(config_file: Write):
    asked: list[bool] = []
    encoders: list[weakref.ref[VisionEncoder]] = []

    def look(event: object) -> None:
        if not isinstance(event, StepLaunched):
            return
        teacher = event.run.teacher
        asked.append(teacher is not None)
        if isinstance(teacher, PixelTeacher):
            encoders.append(weakref.ref(teacher.encoder))
        else:
            assert all(encoder() is None for encoder in encoders)

    folder = train(config_file, subscribers=[look], crepa_feature_source="pixels", crepa_cutoff_step=2, max_train_steps=4)
    assert column(folder, "crepa_cutoff") == [False, False, True, True]
    assert column(folder, "crepa_weight") == [0.5, 0.5, 0.0, 0.0]
    assert asked == [True, True, False, False]
    assert len(encoders) == 2


def test_without_crepa_nothing_of_it_is_reported(config_file: Write):
    folder = train(config_file, crepa_enabled=False, max_train_steps=2)
    for line in lines(folder):
        assert all(line.get(key) is None for key in KEYS if key.startswith("crepa"))
        assert line["loss"] == line["diffusion_loss"]
    assert "projector.safetensors" not in names(folder / "checkpoints" / "step-000002")


def test_crepa_changes_neither_data_nor_noise(config_file: Write, tmp_path: Path):
    losses = [
        column(train(config_file, output_dir=str(tmp_path / str(on)), crepa_enabled=on, max_train_steps=2), "diffusion_loss")
        for on in (True, False)
    ]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


def test_accumulation_is_a_larger_batch(config_file: Write, tmp_path: Path):
    runs = [
        train(config_file, output_dir=str(tmp_path / name), train_batch_size=batch, gradient_accumulation_steps=accumulation)
        for name, batch, accumulation in (("batch", 2, 1), ("accumulated", 1, 2))
    ]
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]), abs=1e-5)
    assert column(runs[0], "grad_norm") == pytest.approx(column(runs[1], "grad_norm"), rel=1e-3)


def test_gradient_checkpointing_changes_nothing(config_file: Write, tmp_path: Path):
    runs = [
        train(config_file, output_dir=str(tmp_path / str(on)), gradient_checkpointing=on, lora_dropout=0.2)
        for on in (False, True, "selective")
    ]
    expected = adapter(runs[0])
    for run in runs[1:]:
        assert losses_of(run) == pytest.approx(losses_of(runs[0]), abs=1e-6)
        assert all(torch.allclose(tensor, expected[name], atol=1e-5) for name, tensor in adapter(run).items())


def test_workers_change_nothing(config_file: Write, tmp_path: Path):
    runs = [train(config_file, output_dir=str(tmp_path / str(count)), dataloader_num_workers=count) for count in (0, 2)]
    expect_same_run(*runs)


def test_features_from_the_cache_are_those_of_the_pixels(config_file: Write, tmp_path: Path):
    runs = [
        train(config_file, output_dir=str(tmp_path / source), crepa_feature_source=source, max_train_steps=2)
        for source in ("cached", "pixels")
    ]
    for key in ("crepa_alignment_score", "crepa_similarity_self"):
        assert column(runs[0], key) == pytest.approx(column(runs[1], key), abs=2e-3)
        assert column(runs[0], key)[0] == pytest.approx(column(runs[1], key)[0], abs=2e-4)


@pytest.mark.slow
def test_compiled_blocks_train_the_same(config_file: Write, tmp_path: Path):
    plain = train(config_file, output_dir=str(tmp_path / "plain"))
    compiled = train(config_file, output_dir=str(tmp_path / "compiled"), compile=True)
    for key in ("diffusion_loss", "crepa_loss", "crepa_similarity_self", "grad_norm"):
        assert column(compiled, key) == pytest.approx(column(plain, key), rel=1e-3), key
