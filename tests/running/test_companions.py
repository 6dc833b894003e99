"""When one process of several ends, the others end soon and say so."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Command
from runs import Write, status, wait_until

LONG = {"max_train_steps": 100_000, "checkpointing_steps": 2, "dataloader_num_workers": 0}


def in_two_processes(config: Path, log: Path, fault: str | None = None) -> Command:
    return Command(config, log, fault, ["-m", "torch.distributed.run", "--nproc_per_node", "2"])


def words_of(output: str) -> str:
    return " ".join(output.split())


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_ends_the_other(config_file: Write, tmp_path: Path, rank: int):
    run, log = tmp_path / "run", tmp_path / "log"
    command = in_two_processes(config_file(**LONG), log)
    wait_until(command.process, (run / "checkpoints" / "step-000002").is_dir, log)
    os.kill(command.living(f"RANK={rank}")[0], signal.SIGKILL)
    output = command.expect_end()
    assert command.process.returncode == 1
    assert output.count("error: ") == 1, output
    assert f"error: process {rank} ended: it ended without a word -> the last checkpoint is {run}/checkpoints/step-" in words_of(
        output
    )
    assert status(run)["status"] == "failed"
    assert f"process {rank} ended" in status(run)["reason"]


@pytest.mark.slow
def test_one_that_waits_for_a_killed_one_for_ever_is_ended(config_file: Write, tmp_path: Path):
    """Well before torchrun would, which ends it after 30 seconds by a SIGKILL that says nothing."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = in_two_processes(config_file(**LONG), log, "hang 3")
    wait_until(command.process, (tmp_path / "hanging").is_file, log)
    os.kill(command.living("RANK=1")[0], signal.SIGKILL)
    output = command.expect_end()
    assert "error: process 1 ended: it ended without a word" in words_of(output)
    assert status(run)["status"] == "failed"


@pytest.mark.slow
def test_an_error_of_one_process_is_said_once(config_file: Write, tmp_path: Path):
    output = in_two_processes(config_file(**LONG), tmp_path / "log", "error 3").expect_end()
    assert output.count("only the second process sees this") == 1, output
    assert "error: process 1 ended: clip.mp4: only the second process sees this" in words_of(output)
    assert status(tmp_path / "run")["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("key", ["train_data", "height"])
def test_an_error_of_all_processes_is_said_once(config_file: Write, clips: Path, tmp_path: Path, key: str):
    """Before the processes know each other, and when the first one is ahead."""
    values = {"train_data": {"train_data": str(tmp_path / "nowhere")}, "height": {"num_frames": 1025}}[key]
    output = in_two_processes(config_file(**LONG, **values), tmp_path / "log").expect_end()
    assert output.count("error: ") == (1 if key == "train_data" else 3), output
    assert "RuntimeError" not in output


def test_accelerate_that_begins_one_process_of_two_is_refused(config_file: Write, tmp_path: Path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "crepatrain", "fit"]
    done = subprocess.run([*launch, str(config_file(max_train_steps=1))], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "it began one process" in words_of(done.stderr)
    assert "torchrun --nproc_per_node" in words_of(done.stderr)
    assert not (tmp_path / "run").exists()
