"""Where a run stands, from files that may be half written."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from recorded import DATASET, write_run

from crepatrain.commands.status import status
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.records.runfolder import _LOCK_SECONDS
from crepatrain.records.signs import is_locked, keep_from_children, signs_of_life


def lines_of(root: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    status(root, Screen())
    return capsys.readouterr().out.splitlines()


def test_five_lines_say_it(tmp_path: Path, capsys):
    state, progress, numbers, saved, validation = lines_of(write_run(tmp_path / "run"), capsys)
    assert state.startswith("state       running, last written 0:00:0")
    assert progress == "progress    step 40 of 100 (40%), 2 s a step, 0:02:00 left"
    assert numbers.split(maxsplit=1)[1] == (
        "loss 0.2500  diffusion loss 0.5000  alignment 0.7500  self-similarity 0.5000  weight 0.3000  CREPA on"
    )
    assert saved == "saved       checkpoints/step-000020, adapters/cat-000100.safetensors"
    assert validation == "validation  samples of step 20"


@pytest.mark.parametrize("state", ["completed", "stopped", "failed"])
def test_how_it_ended_is_shown(tmp_path: Path, capsys, state: str):
    assert (
        lines_of(write_run(tmp_path / "run", state=state, reason="saved at step 40"), capsys)[0]
        == f"state       {state}: saved at step 40"
    )


def test_a_line_that_is_being_written_is_no_harm(tmp_path: Path, capsys):
    root = write_run(tmp_path / "run")
    with (root / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 41, "loss": 0.')
    assert "step 40 of 100" in lines_of(root, capsys)[1]


def test_held_out_numbers_are_shown(tmp_path: Path, capsys):
    root = write_run(tmp_path / "run")
    with (root / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 40, "eval_loss": 0.125}\n')
    lines = lines_of(root, capsys)
    assert lines[4] == "validation  eval_loss 0.1250 at step 40, samples of step 20"
    assert "loss 0.2500" in lines[2], "the last training numbers stay"
    (root / "best.json").write_text('{"step": 20, "eval_loss": 0.0625}', encoding="utf-8")
    assert lines_of(root, capsys)[4] == "validation  eval_loss 0.1250 at step 40 (best 0.0625 at step 20), samples of step 20"


def test_a_run_that_fell_silent_may_have_died(tmp_path: Path, capsys):
    root = write_run(tmp_path / "run")
    long_ago = time.time() - 4000
    for name in ("metrics.jsonl", "status.json"):
        os.utime(root / name, (long_ago, long_ago))
    assert lines_of(root, capsys)[0] == "state       running, last written 1:06:40 ago; it may have died"


def test_a_run_of_another_machine_is_known_by_its_heartbeat(tmp_path: Path, capsys):
    root = write_run(tmp_path / "run")
    told = json.loads((root / "status.json").read_text()) | {"pid": 1, "host": "another-node"}
    for age, ending in ((30, ""), (4000, "; it may have died")):
        beat = datetime.now(UTC) - timedelta(seconds=age)
        (root / "status.json").write_text(json.dumps(told | {"heartbeat": beat.isoformat(timespec="seconds")}), encoding="utf-8")
        line = lines_of(root, capsys)[0]
        assert line.startswith("state       running on another-node, last written ")
        assert line.endswith(f" ago{ending}")
    (root / "status.json").write_text(json.dumps(told | {"heartbeat": "yesterday"}), encoding="utf-8")
    assert lines_of(root, capsys)[0].startswith("state       running, last written 0:00:0")


def test_a_lock_decides_what_the_files_leave_open(tmp_path: Path, capsys):
    root = write_run(tmp_path / "run")
    told = json.loads((root / "status.json").read_text()) | signs_of_life()
    (root / "status.json").write_text(json.dumps(told), encoding="utf-8")
    died = "state       it ended without a word at step 40: the same command goes on from step 20"
    before = sorted(root.rglob("*"))
    assert lines_of(root, capsys)[0] == died  # without a lock file
    assert sorted(root.rglob("*")) == before, "it makes no file"
    held = FileLock(root / ".lock")
    with held:
        assert lines_of(root, capsys)[0].startswith("state       running, last written 0:00:0")
        long_ago = time.time() - 4000
        for name in ("metrics.jsonl", "status.json"):
            os.utime(root / name, (long_ago, long_ago))
        assert lines_of(root, capsys)[0].endswith("last written 1:06:40 ago; its process is there, but may hang")
        (root / "status.json").write_text(json.dumps(told | {"status": "stopped", "reason": "why"}), encoding="utf-8")
        assert lines_of(root, capsys)[0] == "state       stopped: why; a command is at work in it now"
        (root / "status.json").write_text(json.dumps(told), encoding="utf-8")
    assert lines_of(root, capsys)[0] == died
    shutil.rmtree(root / "checkpoints")
    assert lines_of(root, capsys)[0].endswith("the same command begins it anew")


def test_looking_never_keeps_a_run_from_its_lock(tmp_path: Path):
    lock = tmp_path / ".lock"
    lock.touch()
    ends, refused = threading.Event(), []

    def look() -> None:
        while not ends.is_set():
            is_locked(lock)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    for _ in range(50):
        try:
            with FileLock(lock, timeout=_LOCK_SECONDS):
                pass
        except Timeout:
            refused.append(True)
    ends.set()
    for looker in lookers:
        looker.join()
    assert not refused


def test_a_forked_child_holds_no_lock(tmp_path: Path):
    lock = tmp_path / ".lock"
    with FileLock(lock):
        keep_from_children(lock)
        reads, writes = os.pipe()
        child = os.fork()
        if not child:
            os.close(writes)
            os.read(reads, 1)
            os._exit(0)
        assert is_locked(lock) is True
    assert is_locked(lock) is False, "though the child lives"
    os.close(writes)
    os.waitpid(child, 0)


def test_a_run_that_has_only_begun(tmp_path: Path, capsys):
    root = write_run(tmp_path / "run", steps=0, max_train_steps=None)
    (root / "dataset.json").write_text(json.dumps(DATASET), encoding="utf-8")
    lines = lines_of(root, capsys)
    assert lines[1] == "progress    step 0 of 60 (0%)"
    assert lines[2] == "numbers     none logged yet"


def test_damage_is_one_message(tmp_path: Path):
    root = write_run(tmp_path / "run")
    (root / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 3}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2: it is damaged"):
        status(root, Screen(quiet=True))
    (root / "status.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"status\.json can't be read"):
        status(root, Screen(quiet=True))
    with pytest.raises(UserError, match="it holds no run"):
        status(tmp_path, Screen(quiet=True))


@pytest.mark.parametrize("command", ["status", "report"])
def test_nothing_heavy_is_loaded(tmp_path: Path, command: str):
    root = write_run(tmp_path / "run")
    code = "import sys; from crepatrain import cli; cli.app(sys.argv[1:], standalone_mode=False); print(sorted(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code, command, str(root)], capture_output=True, text=True, check=True)
    modules = ended.stdout.splitlines()[-1]
    assert not [name for name in ("torch", "diffusers", "transformers", "accelerate", "numpy", "av") if f"'{name}'" in modules]
