"""A tiny real checkpoint, real clips, and a config that trains on them in seconds."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import render_clip, render_image, tiny_values

# A comparison in a module of helpers explains what differs, as one in a test does.
pytest.register_assert_rewrite("runs")


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_apart(tmp_path_factory: pytest.TempPathFactory):
    """No test reads or writes the user's own caches, and none reaches for the network."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("xdg"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Two processes test at once; with more threads than cores the tiny models spend their time waiting for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives a tiny random pipeline folder of a family and variant, with `encoder/` beside its parts; not to be changed."""
    from crepatrain.families import family_class
    from crepatrain.families.random import write_random_pipeline

    root = tmp_path_factory.mktemp("checkpoints")

    def folder(family: str = "wan", size: str = "tiny") -> Path:
        path = root / f"{family}-{size}"
        if not path.exists():
            write_random_pipeline(family_class(family), path, family_class(family).tiny[size])
        return path

    return folder


@pytest.fixture(scope="session")
def wan(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A tiny random Wan pipeline folder with `encoder/` beside its parts."""
    return tiny_checkpoint("wan", "tiny")


@pytest.fixture(scope="session")
def clips_and_images(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips and two captioned images."""
    folder = Path(shutil.copytree(clips, tmp_path_factory.mktemp("mixed") / "mixed"))
    for index, suffix in enumerate((".png", ".jpg")):
        render_image(folder / f"image-{index}{suffix}", seed=index)
        (folder / f"image-{index}.txt").write_text(f"coloured blocks, number {index}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short captioned clips."""
    folder = tmp_path_factory.mktemp("clips")
    for index in range(3):
        render_clip(folder / f"clip-{index}.mp4", seed=index)
        (folder / f"clip-{index}.txt").write_text(f"a square moves, number {index}\n", encoding="utf-8")
    return folder


@pytest.fixture
def values(wan: Path, clips: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of `tiny_values`."""
    return tiny_values(wan, clips, tmp_path / "run", tmp_path_factory)


@pytest.fixture
def config_file(tmp_path: Path, values: dict[str, Any]) -> Callable[..., Path]:
    """Writes the config with changes; a key changed to `...` is left out."""

    def write(**changes: Any) -> Path:
        merged = {key: value for key, value in (values | changes).items() if value is not ...}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(merged), encoding="utf-8")
        return path

    return write
