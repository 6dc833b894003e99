"""Damaged files of a run are refused by name by every command that would read them, before it changes anything."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import flipped, harm, some_bits
from runs import ADAPTER, Write, expect_same_run, names, of, run_cli, snapshot, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crepatrain.records.layout import checkpoints

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(monkeypatch, capsys) -> Command:
    """Runs a command; gives its exit code and what it says of errors, in one line."""

    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = run_cli(monkeypatch, *map(str, words))
        return code, " ".join(capsys.readouterr().err.split())

    return run


@pytest.fixture
def averaged(config_file: Write) -> Path:
    """A run with an average and three checkpoints."""
    return train(config_file, max_train_steps=3, checkpointing_steps=1, use_ema=True, validation_prompts=None)


def unlocked(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {name: content for name, content in snapshot(folder).items() if not name.endswith(".lock")}


def test_a_bit_anywhere_in_a_checkpoint_is_refused_by_name(averaged, command):
    last = averaged / "checkpoints" / "step-000003"
    assert names(last) == sorted(
        [
            *(f"{name}.safetensors" for name in ("adapter", "ema", "projector", "transformer_learner", "projector_learner")),
            *(f"{name}.json" for name in ("transformer_learner", "projector_learner", "state", "fingerprint", "manifest")),
        ]
    )
    manifest = json.loads((last / "manifest.json").read_text(encoding="utf-8"))
    assert sorted([*manifest["files"], "manifest.json"]) == names(last)
    assert manifest["format"] == 2
    before = unlocked(averaged)
    for path in sorted(last.iterdir()):
        for bit in some_bits(path, 4):
            with flipped(path, bit):
                code, said = command("fit", averaged / "config.json", "--max_train_steps", "4")
            assert code == 2, (path.name, bit)
            assert f"{last} is damaged: " in said
            assert "--resume_from_checkpoint step-000002, or remove that folder" in said
            assert "Traceback" not in said
    after = unlocked(averaged)
    assert {name: content for name, (content, _) in before.items()} == {name: content for name, (content, _) in after.items()}
    assert command("fit", averaged / "config.json", "--max_train_steps", "4")[0] == 0


def test_the_newest_whole_one_is_offered_and_works(config_file, averaged, command, tmp_path):
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=4, checkpointing_steps=1, use_ema=True)
    for step in (2, 3):
        harm(averaged / "checkpoints" / f"step-{step:06d}" / "ema.safetensors")
    more = ("fit", averaged / "config.json", "--max_train_steps", "4")
    code, said = command(*more)
    assert code == 2
    assert "step-000003 is damaged: the content of ema.safetensors is not the one in manifest.json" in said
    assert "--resume_from_checkpoint step-000001" in said
    code, said = command(*more, "--resume_from_checkpoint", "step-000002")
    assert (code, "step-000002 is damaged" in said) == (2, True)
    assert [path.name for path in checkpoints(averaged / "checkpoints")] == ["step-000001", "step-000002", "step-000003"]
    assert not list(averaged.rglob("*.left*"))
    assert command(*more, "--resume_from_checkpoint", "step-000001")[0] == 0
    expect_same_run(whole, averaged)


def test_where_none_is_whole_none_is_offered(averaged, command):
    for folder in checkpoints(averaged / "checkpoints"):
        (folder / "manifest.json").unlink()
    code, said = command("fit", averaged / "config.json", "--max_train_steps", "4")
    assert code == 2
    assert "step-000003 is damaged: manifest.json is missing" in said
    assert "no other checkpoint of this run is whole" in said


@pytest.mark.parametrize(
    ("content", "word"), [('{"step": 3}', "samples_seen"), ("[]", "dictionary"), (None, "step: 2, and the folder's name says 3")]
)
def test_a_state_of_something_else_is_refused_before_anything_is_renamed(averaged, command, content, word):
    """As an earlier version wrote it, without a manifest."""
    folder = averaged / "checkpoints"
    for path in folder.rglob("*.safetensors"):
        save_file(load_file(path), path)
    for path in folder.rglob("manifest.json"):
        path.unlink()
    three = folder / "step-000003"
    shutil.copytree(three, folder / "step-000004")
    text = content or (folder / "step-000002" / "state.json").read_text(encoding="utf-8")
    (three / "state.json").write_text(text, encoding="utf-8")
    before = unlocked(averaged)
    code, said = command("fit", averaged / "config.json", "--max_train_steps", "5", "--resume_from_checkpoint", "step-000003")
    assert code == 2
    assert "step-000003/state.json" in said.replace(" ", "")
    assert word in said
    assert unlocked(averaged) == before


@pytest.mark.parametrize("file", ["adapter.safetensors", "fingerprint.json", "transformer_learner.safetensors"])
def test_what_is_measured_and_exported_is_whole(averaged, command, file, tmp_path):
    harm(averaged / "checkpoints" / "step-000003" / file)
    code, said = command("export", averaged)
    assert (code, "step-000003 is damaged" in said, "with --step 2" in said) == (2, True, True)
    assert not (averaged / "exports").exists()
    assert command("export", averaged, "--step", "2", "--output", tmp_path / "a.safetensors")[0] == 0
    code, said = command("report", averaged, "--map")
    assert (code, "step-000003 is damaged" in said, "step-000002 is the newest that is whole" in said) == (2, True, True)


def test_a_damaged_adapter_is_used_by_no_command(averaged, command, config_file, wan, tmp_path):
    path = averaged / ADAPTER
    uses = {
        "verify": ("verify", path),
        "verify on its base": ("verify", path, "--base", wan),
        "merge": ("merge", wan, path, "--output", tmp_path / "merged"),
        "sample": ("sample", path, "--base", wan, "--prompt", "a", "--steps", "2", "--output", tmp_path / "a.mp4"),
        "sample a run": ("sample", averaged, "--steps", "2", "--output", tmp_path / "b.mp4"),
        "init": ("fit", config_file(), "--output_dir", tmp_path / "next", "--init_adapter", path),
        "push": ("push", averaged, "--repo", "me/x", "--dry-run"),
    }
    for name, words in uses.items():
        for bit in some_bits(path, 4, seed=len(name)):
            with flipped(path, bit):
                code, said = command(*words)
            assert code == 2, (name, bit)
            assert any(f"{path}{what}" in said for what in (" is damaged", " can't be read", ": it is not a safetensors file"))
            assert "Traceback" not in said
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob("*.mp4"))
    for words in (uses["verify"], uses["merge"], uses["push"]):
        assert command(*words)[0] == 0


def test_each_of_several_adapters_is_looked_at(averaged, command, tmp_path):
    second = averaged / "adapters" / "adapter-000002.safetensors"
    harm(second)
    code, said = command("sample", averaged, "--at", "1,2", "--steps", "2", "--output", tmp_path / "a.mp4")
    assert (code, f"{second} is damaged" in said) == (2, True)
    shutil.rmtree(averaged / "checkpoints" / "step-000002")
    code, said = command("export", averaged, "--step", "2")
    assert (code, f"{second} is damaged" in said) == (2, True)


def test_a_file_that_another_program_changed_is_named_as_that(averaged, command, tmp_path):
    """Its digest is none any more; without one it is a file like any other."""
    path = tmp_path / "a.safetensors"
    with safe_open(averaged / ADAPTER, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor * 0.5 for name, tensor in load_file(averaged / ADAPTER).items()}
    save_file(tensors, path, metadata=metadata)
    code, said = command("verify", path)
    assert code == 2
    assert "if a program changed it on purpose, save it without crepatrain.digest" in said
    save_file(tensors, path, metadata={key: value for key, value in metadata.items() if key != "crepatrain.digest"})
    assert command("verify", path)[0] == 0


def test_a_whole_transformer_is_sampled_and_pushed_only_as_it_was_written(config_file, command, tmp_path, wan):
    run = train(config_file, model_type="full", max_train_steps=1, **of(wan) | {"model_family": "wan"})
    folder = run / "transformer"
    assert names(folder) == ["config.json", "diffusion_pytorch_model.safetensors", "manifest.json"]
    for words in (
        ("sample", run, "--steps", "2", "--prompt", "a", "--output", tmp_path / "a.mp4"),
        ("push", run, "--repo", "me/x", "--dry-run"),
    ):
        for path in sorted(folder.iterdir()):
            for bit in some_bits(path, 2):
                with flipped(path, bit):
                    code, said = command(*words)
                assert code == 2
                assert f"{folder} is damaged: " in said
                assert f"`crepatrain export {run}`" in said
    assert command("export", run)[0] == 0
    exported = next((run / "exports").iterdir())
    single = next(exported.glob("*.safetensors"))
    with safe_open(single, framework="pt") as file:
        assert file.metadata()["crepatrain.digest"].startswith("blake2b:")
    assert (exported / "transformer" / "manifest.json").is_file()


def test_a_damaged_cache_is_written_anew_and_the_run_is_the_same(config_file, command, tmp_path):
    common = {"max_train_steps": 2, "cache_dir": str(tmp_path / "cache")}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), **common)
    entries = sorted((tmp_path / "cache").rglob("*.safetensors"))
    before = [entry.read_bytes() for entry in entries]
    for entry in entries[::2]:
        harm(entry)
    run = tmp_path / "again"
    assert command("fit", config_file(output_dir=str(run), **common))[0] == 0
    assert [entry.read_bytes() for entry in entries] == before
    expect_same_run(whole, run)


def test_the_tensors_of_a_damaged_entry_are_never_trained_on(config_file, command, tmp_path):
    """Where its size and time stay as they were, a reader finds it, and the next start writes it."""
    common = {"max_train_steps": 3, "cache_dir": str(tmp_path / "cache")}
    for name in ("first", "second"):
        train(config_file, output_dir=str(tmp_path / name), **common)  # after the second every entry is known to be whole
    entry = next(iter((tmp_path / "cache" / "latents").rglob("*.safetensors")))
    times = entry.stat().st_mtime_ns
    harm(entry)
    os.utime(entry, ns=(times, times))
    path = config_file(output_dir=str(tmp_path / "third"), num_train_epochs=1, max_train_steps=..., cache_dir=common["cache_dir"])
    code, said = command("fit", path)
    assert code == 2
    assert f"cache entry {entry} is damaged" in said
    assert "run the same command again, which writes it again" in said
    assert command("fit", path)[0] == 0
