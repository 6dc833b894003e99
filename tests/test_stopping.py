"""Signals that ask a command to stop, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crepatrain import stopping

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no such signals")

ASKING, ENDING = (signal.SIGHUP, signal.SIGUSR1), (signal.SIGINT, signal.SIGTERM)
# Says when it listens; then it works, in C and without Python's lock, until it is ended, or for as long as it was told.
WORK = """
import hashlib, sys, time
from crepatrain.stopping import StopSignal
seconds, in_c = float(sys.argv[1]), sys.argv[2] == "in-c"
with StopSignal() as stop:
    print("listening", flush=True)
    ends = time.monotonic() + seconds
    if in_c:
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", (1 << 31) - 1)
    while time.monotonic() < ends:
        time.sleep(0.01)
if stop.requested:
    time.sleep(0.3)  # a second hang-up may come behind it
sys.exit(3 if stop.requested else 0)
"""


def listening(tmp_path: Path, seconds: float, how: str = "in-python", before: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", before + WORK, str(seconds), how],
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "errors").open("wb"),
        text=True,
        cwd=Path(stopping.__file__).parents[1],
    )
    assert process.stdout
    assert process.stdout.readline() == "listening\n"
    return process


@pytest.mark.parametrize("number", [*ENDING, *ASKING])
def test_each_asks_to_stop(tmp_path: Path, number: signal.Signals):
    process = listening(tmp_path, 0.5)
    process.send_signal(number)
    assert process.wait(timeout=20) == 3
    said = (tmp_path / "errors").read_text()
    assert said.count("stopping at the next safe moment") == 1
    assert ("a second signal ends it at once" in said) == (number in ENDING)


@pytest.mark.parametrize("number", ASKING)
@pytest.mark.parametrize("again", ASKING)
def test_a_warning_never_ends_it_however_often_it_comes(tmp_path: Path, number: signal.Signals, again: signal.Signals):
    process = listening(tmp_path, 1.8)
    process.send_signal(number)
    time.sleep(1.3)
    process.send_signal(again)
    time.sleep(0.55)  # after its context
    process.send_signal(number)
    assert process.wait(timeout=20) == 3


def test_a_request_behind_a_warning_does_not_end_it(tmp_path: Path):
    """As a scheduler does: a warning, then SIGTERM, and time until SIGKILL."""
    process = listening(tmp_path, 1.5)
    process.send_signal(signal.SIGUSR1)
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 3


@pytest.mark.parametrize("number", ENDING)
def test_one_request_that_arrives_twice_is_one(tmp_path: Path, number: signal.Signals):
    process = listening(tmp_path, 0.7)
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(timeout=20) == 3


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("how", ["in-python", "in-c"])
def test_a_second_request_ends_it_at_once_whatever_it_does(tmp_path: Path, number: signal.Signals, how: str):
    process = listening(tmp_path, 60, how)
    process.send_signal(number)
    time.sleep(1.2)
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number


def test_nohup_holds(tmp_path: Path):
    process = listening(tmp_path, 0.5, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=20) == 0


def test_handlers_are_as_before_where_nobody_asked():
    def own(*_: object) -> None: ...

    before = {number: signal.signal(number, own) for number in (*ENDING, *ASKING)}
    try:
        with stopping.StopSignal():
            assert own not in {signal.getsignal(number) for number in before}
        assert {signal.getsignal(number) for number in before} == {own}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_reader_leaves_every_signal_to_the_parent():
    child = os.fork()
    if not child:
        stopping.leave_signals_to_the_parent()
        for number in (*ENDING, *ASKING):
            os.kill(os.getpid(), number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
