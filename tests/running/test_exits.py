"""Whatever ends a run, its process ends, and so do its readers; what was trained is kept."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import Write, adapter, expect_same_run, lines, names, same_tensors, status, train, wait_until

FAULTY = Path(__file__).with_name("faulty.py")
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


def begin(config: Path, log: Path, fault: str | None = None) -> subprocess.Popen[bytes]:
    """The real command, in a session of its own."""
    command = [str(FAULTY), fault] if fault else ["-m", "crepatrain"]
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *command, "fit", str(config)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def of_session(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def readers_of(process: subprocess.Popen[bytes]) -> list[int]:
    return [pid for pid in of_session(process.pid) if pid != process.pid]


def expect_ended(process: subprocess.Popen[bytes], log: Path) -> str:
    """The process ends, and within five seconds all that it began; gives what it printed."""
    process.wait(timeout=90)
    for _ in range(50):
        if not of_session(process.pid):
            break
        time.sleep(0.1)
    left = of_session(process.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    return log.read_text(encoding="utf-8")


@pytest.mark.parametrize("readers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_reader_that_is_killed(config_file: Write, tmp_path: Path, readers: int):
    run, log = tmp_path / "run", tmp_path / "log"
    config = config_file(max_train_steps=100_000, checkpointing_steps=100_000, dataloader_num_workers=readers)
    process = begin(config, log)
    wait_until(process, lambda: (run / "metrics.jsonl").is_file() and len(readers_of(process)) >= readers, log)
    os.kill(readers_of(process)[0], signal.SIGKILL)
    output = expect_ended(process, log)
    assert process.returncode == 2, output
    assert f"dataloader_num_workers={readers}: a reader process died" in output.replace("\n", " ")
    assert "Traceback" not in output
    assert status(run)["status"] == "failed"
    done = status(run)["step"]
    assert names(run / "checkpoints") == [f"step-{done:06d}"]
    assert done == lines(run)[-1]["step"]


@pytest.mark.parametrize("readers", [pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 8])
def test_an_error_that_nobody_expected(config_file: Write, tmp_path: Path, readers: int):
    config = config_file(**EVERYTHING, dataloader_num_workers=readers)
    process = begin(config, tmp_path / "log", "assertion 3")
    output = expect_ended(process, tmp_path / "log")
    assert process.returncode == 1, output
    assert "nobody expected this" in output
    assert status(tmp_path / "run")["status"] == "failed"
    train(config_file, **EVERYTHING)
    expect_same_run(tmp_path / "run", train(config_file, output_dir=str(tmp_path / "whole"), **EVERYTHING))


@pytest.mark.parametrize("name", ["figures.jsonl", *(pytest.param(name, marks=pytest.mark.slow) for name in FILES)])
def test_a_disk_that_is_full_for_one_file(config_file: Write, tmp_path: Path, name: str):
    """One message that names the file; the same command goes on to the same end."""
    changes: dict[str, Any] = {**EVERYTHING, "dataloader_num_workers": 2}
    process = begin(config_file(**changes), tmp_path / "log", f"full {name}")
    output = expect_ended(process, tmp_path / "log")
    assert "Traceback" not in output, output
    assert process.returncode == 2, output
    assert "No space left on device" in output.replace("\n", " ")
    train(config_file, **changes)
    run, other = tmp_path / "run", train(config_file, output_dir=str(tmp_path / "other"), **changes)
    expect_same_run(run, other)
    assert names(run / "samples") == names(other / "samples")
    assert same_tensors(adapter(run), adapter(other))
