"""Half written files: whose they are, and when they are given up."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crepatrain.files import written_aside
from crepatrain.leftovers import is_abandoned, remove_abandoned, written_for


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def aged(path: Path, seconds: float) -> Path:
    path.touch()
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_the_names_are_those_that_are_written(tmp_path: Path):
    with written_aside(tmp_path / "metrics.jsonl") as aside:
        assert written_for(aside) == "metrics.jsonl"
        aside.touch()
    assert written_for(tmp_path / ".tmpAbC12x") == ""
    for name in ("thesis.tmp", "notes.1.tmp", "step-000004.tmp", ".tmp", "metrics.jsonl"):
        assert written_for(tmp_path / name) is None


def test_only_what_nobody_writes_any_more_is_given_up(tmp_path: Path, dead: int):
    assert is_abandoned(aged(tmp_path / f"a.{dead}-1.tmp", 700))
    assert not is_abandoned(aged(tmp_path / f"a.{dead}-1.tmp", 60)), "it may be another machine's process"
    assert not is_abandoned(aged(tmp_path / f"a.{os.getpid()}-1.tmp", 7000)), "its process lives"
    assert is_abandoned(aged(tmp_path / f"a.{os.getpid()}-1.tmp", 90_000)), "or another one of its number"
    assert not is_abandoned(aged(tmp_path / ".tmpAbC12x", 7000))
    assert is_abandoned(aged(tmp_path / ".tmpAbC12x", 90_000))
    assert not is_abandoned(tmp_path / f"gone.{dead}-1.tmp")


def test_a_cache_is_cleaned_of_it_alone(tmp_path: Path, dead: int):
    entry = tmp_path / "latents" / "ab"
    entry.mkdir(parents=True)
    old = [aged(entry / f"abc.safetensors.{dead}-5.tmp", 700), aged(entry / ".tmpQwErT1", 90_000)]
    kept = [aged(entry / name, 90_000) for name in ("abc.safetensors", "my.tmp")]
    kept.append(aged(entry / f"abc.safetensors.{os.getpid()}-5.tmp", 700))
    remove_abandoned(tmp_path)
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in kept)
    remove_abandoned(tmp_path / "nowhere")
