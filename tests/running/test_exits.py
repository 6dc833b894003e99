"""Whatever ends a run, its process ends, and so do its readers; what was trained is kept."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from processes import Command
from runs import Write, adapter, expect_same_run, lines, names, same_tensors, status, train, wait_until

EVERYTHING = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "validation_prompts": ["a red square"],
    "validation_steps": 2,
    "validation_sampling_steps": 2,
    "eval_share": 0.4,
    "use_ema": True,
}
# Every file that a run writes, by its name; several where a fault at one of them is a fault at any.
FILES = (
    "config.json",
    "status.json",
    "dataset.json",
    "metrics.jsonl",
    "best.json",
    "step-*.mp4",
    "adapter-*.safetensors",
    "pytorch_lora_weights.safetensors",
    "state.json",
    "transformer_learner.json",
    "step-000002",
    "report.html",
    "events.out.tfevents.*",
)


@pytest.mark.parametrize("readers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_reader_that_is_killed(config_file: Write, tmp_path: Path, readers: int):
    run, log = tmp_path / "run", tmp_path / "log"
    config = config_file(max_train_steps=100_000, checkpointing_steps=100_000, dataloader_num_workers=readers)
    command = Command(config, log)
    wait_until(command.process, lambda: (run / "metrics.jsonl").is_file() and len(command.readers()) >= readers, log)
    os.kill(command.readers()[0], signal.SIGKILL)
    output = command.expect_end()
    assert command.process.returncode == 2, output
    assert f"dataloader_num_workers={readers}: a reader process died" in output.replace("\n", " ")
    assert "Traceback" not in output
    assert status(run)["status"] == "failed"
    done = status(run)["step"]
    assert names(run / "checkpoints") == [f"step-{done:06d}"]
    assert done == lines(run)[-1]["step"]


@pytest.mark.slow
@pytest.mark.parametrize("readers", [0, 2, 8])
def test_an_error_that_nobody_expected(config_file: Write, tmp_path: Path, readers: int):
    config = config_file(**EVERYTHING, dataloader_num_workers=readers)
    command = Command(config, tmp_path / "log", "assertion 3")
    output = command.expect_end()
    assert command.process.returncode == 1, output
    assert "nobody expected this" in output
    assert status(tmp_path / "run")["status"] == "failed"
    train(config_file, **EVERYTHING)
    expect_same_run(tmp_path / "run", train(config_file, output_dir=str(tmp_path / "whole"), **EVERYTHING))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["figures.jsonl", *FILES])
def test_a_disk_that_is_full_for_one_file(config_file: Write, tmp_path: Path, name: str):
    """One message that names the file; the same command goes on to the same end."""
    changes: dict[str, Any] = {**EVERYTHING, "dataloader_num_workers": 2}
    command = Command(config_file(**changes), tmp_path / "log", f"full {name}")
    output = command.expect_end()
    assert "Traceback" not in output, output
    assert command.process.returncode == (0 if name == "report.html" else 2), output  # a report can be made at any time
    assert "No space left on device" in output.replace("\n", " ")
    train(config_file, **changes)
    run, other = tmp_path / "run", train(config_file, output_dir=str(tmp_path / "other"), **changes)
    expect_same_run(run, other)
    assert {name for name in names(run / "samples") if not name.endswith(".left")} == set(names(other / "samples"))
    assert same_tensors(adapter(run), adapter(other))
