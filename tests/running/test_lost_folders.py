"""What becomes of a run whose folders change under it, or were never usable: one message, and a folder to go on in."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from common import render_clip
from runs import Write, column, expect_same_run, interrupted, names, run_cli, train

from crepatrain.config.plan import read_plan
from crepatrain.errors import UserError
from crepatrain.records.runfolder import RunFolder, rotate


def at_step(step: int, action: Callable[[], Any]) -> Callable[[int], None]:
    return lambda done: action() if done == step else None


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_that_is_removed_during_the_run_can_be_trained_in_again(config_file: Write, tmp_path: Path):
    common = {"max_train_steps": 5, "report_to": []}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), **common)
    root = tmp_path / "run"
    with pytest.raises(UserError, match=r"output_dir=\S*run: it is gone: it was removed") as error:
        train(config_file, after_step=at_step(2, lambda: shutil.rmtree(root)), **common)
    assert len(error.value.problems) == 1
    assert json.loads((root / "status.json").read_text())["status"] == "failed"
    train(config_file, **common)
    assert column(root, "step")[-1] == 5
    assert column(root, "loss")[-1] == column(whole, "loss")[-1]


def test_a_disk_that_goes_during_the_run_gives_one_message(
    config_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A file in the folder's place: nothing can be written below it, by whomever."""
    root = tmp_path / "mount" / "run"
    config = config_file(output_dir=str(root), max_train_steps=4, report_to=[])
    log, away = RunFolder.log, tmp_path / "away"

    def go(folder: RunFolder, line: Any) -> None:
        if line["step"] == 2:
            (tmp_path / "mount").rename(away)
            (tmp_path / "mount").write_text("no folder")
        log(folder, line)

    monkeypatch.setattr(RunFolder, "log", go)
    assert run_cli(monkeypatch, "fit", str(config)) == 2
    errors = capsys.readouterr().err
    assert errors.count("error:") == 1
    assert "Traceback" not in errors
    monkeypatch.setattr(RunFolder, "log", log)
    (tmp_path / "mount").unlink()
    away.rename(tmp_path / "mount")
    train(config_file, output_dir=str(root), max_train_steps=4, report_to=[])
    assert column(root, "step") == [1, 2, 3, 4]


def test_a_cache_that_is_deleted_during_the_run_costs_no_step(config_file: Write, tmp_path: Path):
    common = {"max_train_steps": 14, "dataloader_num_workers": 0}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), cache_dir=str(tmp_path / "other"), **common)
    cache = tmp_path / "cache"
    parts = {"output_dir": str(tmp_path / "parts"), "cache_dir": str(cache), **common}
    with pytest.raises(UserError, match=r"cache entry .* can't be read") as error:
        train(config_file, after_step=at_step(3, lambda: shutil.rmtree(cache)), **parts)
    assert len(error.value.problems) == 1
    assert names(tmp_path / "parts" / "checkpoints") == ["step-000003"]
    expect_same_run(whole, train(config_file, **parts))


def test_a_clip_that_changes_during_the_run_is_named(config_file: Write, clips: Path, tmp_path: Path):
    own = shutil.copytree(clips, tmp_path / "own")
    common = {"train_data": str(own), "max_train_steps": 14, "crepa_feature_source": "pixels", "dataloader_num_workers": 0}
    kept = {path: path.read_bytes() for path in own.glob("*.mp4")}

    def change() -> None:
        for number, path in enumerate(sorted(kept)):
            render_clip(path, seed=90 + number)

    with pytest.raises(UserError, match=r"clip-\d\.mp4: .*\n.*put the clip back as it was when the run began"):
        train(config_file, after_step=at_step(3, change), **common)
    assert names(tmp_path / "run" / "checkpoints") == ["step-000003"]
    with pytest.raises(UserError, match=r"3 clips with another content \(clip-0\.mp4, clip-1\.mp4, clip-2\.mp4\)"):
        train(config_file, **common)
    for path, content in kept.items():
        path.write_bytes(content)
    assert column(train(config_file, **common), "step")[-1] == 14


@pytest.mark.parametrize("name", ["checkpoints", "adapters", "samples"])
def test_a_file_in_a_folders_place_is_named_before_the_first_step(config_file: Write, tmp_path: Path, name: str):
    train(config_file, max_train_steps=1)
    shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"{name}: it is no folder"):
        train(config_file, max_train_steps=2, resume_from_checkpoint=None)


@pytest.mark.parametrize("key", ["output_dir", "cache_dir"])
def test_links_that_lead_nowhere_are_refused_in_the_config(config_file: Write, tmp_path: Path, key: str):
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for name, words in (("dangling", "it is a link"), ("a", "it is a link"), ("dangling/run", "dangling is a link")):
        with pytest.raises(UserError) as error:
            read_plan(config_file(**{key: str(tmp_path / name)}))
        assert f"{key}={tmp_path / name}: " in str(error.value)
        assert f"{words} that leads nowhere" in str(error.value)
        assert len(error.value.problems) == 1
    (tmp_path / "gone").mkdir()
    read_plan(config_file(**{key: str(tmp_path / "dangling")}))


def refuse(monkeypatch: pytest.MonkeyPatch, call: str, folder: Path) -> None:
    """A method of Path answers as a read-only file system does."""
    original = getattr(Path, call)

    def refused(path: Path, *given: Any, **named: Any) -> Any:
        if path.is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return original(path, *given, **named)

    monkeypatch.setattr(Path, call, refused)


@pytest.mark.parametrize("call", ["mkdir", "replace", "unlink", "write_bytes", "write_text"])
def test_a_folder_that_became_read_only_gives_one_message(
    config_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    common = {"checkpointing_steps": 1, "checkpoints_total_limit": None}
    folder = train(config_file, max_train_steps=3, **common)
    if call == "mkdir":
        shutil.rmtree(folder)
    asked = "latest" if call == "mkdir" else "step-1"
    config = read_plan(config_file(max_train_steps=3, resume_from_checkpoint=asked, **common)).config
    with RunFolder(config) as run:
        run.inspect()
        refuse(monkeypatch, call, folder)
        with pytest.raises(UserError, match="Read-only file system"):
            run.claim(1)


def test_an_old_checkpoint_that_can_not_be_removed_is_named(config_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = train(config_file, max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=None)
    refuse(monkeypatch, "rename", folder)
    with pytest.raises(UserError, match=r"step-000001 can't be removed .*Read-only file system"):
        rotate(folder / "checkpoints", 1)
    assert len(names(folder / "checkpoints")) == 3


def test_what_a_killed_run_has_left_half_written_is_gone_at_the_next_start(config_file: Write, tmp_path: Path, dead: int):
    parts = {"max_train_steps": 4, "checkpointing_steps": 1}
    root = tmp_path / "run"
    interrupted(config_file, at=2, **parts)
    (root / "samples").mkdir()
    (root / "exports").mkdir()
    own = ["config.json", "status.json", "metrics.jsonl", "dataset.json", "best.json", "changes.jsonl"]
    own += ["pytorch_lora_weights.safetensors", "adapters/adapter-000004.safetensors", "samples/step-000004.mp4"]
    own += ["samples/figures.jsonl", "clip-lists/abc.json"]
    left = [root / f"{name}.{os.getpid()}-77.tmp" for name in own]  # its lock is free, so it is not the process that it names
    left += [root / ".tmpAbC123", root / "adapters" / ".tmpAbC123"]
    others = [root / f"{name}.{dead}-77.tmp" for name in ("report.html", "README.md", "exports/a.safetensors", "samples/my.mp4")]
    kept = [root / "thesis.tmp", root / "exports" / "mine.tmp", *others]
    for path in (*left, *kept):
        path.touch()
    folders = [root / "checkpoints" / "step-000009.tmp", root / "transformer.tmp"]
    for folder in folders:
        folder.mkdir()
        (folder / "state.json").touch()
    train(config_file, **parts)
    assert not [path for path in (*left, *folders) if path.exists()]
    assert all(path.exists() for path in kept), "what another command may be writing"
    for path in others:
        os.utime(path, (0, 0))
    train(config_file, **(parts | {"max_train_steps": 5}))
    assert [path.name for path in kept if path.exists()] == ["thesis.tmp", "mine.tmp"]


def test_a_transformer_between_two_renames_is_found_again(config_file: Write, tmp_path: Path):
    root = tmp_path / "run"
    for name in ("transformer.old", "transformer_2.old", "transformer_2", "transformer.tmp", "transformers.old"):
        (root / name).mkdir(parents=True)
    with RunFolder(read_plan(config_file()).config) as run:
        (root / "config.json").write_text(json.dumps(run.config.as_file()))
        run.inspect()
        run.claim(0)
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    assert folders == ["transformer", "transformer_2", "transformers.old"]


def test_every_name_that_is_made_of_output_name_fits(config_file: Write, tmp_path: Path):
    longest = "n" * 150
    with pytest.raises(UserError, match=r"output_name=.*: too long\n.*use 150 characters or fewer"):
        read_plan(config_file(output_name=longest + "n"))
    config = read_plan(config_file(output_name=longest)).config
    layout = RunFolder(config)
    worst = layout.adapter(f"{config.loop.output_name}_high_noise", 10**9).name
    assert len(f"{worst}.left-1000.{2**22}-{2**64}.tmp".encode()) <= 255
    export = worst.removesuffix(".safetensors") + "-comfyui-bfloat16.safetensors"
    assert len(f"{export}.{2**22}-{2**64}.tmp".encode()) <= 255
    folder = train(config_file, output_name=longest, max_train_steps=1)
    assert names(folder / "adapters") == [f"{longest}-000001.safetensors"]
