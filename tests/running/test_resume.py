"""Runs that go on where they stopped, and folders of other runs."""

import json
import shutil
from pathlib import Path

import pytest
from runs import (
    ADAPTER,
    RESTLESS,
    Write,
    column,
    expect_same_run,
    forget,
    interrupted,
    names,
    snapshot,
    status,
    train,
)
from safetensors.torch import load_file, save_file

from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.errors import UserError


def test_a_complete_run_is_left_alone(config_file: Write):
    folder = train(config_file, max_train_steps=1)
    before = snapshot(folder)
    train(config_file, max_train_steps=1)
    assert snapshot(folder) == before


def test_a_run_in_two_parts_is_the_run_in_one(config_file: Write, tmp_path: Path):
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=6, checkpointing_steps=3, **RESTLESS)
    parts = train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=3, checkpointing_steps=3, **RESTLESS)
    assert column(parts, "step") == [1, 2, 3]
    train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=6, checkpointing_steps=3, **RESTLESS)
    assert column(parts, "step") == [1, 2, 3, 4, 5, 6]
    expect_same_run(whole, parts)


def test_a_stopped_run_is_saved_and_goes_on_to_the_bit(config_file: Write, tmp_path: Path):
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=5, **RESTLESS)
    parts = interrupted(config_file, at=2, output_dir=str(tmp_path / "parts"), max_train_steps=5, **RESTLESS)
    assert status(parts)["status"] == "stopped"
    assert status(parts)["step"] == 3
    assert names(parts / "checkpoints") == ["step-000003"]
    assert names(parts / "adapters") == ["adapter-000003.safetensors"]
    assert (parts / ADAPTER).is_file()
    train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=5, **RESTLESS)
    assert status(parts)["status"] == "completed"
    expect_same_run(whole, parts)


def test_a_run_that_died_repeats_no_line(config_file: Write, tmp_path: Path):
    changes = {"max_train_steps": 5, "checkpointing_steps": 2, **RESTLESS}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), **changes)
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    forget(parts, after=2)
    train(config_file, output_dir=str(parts), **changes)
    assert column(parts, "step") == [1, 2, 3, 4, 5]
    expect_same_run(whole, parts)


def test_a_run_with_damaged_lines_goes_on_without_them(config_file: Write, tmp_path: Path):
    changes = {"max_train_steps": 4, "checkpointing_steps": 2}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), **changes)
    parts = train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=2, checkpointing_steps=2)
    with (parts / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('rubbish\n{"step": 2, "loss": "x"}\n')
    train(config_file, output_dir=str(parts), **changes)
    assert column(parts, "step") == [1, 2, 3, 4]
    assert status(parts)["status"] == "completed"
    expect_same_run(whole, parts)


def test_a_run_that_died_within_a_logging_window_logs_the_whole_window(config_file: Write, tmp_path: Path):
    changes = {"max_train_steps": 6, "checkpointing_steps": 3, "logging_steps": 2}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), **changes)
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    forget(parts, after=3)
    train(config_file, output_dir=str(parts), **changes)
    assert column(parts, "step") == [2, 4, 6]
    expect_same_run(whole, parts)


def test_an_older_checkpoint_can_be_gone_on_from(config_file: Write, tmp_path: Path):
    """What came after it is forgotten, checkpoints too: a later `latest` must not jump to them."""
    changes = {"max_train_steps": 6, "checkpointing_steps": 2}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=8, checkpointing_steps=2)
    parts = train(config_file, output_dir=str(tmp_path / "parts"), **changes)
    interrupted(config_file, at=3, output_dir=str(parts), resume_from_checkpoint="step-000002", **changes)
    assert column(parts, "step") == [1, 2, 3, 4]
    train(config_file, output_dir=str(parts), max_train_steps=8, checkpointing_steps=2)
    assert column(parts, "step") == [1, 2, 3, 4, 5, 6, 7, 8]
    expect_same_run(whole, parts)


def test_a_checkpoint_that_is_not_there_is_reported(config_file: Write):
    folder = train(config_file, max_train_steps=2, checkpointing_steps=1)
    before = snapshot(folder)
    with pytest.raises(UserError) as error:
        train(config_file, resume_from_checkpoint="step-000009")
    assert "step-000009" in str(error.value)
    assert "step-000001, step-000002" in str(error.value)
    with pytest.raises(UserError, match=r"resume_from_checkpoint is null"):
        train(config_file, resume_from_checkpoint=None)
    assert snapshot(folder) == before


def test_a_different_run_is_refused_with_its_differences(config_file: Write):
    folder = train(config_file, max_train_steps=1)
    before = snapshot(folder)
    with pytest.raises(UserError) as error:
        train(config_file, learning_rate=2e-3, crepa_lambda=0.25, max_train_steps=9)
    text = str(error.value)
    assert str(folder) in text
    assert "learning_rate: 0.001 there, 0.002 here" in text
    assert "crepa_lambda: 0.5 there, 0.25 here" in text
    assert "max_train_steps" not in text
    assert snapshot(folder) == before


def test_a_key_that_the_run_did_not_know_has_its_default(config_file: Write):
    folder = train(config_file, max_train_steps=1)
    before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({key: before[key] for key in before if key != "compile"}), encoding="utf-8")
    train(config_file, max_train_steps=2)
    assert column(folder, "step") == [1, 2]
    (folder / "config.json").write_text(json.dumps(before | {"a_key_of_the_future": 1}), encoding="utf-8")
    with pytest.raises(UserError, match="a_key_of_the_future: 1 there"):
        train(config_file, max_train_steps=3)


def test_the_same_things_elsewhere_are_the_same_run(config_file: Write, clips: Path, wan: Path, tmp_path: Path):
    folder = train(config_file, max_train_steps=1)
    shutil.copytree(clips, tmp_path / "moved clips")
    shutil.copytree(wan, tmp_path / "moved model")
    moved = {"train_data": "moved clips", "pretrained_model_name_or_path": "moved model", "crepa_encoder": "moved model/encoder"}
    train(config_file, max_train_steps=2, **{key: str(tmp_path / name) for key, name in moved.items()})
    assert column(folder, "step") == [1, 2]


def test_another_model_is_reported_before_anything_is_computed(config_file: Write, wan: Path, tmp_path: Path):
    train(config_file, max_train_steps=1)
    other = tmp_path / "other"
    shutil.copytree(wan, other)
    for part in ("vae", "encoder"):
        (file,) = (other / part).glob("*.safetensors")
        save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    cache = tmp_path / "fresh"
    changes = {"pretrained_model_name_or_path": str(other), "crepa_encoder": str(other / "encoder"), "cache_dir": str(cache)}
    with pytest.raises(UserError, match="the weights of encoder, vae changed"):
        train(config_file, max_train_steps=2, **changes)
    assert not (cache / "latents").exists()


def test_a_target_that_is_no_layer_is_reported_before_anything_is_computed(config_file: Write, tmp_path: Path):
    with pytest.raises(UserError, match="lora_targets: 'to_z'"):
        train(config_file, lora_targets=["to_z"], cache_dir=str(tmp_path / "fresh"))
    assert not (tmp_path / "fresh" / "latents").exists()
    assert not (tmp_path / "run").exists()


def test_a_longer_run_is_reported_to_stretch_what_decays(config_file: Write, capsys: pytest.CaptureFixture[str]):
    train(config_file, max_train_steps=1)
    fit(read_plan(config_file(max_train_steps=2)), Screen())
    assert "the run's length changed from 1 to 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup"])
def test_a_longer_run_follows_its_new_learning_rate_at_once(config_file: Write, tmp_path: Path, name: str):
    changes = {"lr_scheduler": name, "lr_warmup_steps": 1}
    parts = train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=2, **changes)
    train(config_file, output_dir=str(parts), max_train_steps=4, **changes)
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=4, **changes)
    assert column(parts, "learning_rate")[2:] == column(whole, "learning_rate")[2:]


def test_other_captions_are_a_different_run(config_file: Write, clips: Path, tmp_path: Path):
    own = tmp_path / "clips"
    shutil.copytree(clips, own)
    folder = train(config_file, train_data=str(own), max_train_steps=1)
    (own / "clip-1.txt").write_text("something else", encoding="utf-8")
    before = snapshot(folder)
    with pytest.raises(UserError, match=r"clips or captions changed"):
        train(config_file, train_data=str(own), max_train_steps=2)
    assert snapshot(folder) == before


def test_a_folder_of_something_else_is_refused(config_file: Write, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work", encoding="utf-8")
    before = snapshot(tmp_path / "run")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        train(config_file)
    assert snapshot(tmp_path / "run") == before


def test_a_mistake_before_the_first_step_does_not_claim_the_folder(config_file: Write, clips: Path, tmp_path: Path):
    own = tmp_path / "clips"
    shutil.copytree(clips, own)
    (own / "clip-1.txt").unlink()
    with pytest.raises(UserError, match=r"clip-1\.mp4: no caption"):
        train(config_file, train_data=str(own))
    with pytest.raises(UserError, match=r"num_frames=81 are needed"):
        train(config_file, train_data=str(own), missing_captions="skip", num_frames=81)
    folder = train(config_file, train_data=str(own), missing_captions="empty", max_train_steps=1)
    assert status(folder)["status"] == "completed"


@pytest.mark.parametrize("left", ["", '{"step": 4, "promp'])
def test_figures_that_a_kill_has_cost_are_measured_again(trained, tmp_path, left):
    """The videos of the last step were written, their figures not, or not all."""
    root = tmp_path / "run"
    shutil.copytree(trained, root)
    figures = root / "samples" / "figures.jsonl"
    expected = figures.read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in expected[-2:]] == [4, 4]
    figures.write_text("".join(expected[:-2]) + (expected[-2] + left if left else ""))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads((root / "config.json").read_text()) | {"output_dir": str(root)}), encoding="utf-8")
    fit(read_plan(path), Screen(quiet=True))
    assert figures.read_text().splitlines(keepends=True) == expected


def test_a_resume_from_an_earlier_step_forgets_what_came_later(trained, tmp_path):
    """Lines, figures, videos and adapters of abandoned steps don't mix with those that take their place."""
    root = tmp_path / "run"
    shutil.copytree(trained, root)
    config = json.loads((root / "config.json").read_text()) | {"output_dir": str(root), "checkpoints_total_limit": None}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"max_train_steps": 6}), encoding="utf-8")
    fit(read_plan(path), Screen(quiet=True))
    (root / "samples" / "figures.jsonl").open("a").write('{"step": 6, "promp')  # a kill
    path.write_text(json.dumps(config | {"max_train_steps": 5, "resume_from_checkpoint": "step-000004"}), encoding="utf-8")
    fit(read_plan(path), Screen(quiet=True))
    assert not (root / "samples" / "step-000006.mp4").exists()
    assert not (root / "adapters" / "adapter-000006.safetensors").exists()
    assert (root / "adapters" / "adapter-000006.safetensors.left").exists()
    steps = [json.loads(line)["step"] for line in (root / "samples" / "figures.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [0, 2, 4, 5]
    assert len(steps) == 2 * 4
    assert json.loads((root / "best.json").read_text())["step"] <= 5
