"""Entries of the caches that are damaged, or something else than a run needs, are written anew, and others are not."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import context_of
from damage import flipped, harm, some_bits
from safetensors.torch import load_file, save_file

from crepatrain.config.plan import read_plan
from crepatrain.data.cache import CacheStore
from crepatrain.errors import UserError
from crepatrain.preparing import entries
from crepatrain.preparing.precompute import Caches, filled_caches
from crepatrain.preparing.preflight import read_dataset


class Notes:
    """A screen of which the notes are kept."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.shown: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def say(self, text: str = "") -> None:
        pass

    def progress(self, what: str, total: int) -> Any:
        self.shown.append(what)
        return contextlib.nullcontext(lambda: None)

    @property
    def damaged(self) -> list[str]:
        return [note for note in self.notes if "damaged" in note]


@pytest.fixture
def fill(config_file, clips, tiny_checkpoint, tmp_path) -> Callable[..., tuple[Caches, Notes]]:
    def command(family: str = "wan", size: str = "tiny", **changes: Any) -> tuple[Caches, Notes]:
        of = {"model_family": family, "pretrained_model_name_or_path": str(tiny_checkpoint(family, size))}
        common = {"train_data": str(clips), "cache_dir": str(tmp_path / "cache"), "unusable_clips": "skip"}
        screen = Notes()
        context = context_of(read_plan(config_file(**{**common, **of, **changes})), screen)  # type: ignore[arg-type]
        return filled_caches(context, read_dataset(context), teacher=context.plan.config.crepa.crepa_enabled), screen

    return command


def contents(store: CacheStore) -> dict[Path, tuple[bytes, int]]:
    """Of every entry what it holds, and when it was written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in store.root.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("family", "size", "changes"),
    [
        ("wan", "tiny", {"crepa_cache_dtype": "int8", "validation_prompts": ["a square", ""]}),
        ("wan", "tiny-i2v", {}),
        ("wan", "tiny-ti2v", {"task": "i2v", "vae_dtype": "bfloat16"}),
        ("wan", "tiny-i2v-a14b", {"wan_expert": "low"}),
        ("ltxvideo", "tiny", {"task": "i2v"}),
        ("sanavideo", "tiny", {"validation_prompts": ["a square"]}),
        ("kandinsky5_video", "tiny", {"task": "i2v"}),
        ("kandinsky5_video", "tiny", {"validation_prompts": ["a square"]}),
    ],
)
def test_what_was_just_written_is_what_is_needed(fill, family, size, changes):
    sizes = {"num_frames": 9, "height": 128, "width": 192, "fps": 16, "crepa_enabled": False} if family != "wan" else {}
    first, _ = fill(family, size, **sizes, **changes)
    before = contents(first.store)
    assert before
    for _ in range(2):
        _, screen = fill(family, size, **sizes, **changes)
        assert screen.damaged == []
        assert contents(first.store) == before


@pytest.mark.parametrize("kind", ["text", "latents", "teacher"])
def test_a_bit_anywhere_in_an_entry_has_it_written_anew(fill, kind):
    """The run then reads what it would have read."""
    caches, _ = fill()
    whole = contents(caches.store)
    path = next(iter((caches.store.root / kind).rglob("*.safetensors")))
    for bit in some_bits(path, 3):
        content = bytearray(whole[path][0])
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        os.utime(path, ns=(0, 1_000_000_000 + bit))
        _, screen = fill()
        assert len(screen.damaged) == 1
        assert f"cache entry {path} is damaged (" in screen.damaged[0]
        assert screen.damaged[0].endswith("it is written anew")
        after = contents(caches.store)
        assert {name: held for name, (held, _) in after.items()} == {name: held for name, (held, _) in whole.items()}
        others = [name for name in whole if name != path]
        assert all(after[name] == whole[name] for name in others), "what is whole is not written again"


def make_other(path: Path, others: list[Path], how: str) -> None:
    tensors = load_file(path)
    name = next(iter(tensors))
    if how == "of another entry":
        shutil.copyfile(next(other for other in others if other != path), path)
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[:-8])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        changed = {
            "another shape": lambda: {**tensors, name: torch.cat([tensors[name]] * 2, dim=-1)},
            "fewer dimensions": lambda: {**tensors, name: tensors[name][0].clone()},
            "another dtype": lambda: {**tensors, name: tensors[name].double()},
            "another name": lambda: {"x": tensors[name]},
            "one more": lambda: {**tensors, "x": torch.zeros(2)},
            "nothing": dict,
        }[how]()
        save_file(changed, path)  # without a digest, as of an earlier version


_HOW = (
    "another shape",
    "fewer dimensions",
    "another dtype",
    "another name",
    "one more",
    "nothing",
    "of another entry",
    "cut off",
    "empty",
)


@pytest.mark.parametrize(
    ("kind", "how"),
    [*(("latents", how) for how in _HOW), ("image", "another shape"), ("text", "another shape"), ("teacher", "another dtype")],
)
def test_an_entry_of_another_form_is_written_anew(fill, kind, how):
    kept = {"size": "tiny-ti2v", "task": "i2v"} if kind == "image" else {}
    caches, _ = fill(**kept)
    whole = contents(caches.store)
    found = sorted((caches.store.root / kind).rglob("*.safetensors"))
    make_other(found[0], found, how)
    _, screen = fill(**kept)
    assert [note for note in screen.damaged if str(found[0]) in note] == screen.damaged != []
    assert found[0].read_bytes() == whole[found[0]][0]


def test_many_damaged_entries_make_few_lines(fill):
    caches, _ = fill(max_train_steps=1)
    paths = sorted(contents(caches.store))
    assert len(paths) > 6
    for path in paths:
        harm(path)
    _, screen = fill()
    assert len(screen.damaged) == 6
    assert screen.damaged[-1] == f"{len(paths) - 5} more cache entries are damaged: they are written anew"
    assert fill()[1].damaged == []


def test_entries_of_an_earlier_version_stay(fill):
    """They have no digest; their form is what is looked at."""
    caches, _ = fill()
    for path in contents(caches.store):
        save_file(load_file(path), path)
    before = contents(caches.store)
    for _ in range(2):
        assert fill()[1].damaged == []
        assert contents(caches.store) == before
    assert caches.store.read("text", caches.empty_text)


def test_what_was_found_whole_is_not_read_again_until_it_changes(fill, monkeypatch):
    caches, _ = fill()
    read: list[str] = []
    check = CacheStore.expect_whole

    def counted(store, kind, key):
        read.append(key)
        check(store, kind, key)

    monkeypatch.setattr(CacheStore, "expect_whole", counted)
    assert len(fill()[1].damaged) == 0
    assert sorted(read) == sorted(path.stem for path in contents(caches.store))
    read.clear()
    fill()
    assert read == []
    path = next(iter(contents(caches.store)))
    os.utime(path, ns=(0, 1))
    fill()
    assert read == [path.stem]


@pytest.mark.parametrize("memo", ["", "{", "[]", "5", '{"text/x": 5}'])
def test_a_damaged_memory_of_it_is_forgotten(fill, memo):
    caches, _ = fill()
    file = caches.store.root / "checked.json"
    fill()
    assert set(json.loads(file.read_text())) == {f"{path.parts[-3]}/{path.stem}" for path in contents(caches.store)}
    file.write_text(memo)
    path = next(iter(contents(caches.store)))
    harm(path)
    assert len(fill()[1].damaged) == 1


def test_progress_is_shown_where_it_takes_long(fill, monkeypatch):
    fill()
    assert "checking cache entries" not in fill()[1].shown
    monkeypatch.setattr(entries, "_LONG", 1)
    caches, _ = fill()
    (caches.store.root / "checked.json").unlink()
    assert "checking cache entries" in fill()[1].shown


@pytest.mark.parametrize("kind", ["text", "latents", "teacher"])
def test_a_reader_finds_damage_that_came_later(fill, kind):
    """Also where size and time are as they were: it is removed, so that the next run writes it."""
    caches, _ = fill()
    store = CacheStore(caches.store.root)
    path = min((store.root / kind).rglob("*.safetensors"))
    for bit in some_bits(path, 10):
        content = path.read_bytes()
        with contextlib.suppress(FileNotFoundError), flipped(path, bit), pytest.raises(UserError) as error:
            CacheStore(store.root).read(kind, path.stem)
        assert f"cache entry {path} is damaged (" in str(error.value)
        assert "run the same command again, which writes it again" in str(error.value)
        path.write_bytes(content)
    harm(path)
    with pytest.raises(UserError):
        store.read(kind, path.stem)
    assert not path.exists()
