"""Output whose other end is gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import crepatrain

# Python's own writes, those of a library that knows nothing of this, and what Python flushes when it ends.
SPEAK = """
import os, sys
from crepatrain.console import Screen
from crepatrain.errors import Problem
from crepatrain.streams import lasting_output
with lasting_output():
    screen = Screen()
    for number in range(3000):
        screen.say(f"line {number}")
        screen.note("something")
        print("a library", flush=number % 2 == 0)
    screen.table("table", ("a", "b"), [("1", "2")])
    screen.problems([Problem("what", "fix")])
    print("not flushed", end="")
    open(sys.argv[1], "w").write("done")
    sys.exit(3)
"""


def run(tmp_path: Path, **streams: object) -> tuple[int, bool]:
    process = subprocess.Popen(
        [sys.executable, "-c", SPEAK, str(tmp_path / "proof")],
        cwd=Path(crepatrain.__file__).parents[1],
        **streams,  # type: ignore[call-overload]
    )
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.readline()
            stream.close()
    code = process.wait(timeout=60)
    return code, (tmp_path / "proof").is_file()


def test_a_reader_that_leaves_ends_no_work(tmp_path: Path):
    assert run(tmp_path, stdout=subprocess.PIPE) == (3, True)


def test_both_streams_may_go(tmp_path: Path):
    assert run(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) == (3, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_the_output_ends_no_work(tmp_path: Path):
    with Path("/dev/full").open("wb") as full:
        assert run(tmp_path, stdout=full, stderr=full) == (3, True)


def test_a_terminal_that_closes_ends_no_work(tmp_path: Path):
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "wb") as terminal:
        process = subprocess.Popen(
            [sys.executable, "-c", SPEAK, str(tmp_path / "proof")],
            cwd=Path(crepatrain.__file__).parents[1],
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
    os.read(ours, 10)
    os.close(ours)
    assert process.wait(timeout=60) == 3
    assert (tmp_path / "proof").is_file()


def test_what_can_be_written_is_written(tmp_path: Path):
    ended = subprocess.run(
        [sys.executable, "-c", SPEAK, str(tmp_path / "proof")],
        cwd=Path(crepatrain.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 3
    assert ended.stdout.count("line ") == 3000
    assert ended.stdout.endswith("not flushed")
    assert "error: what" in ended.stderr
