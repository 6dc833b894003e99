"""Whether a config may go on in a folder, and from where, without torch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crepatrain.config.plan import read_plan
from crepatrain.errors import UserError
from crepatrain.records.continuing import Continuation, find_continuation
from crepatrain.records.layout import RunLayout
from crepatrain.records.runfolder import RunFolder

Write = Callable[..., Path]


def find(config_file: Write, processes: int | None = None, **changes: Any) -> Continuation:
    config = read_plan(config_file(**changes)).config
    return find_continuation(RunLayout(Path(config.loop.output_dir)), config, processes)


@pytest.fixture
def root(config_file: Write) -> Path:
    """A run with checkpoints of the steps 8 and 16."""
    config = read_plan(config_file(gradient_accumulation_steps=8)).config
    with RunFolder(config) as folder:
        folder.inspect()
        folder.claim(0)
        folder.log({"step": 16, "loss": 1.0})
        for step in (8, 16):
            folder.checkpoint(step).mkdir(parents=True)
        dataset = {"train_data": "x", "clips": 3, "windows": 3, "left_out": 0, "unit": 8, "steps_per_epoch": 1, "steps": 20}
        folder.describe(dataset | {"buckets": [], "captions": []})
    return folder.root


@pytest.fixture
def go_on(config_file: Write, root: Path) -> Callable[..., Continuation]:
    return lambda processes=None, **changes: find(config_file, processes, **({"gradient_accumulation_steps": 8} | changes))


def test_a_checkpoint_is_asked_for_by_name_by_step_or_by_path(go_on, root: Path, tmp_path: Path, monkeypatch):
    eighth = root / "checkpoints" / "step-000008"
    assert go_on().checkpoint == root / "checkpoints" / "step-000016"
    monkeypatch.chdir(root.parent)
    (tmp_path / "link").symlink_to(root)
    for way in (
        "step-000008",
        "step-8",
        str(eighth),
        f"{eighth}/",
        f"{root.name}/checkpoints/step-000008",
        f"./{root.name}/checkpoints/../checkpoints/step-000008",
        str(tmp_path / "link/checkpoints/step-000008"),
    ):
        assert go_on(resume_from_checkpoint=way).checkpoint == eighth, way


def test_what_is_not_in_this_run_is_an_error(go_on, root: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "elsewhere" / "step-000008"
    other.mkdir(parents=True)
    aside = root / "checkpoints" / "step-000008.left"
    aside.mkdir()
    for way in (
        str(other),
        "elsewhere/step-000008",
        "/elsewhere/step-8",
        "./step-8",
        "checkpoints/step-8",
        str(root),
        str(aside),
        ".",
    ):
        with pytest.raises(UserError) as error:
            go_on(resume_from_checkpoint=way)
        assert f"resume_from_checkpoint={way}: it is not in this run" in str(error.value), way
        assert "step-000008, step-000016" in str(error.value)
    for way in ("step-9", "8", "step-", "step-8.left", "step-000008.left", "", "step-²"):
        with pytest.raises(UserError, match="no such checkpoint in"):
            go_on(resume_from_checkpoint=way)


def test_a_link_to_another_run_is_not_in_this_one(go_on, root: Path, tmp_path: Path):
    """A link in checkpoints/ is a checkpoint of this run, the path that it leads to is the same folder."""
    (tmp_path / "elsewhere" / "step-000099").mkdir(parents=True)
    (root / "checkpoints" / "step-000099").symlink_to(tmp_path / "elsewhere" / "step-000099")
    assert go_on(resume_from_checkpoint="step-99").checkpoint == root / "checkpoints" / "step-000099"
    with pytest.raises(UserError, match="not in this run"):
        go_on(resume_from_checkpoint=str(tmp_path / "elsewhere" / "step-000008"))


def test_everything_that_is_wrong_is_said_at_once(go_on, root: Path):
    (root / "samples").write_text("a file")
    with pytest.raises(UserError) as error:
        go_on(lora_rank=7, gradient_accumulation_steps=3, resume_from_checkpoint="step-1")
    text = str(error.value)
    for part in ("samples: it is no folder", "lora_rank: 4 there, 7 here", "has 8 samples", "step-1: no such checkpoint"):
        assert part in text
    assert "allow_changes" not in text, "the rank can't change"


def test_the_number_of_processes_counts(go_on):
    for processes, accumulation in ((1, 8), (2, 4), (4, 2), (8, 1)):
        assert go_on(processes, gradient_accumulation_steps=accumulation).checkpoint
    with pytest.raises(UserError, match=r"has 8 samples \(1 process .*\), and here it would have 16 \(2 processes") as error:
        go_on(2)
    assert "set gradient_accumulation_steps to 4 for 2 processes" in str(error.value)
    with pytest.raises(UserError, match="product divides 8"):
        go_on(3)
    assert go_on(gradient_accumulation_steps=4).notes == [
        "a step of this run has 8 samples: with this config 2 processes train them"
    ]
    assert go_on().notes == []


def test_a_folder_of_something_else_is_refused(config_file: Write, tmp_path: Path):
    root = tmp_path / "run"
    root.mkdir()
    for name in (".lock", "config.json.123-456.tmp", ".tmpAbC123"):
        (root / name).touch()
    assert find(config_file) == Continuation(), "what a run has left that was killed while it claimed the folder"
    (root / "thesis.tmp").touch()
    with pytest.raises(UserError, match=r"not empty and holds no run \(thesis\.tmp\)"):
        find(config_file)


@pytest.mark.parametrize("evidence", ["completed", "adapters", "later steps", "more steps than one checkpoint"])
def test_lost_checkpoints_are_noticed(go_on, root: Path, evidence: str):
    for path in (root / "checkpoints").iterdir():
        path.rmdir()
    assert go_on().checkpoint is None, "a few steps alone, below checkpointing_steps"
    (root / "adapters").mkdir()
    adapter = root / "adapters" / "adapter-000016.safetensors"
    adapter.touch()
    assert go_on().checkpoint is None, "an adapter whose checkpoint was not written any more"
    if evidence == "completed":
        (root / "status.json").write_text('{"status": "completed", "step": 16, "reason": ""}')
    elif evidence == "adapters":
        (root / "adapters" / "adapter-000008.safetensors").touch()
    else:
        if evidence == "more steps than one checkpoint":
            adapter.unlink()
        at = 17 if adapter.exists() else 501
        (root / "metrics.jsonl").open("a").write(f'{{"step": {at}, "loss": 1.0}}\n')
    for asked in ("latest", "step-000016"):
        with pytest.raises(UserError, match=r"its checkpoints are gone: .*\n.*resume_from_checkpoint null"):
            go_on(resume_from_checkpoint=asked)
    assert go_on(resume_from_checkpoint=None) == Continuation(lost=True)


def test_validate_config_refuses_what_fit_would_and_loads_no_torch(go_on, root: Path, config_file: Write):
    def validate(**changes: Any) -> tuple[int, str]:
        path = config_file(**({"gradient_accumulation_steps": 8} | changes))
        ended = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "crepatrain", "validate-config", str(path)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"COLUMNS": "300"},
        )
        assert "| torch\n" not in ended.stderr
        errors = [line for line in ended.stderr.splitlines() if not line.startswith("import time")]
        return ended.returncode, ended.stdout + "\n".join(errors)

    code, text = validate()
    assert code == 0
    assert "step-000016" in text
    code, text = validate(learning_rate=0.5, allow_changes=["learning_rate"])
    assert code == 0
    assert "learning_rate is 0.5 from step 16 on, and was 0.001" in text
    code, text = validate(learning_rate=0.5)
    assert code == 2
    assert "different run (crepa_projector_lr: 0.001 there, 0.5 here; learning_rate: 0.001 there, 0.5 here)" in text
    assert text.rstrip().endswith("--allow_changes learning_rate")
    code, text = validate(resume_from_checkpoint="/elsewhere/step-000008")
    assert code == 2
    assert "it is not in this run" in text
