"""A run is started once, and stopped by a signal to the process that holds it and to no other."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from recorded import write_run

from crepatrain.errors import UserError
from crepatrain.records.signs import holder_of
from crepatrain.web.confinement import Folders
from crepatrain.web.processes import Processes

HOLDS = """
import sys, time, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    (tmp_path / "runs").mkdir()
    return Folders(tmp_path / "runs", (tmp_path / "data",))


@pytest.fixture
def holder(folders: Folders):
    """A process that holds the lock of a run."""
    root = write_run(folders.runs / "run")
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(root / ".lock")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_the_holder_of_a_lock_is_found(holder, folders):
    assert holder_of(folders.runs / "run" / ".lock") == holder.pid
    holder.kill()
    holder.wait()
    assert holder_of(folders.runs / "run" / ".lock") is None
    assert holder_of(folders.runs / "none" / ".lock") is None


def test_a_stop_reaches_the_process_that_holds_the_run(holder, folders):
    Processes(folders).stop(folders.runs / "run")
    assert holder.wait(10) == -signal.SIGTERM


def test_a_status_that_names_another_process_stops_nothing(folders):
    root = write_run(folders.runs / "run")
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (root / "status.json").write_text(
            json.dumps({"status": "running", "step": 1, "pid": bystander.pid, "host": os.uname().nodename})
        )
        with pytest.raises(UserError, match="no process of this machine"):
            Processes(folders).stop(root)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_run_that_is_under_way_is_not_started(holder, folders):
    for begin in (
        lambda: Processes(folders).start(folders.runs / "run", {}),
        lambda: Processes(folders).go_on(folders.runs / "run"),
    ):
        with pytest.raises(UserError, match="under way in it already"):
            begin()


def test_two_clicks_start_one_process_and_its_words_are_kept(folders):
    processes = Processes(folders)
    refused = []

    def click() -> None:
        try:
            processes.start(folders.runs / "run", {"model_family": "none"})
        except UserError as error:
            refused.append(error)

    clicks = [threading.Thread(target=click) for _ in range(5)]
    for one in clicks:
        one.start()
    for one in clicks:
        one.join()
    assert len(refused) == 4
    assert processes.pending() == ["run"]
    [started] = processes._started.values()
    assert started.wait(60) == 2  # the config is refused, by the command itself
    assert processes.log(folders.runs / "run").count("model_family") == 1
    assert not processes.is_at_work(folders.runs / "run")


def test_a_process_of_the_page_is_none_of_its_terminal(folders):
    processes = Processes(folders)
    processes.start(folders.runs / "run", {})
    [started] = processes._started.values()
    assert os.getsid(started.pid) == started.pid
    started.wait(60)


def test_a_run_without_a_config_does_not_go_on(folders):
    (folders.runs / "run").mkdir()
    with pytest.raises(UserError, match="holds no config"):
        Processes(folders).go_on(folders.runs / "run")
