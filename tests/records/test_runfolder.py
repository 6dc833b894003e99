"""A run's folder under way: what is logged, and what a run that goes on earlier keeps of it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from common import disk_of

from crepatrain.config.plan import read_plan
from crepatrain.errors import UserError
from crepatrain.records import runfolder
from crepatrain.records.runfolder import RunFolder

LINES = [{"step": 1, "loss": 0.5, "grad_norm": None}, {"step": 2, "loss": 0.25}, {"step": 2, "eval_loss": 0.5}]


@pytest.fixture
def folder(config_file: Callable[..., Path]) -> RunFolder:
    """A claimed folder in which two steps are logged, and the lock given back."""
    with RunFolder(read_plan(config_file()).config) as folder:
        assert folder.inspect() is None
        folder.claim(0)
        for line in LINES:
            folder.log(line)
    return folder


def test_a_line_cut_off_by_a_kill_is_left_out_and_then_removed(folder: RunFolder):
    with folder.metrics.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert folder.lines() == [{"step": 1, "loss": 0.5}, *LINES[1:]], "without what was not measured"
    folder.checkpoint(2).mkdir(parents=True)
    with folder:
        assert folder.inspect() == folder.checkpoint(2)
        folder.claim(2)
    assert [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()] == LINES
    assert json.loads(folder.best_file.read_text(encoding="utf-8")) == {"step": 2, "eval_loss": 0.5}


def test_a_damaged_line_is_named_and_goes_when_the_run_goes_on(folder: RunFolder):
    text = folder.metrics.read_text(encoding="utf-8")
    folder.metrics.write_text(f"rubbish\n{text}", encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: it is damaged"):
        folder.lines()
    folder.checkpoint(1).mkdir(parents=True)
    with folder:
        folder.inspect()
        folder.claim(1)
    assert folder.lines() == [{"step": 1, "loss": 0.5}]
    assert not folder.best_file.exists()


def test_a_line_with_a_wrong_value_goes_too(folder: RunFolder):
    with folder.metrics.open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "loss": "x"}\n{"step": 2, "eval_loss": NaN}\n')
    folder.checkpoint(2).mkdir(parents=True)
    with folder:
        folder.inspect()
        folder.claim(2)
    assert [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()] == LINES


def test_a_damaged_line_does_not_stop_a_run_without_a_checkpoint(folder: RunFolder):
    """Neither one that has logged steps, nor one that ended before its first step, whose folder any config may have."""
    with folder.metrics.open("a", encoding="utf-8") as file:
        file.write("rubbish\n")
    with folder:
        assert folder.inspect() is None
        folder.claim(0)
    assert folder.lines() == []
    folder.metrics.write_text('rubbish\n{"step": 1, "loss": "x"}\n', encoding="utf-8")
    other = RunFolder(folder.config.changed(learning_rate=0.5))
    with other:
        assert other.inspect() is None


def test_a_claim_that_fails_leaves_the_status(folder: RunFolder):
    folder.status("stopped", 2)
    before = folder.status_file.read_bytes()
    folder.checkpoint(2).mkdir(parents=True)
    folder.best_file.unlink(missing_ok=True)
    folder.best_file.mkdir()  # what no file can replace
    with folder:
        folder.inspect()
        with pytest.raises(UserError, match=r"best\.json can't be written"):
            folder.claim(2)
    assert folder.status_file.read_bytes() == before


def test_later_steps_are_set_aside_and_a_second_time_destroy_nothing(folder: RunFolder):
    for times in range(3):
        for step in (2, 4):
            folder.checkpoint(step).mkdir(parents=True, exist_ok=True)
            (folder.checkpoint(step) / "state.json").write_text(str(times), encoding="utf-8")
            folder.adapter("cat", step).parent.mkdir(exist_ok=True)
            folder.adapter("cat", step).write_text(str(times), encoding="utf-8")
        folder.log({"step": 3, "loss": float(times)})
        other = RunFolder(folder.config.changed(resume_from_checkpoint="step-000002"))
        with other:
            assert other.inspect() == folder.checkpoint(2)
            (note,) = other.claim(2)
        ending = ".left" if times == 0 else f".left-{times + 1}"
        assert f"checkpoints/step-000004{ending}" in note
        assert f"adapters/cat-000004.safetensors{ending}" in note
        assert (folder.checkpoints / f"step-000004{ending}" / "state.json").read_text(encoding="utf-8") == str(times)
        lines = (folder.root / f"metrics.jsonl{ending}").read_text(encoding="utf-8").splitlines()
        assert json.loads(lines[-1]) == {"step": 3, "loss": times}
    left = ["step-000004.left", "step-000004.left-2", "step-000004.left-3"]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-000002", *left]
    assert [path.name for path in folder.all_adapters()] == ["cat-000002.safetensors"]


def test_a_process_that_does_not_write_writes_nothing(config_file: Callable[..., Path]):
    with RunFolder(read_plan(config_file()).config, writes=False) as folder:
        folder.inspect()
        folder.claim(0)
        folder.log({"step": 1})
        folder.status("running", 1)
        folder.describe({})
        folder.mark_best()
    assert not folder.root.exists()


def test_reading_a_run_loads_nothing_heavy():
    code = "import sys; from crepatrain.records import events, layout, reading; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "crepatrain.records.reading" in modules
    assert not {"torch", "numpy", "diffusers", "transformers", "accelerate", "peft", "av"} & set(modules)


def test_a_heartbeat_is_written_now_and_then_and_a_full_disk_ends_no_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch):
    def content() -> dict[str, object]:
        return json.loads(folder.status_file.read_text(encoding="utf-8"))

    now = [1000.0]
    monkeypatch.setattr(runfolder.time, "monotonic", lambda: now[0])
    folder.status("running", 1)
    assert content()["pid"] == os.getpid()
    for seconds, step in ((29.0, 1), (2.0, 2), (29.0, 2), (2.0, 5)):
        now[0] += seconds
        folder.beat(int(now[0]) if step == 1 else step)
        assert content()["step"] == step
    age = datetime.now(UTC) - datetime.fromisoformat(str(content()["heartbeat"]))
    assert abs(age.total_seconds()) < 5
    now[0] += 100
    with disk_of(10):
        folder.beat(9)
    assert content()["step"] == 5
