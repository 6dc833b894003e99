"""Runs that go on with something changed: what is refused, what allow_changes lets through, and what is recorded of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import Write, column, lines, snapshot, status, train
from safetensors.torch import load_file

from crepatrain.commands.fit import fit
from crepatrain.commands.status import status as status_command
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.records.reading import read_run
from crepatrain.reporting.report import write_report


@pytest.fixture
def own(clips: Path, tmp_path: Path) -> Path:
    """A dataset that may be changed."""
    return shutil.copytree(clips, tmp_path / "own")


def recorded(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "changes.jsonl").read_text(encoding="utf-8").splitlines()]


def test_an_allowed_learning_rate_applies_at_once_and_is_recorded(config_file: Write, capsys: pytest.CaptureFixture[str]):
    folder = train(config_file, max_train_steps=2)
    with pytest.raises(UserError, match=r"learning_rate: 0\.001 there, 0\.002 here[^$]*--allow_changes learning_rate$"):
        train(config_file, max_train_steps=4, learning_rate=2e-3)
    fit(read_plan(config_file(max_train_steps=4, learning_rate=2e-3, allow_changes=["learning_rate"])), Screen())
    assert "learning_rate is 0.002 from step 2 on, and was 0.001" in capsys.readouterr().out
    assert column(folder, "learning_rate") == [0.001, 0.001, 0.002, 0.002]
    keys = {"crepa_projector_lr": [0.001, 0.002], "learning_rate": [0.001, 0.002]}
    assert recorded(folder) == [{"step": 2, "keys": keys, "clips": []}]
    train(config_file, max_train_steps=5, learning_rate=2e-3)  # it is this run's own by now
    assert column(folder, "learning_rate")[-1] == 0.002
    assert len(recorded(folder)) == 1
    status_command(folder, Screen())
    words = "from step 2 on: crepa_projector_lr 0.001 -> 0.002, learning_rate 0.001 -> 0.002"
    assert words in capsys.readouterr().out
    assert read_run(folder).changes == [words]
    write_report([folder], folder / "report.html")
    assert "learning_rate 0.001 -&gt; 0.002" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_projector_has_its_new_learning_rate_too(config_file: Write, tmp_path: Path):
    train(config_file, max_train_steps=1)
    train(config_file, max_train_steps=2, crepa_projector_lr=0.5, allow_changes=["crepa_projector_lr"])
    held = json.loads((tmp_path / "run/checkpoints/step-000002/projector_learner.json").read_text(encoding="utf-8"))
    assert held["lr_scheduler"]["base_lrs"] == [0.5]
    assert [group["lr"] for group in held["optimizer"]["param_groups"]] == [0.5]


def test_a_run_that_always_had_the_new_rate_has_the_same_rates(config_file: Write, tmp_path: Path):
    new = {"lr_scheduler": "cosine", "learning_rate": 3e-3, "lr_warmup_steps": 1, "max_train_steps": 6}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), **new)
    parts = train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=3)
    allowed = ["learning_rate", "lr_scheduler", "lr_warmup_steps"]
    train(config_file, output_dir=str(parts), allow_changes=allowed, **new)
    assert column(parts, "learning_rate")[3:] == column(whole, "learning_rate")[3:]


def test_going_back_takes_what_was_changed_later_along(config_file: Write):
    """The keys of config.json hold from the step on to which the run went back."""
    common = {"checkpointing_steps": 2, "checkpoints_total_limit": None}
    folder = train(config_file, max_train_steps=4, **common)
    changed = {"adam_weight_decay": 0.5, "allow_changes": ["adam_weight_decay"]}
    train(config_file, max_train_steps=6, **changed, **common)
    assert [change["step"] for change in recorded(folder)] == [4]
    train(config_file, max_train_steps=6, resume_from_checkpoint="step-2", **changed, **common)
    assert recorded(folder) == [{"step": 2, "keys": {"adam_weight_decay": [0.01, 0.5]}, "clips": []}]
    held = json.loads((folder / "checkpoints/step-000006/transformer_learner.json").read_text(encoding="utf-8"))
    assert [group["weight_decay"] for group in held["optimizer"]["param_groups"]] == [0.5]


def test_recomputing_the_blocks_may_change_and_changes_no_number(config_file: Write, tmp_path: Path):
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=4)
    parts = train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=2)
    allowed = {"gradient_checkpointing": False, "allow_changes": ["gradient_checkpointing"]}
    train(config_file, output_dir=str(parts), max_train_steps=4, **allowed)
    assert column(parts, "loss") == pytest.approx(column(whole, "loss"), rel=1e-4)


def test_changed_clips_are_named(config_file: Write, own: Path, clips: Path):
    folder = train(config_file, train_data=str(own), max_train_steps=2)
    for kind in ("mp4", "txt"):
        shutil.copyfile(clips / f"clip-1.{kind}", own / f"new.{kind}")
        (own / f"clip-2.{kind}").rename(own / f"other-2.{kind}")
        (own / f"clip-0.{kind}").unlink()
    (own / "clip-1.txt").write_text("something else", encoding="utf-8")
    before = snapshot(folder)
    with pytest.raises(UserError) as error:
        train(config_file, train_data=str(own), max_train_steps=4)
    text = str(error.value)
    assert "the clips or captions changed since this run's checkpoint" in text
    assert "1 clip added (new.mp4); 1 clip removed (clip-0.mp4); 1 clip renamed (clip-2.mp4 to other-2.mp4)" in text
    assert "1 clip with another caption (clip-1.mp4)" in text
    assert "--allow_changes train_data" in text
    assert snapshot(folder) == before


def test_changed_clips_are_trained_on_where_that_is_allowed(
    config_file: Write, own: Path, clips: Path, capsys: pytest.CaptureFixture[str]
):
    folder = train(config_file, train_data=str(own), max_train_steps=2, eval_share=0.0)
    for kind in ("mp4", "txt"):
        shutil.copyfile(clips / f"clip-1.{kind}", own / f"new.{kind}")
    changes = {"train_data": str(own), "max_train_steps": 4, "allow_changes": ["train_data"]}
    fit(read_plan(config_file(**changes)), Screen())
    out = capsys.readouterr().out
    assert "1 clip added (new.mp4). The order of the data is that of the new ones from here on: step 2 is step" in out
    assert column(folder, "step") == [1, 2, 3, 4]
    assert recorded(folder) == [{"step": 2, "keys": {}, "clips": ["1 clip added (new.mp4)"]}]
    assert len(list((folder / "clip-lists").iterdir())) == 2
    train(config_file, train_data=str(own), max_train_steps=5)
    assert status(folder)["step"] == 5


def test_another_caption_prefix_needs_its_own_allowance_alone(config_file: Write, own: Path):
    folder = train(config_file, train_data=str(own), max_train_steps=1)
    new = {"train_data": str(own), "caption_prefix": "sks, ", "max_train_steps": 2}
    with pytest.raises(UserError, match="different run"):
        train(config_file, **new)
    train(config_file, **new, allow_changes=["caption_prefix"])
    assert "with another caption (clip-0.mp4" in recorded(folder)[0]["clips"][0]
    (own / "clip-1.mp4").unlink()
    (own / "clip-1.txt").unlink()
    with pytest.raises(UserError, match=r"1 clip removed \(clip-1\.mp4\)"):
        train(config_file, **(new | {"max_train_steps": 3}), allow_changes=["caption_prefix"])


def test_a_run_without_a_list_of_its_clips_says_that_they_changed(config_file: Write, own: Path):
    folder = train(config_file, train_data=str(own), max_train_steps=1)
    shutil.rmtree(folder / "clip-lists")
    (own / "clip-1.txt").write_text("something else", encoding="utf-8")
    with pytest.raises(UserError, match=r"clips or captions changed since .* an earlier version wrote it"):
        train(config_file, train_data=str(own), max_train_steps=2)
    train(config_file, train_data=str(own), max_train_steps=2, allow_changes=["train_data"])
    assert column(folder, "step") == [1, 2]


def test_the_samples_of_a_step_may_be_split_otherwise(config_file: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = {"lora_dropout": 0.0, "caption_dropout": 0.5}
    halves = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=4, train_batch_size=2, **common)
    parts = train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=2, train_batch_size=2, **common)
    train(config_file, output_dir=str(parts), max_train_steps=4, **halves, **common)
    assert column(parts, "loss") == pytest.approx(column(whole, "loss"), rel=1e-4)
    left, right = (load_file(run / "pytorch_lora_weights.safetensors") for run in (whole, parts))
    assert all((left[name] - right[name]).abs().max() < 1e-4 for name in left)
    drops = {"output_dir": str(tmp_path / "drops"), "lora_dropout": 0.5}
    train(config_file, max_train_steps=1, train_batch_size=2, **drops)
    capsys.readouterr()
    fit(read_plan(config_file(max_train_steps=2, **halves, **drops)), Screen())
    assert "lora_dropout is drawn for every process" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"gradient_accumulation_steps": 2}, "set gradient_accumulation_steps to 4 for 1 process"),
        ({"train_batch_size": 2}, "set gradient_accumulation_steps to 2 for 1 process"),
        ({"train_batch_size": 3}, "their product divides 4"),
    ],
)
def test_other_samples_of_a_step_are_refused_with_the_way_back(config_file: Write, changes: dict[str, int], fix: str):
    folder = train(config_file, max_train_steps=1, gradient_accumulation_steps=4)
    before = snapshot(folder)
    with pytest.raises(UserError) as error:
        train(config_file, max_train_steps=2, **({"gradient_accumulation_steps": 4} | changes))
    text = str(error.value)
    assert "a step of this run has 4 samples (1 process x train_batch_size 1 x gradient_accumulation_steps 4)" in text
    assert fix in text
    (folder / "dataset.json").unlink()  # then its checkpoint says it
    with pytest.raises(UserError, match="a step of this run has 4 samples"):
        train(config_file, max_train_steps=2, **({"gradient_accumulation_steps": 4} | changes))
    assert before.keys() - snapshot(folder).keys() == {str(folder / "dataset.json")}


def test_lost_checkpoints_are_no_reason_to_begin_anew(config_file: Write, capsys: pytest.CaptureFixture[str]):
    common = {"max_train_steps": 4, "checkpointing_steps": 2}
    folder = train(config_file, **common)
    first = lines(folder)
    shutil.rmtree(folder / "checkpoints")
    before = snapshot(folder)
    with pytest.raises(UserError, match=r"its checkpoints are gone.*\n.*--resume_from_checkpoint null begins it anew"):
        train(config_file, **common)
    with pytest.raises(UserError, match="checkpoints are gone"):
        train(config_file, resume_from_checkpoint="step-000004", **common)
    assert snapshot(folder) == before
    fit(read_plan(config_file(resume_from_checkpoint=None, **common)), Screen())
    out = capsys.readouterr().out
    for name in ("metrics.jsonl.left", "pytorch_lora_weights.safetensors.left", "adapters/adapter-000002.safetensors.left"):
        assert name in out
        assert (folder / name).is_file()
    assert column(folder, "step") == [1, 2, 3, 4]
    assert column(folder, "loss") == [line["loss"] for line in first]


@pytest.mark.parametrize("steps", [0, 3])
def test_a_kill_before_the_first_checkpoint_is_no_loss(config_file: Write, steps: int):
    """The adapter is written before its checkpoint."""
    folder = train(config_file, max_train_steps=3)
    shutil.rmtree(folder / "checkpoints")
    if not steps:
        shutil.rmtree(folder / "adapters")
        (folder / "pytorch_lora_weights.safetensors").unlink()
    (folder / "status.json").write_text('{"status": "running", "step": 0, "reason": ""}')
    train(config_file, max_train_steps=3)
    assert column(folder, "step") == [1, 2, 3]
    assert (folder / "adapters" / "adapter-000003.safetensors.left").is_file() == bool(steps)
