"""A tiny real checkpoint, real clips, and a config that trains on them in seconds."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from crepatrain.config.plan import Plan
    from crepatrain.families.base import Family
    from crepatrain.screen import Screen
    from crepatrain.training.context import Context

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_apart(tmp_path_factory: pytest.TempPathFactory):
    """No test reads or writes the user's own caches, and none reaches for the network."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("xdg"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Two processes test at once; with more threads than cores the tiny models spend their time waiting for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def tiny_family(name: str = "wan", size: str = "tiny", **options: Any) -> "Family":
    """A family as one of its tiny checkpoints is.

    Args:
        options: task and expert, as `get_family` takes them.
    """
    from crepatrain.families import family_class, get_family

    return get_family(name, family_class(name).tiny[size].checkpoint, **options)


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


def context_of(plan: "Plan", screen: "Screen | None" = None, device: str = "cpu") -> "Context":
    """What a command works with, on a quiet screen."""
    from crepatrain.console import Screen
    from crepatrain.stopping import StopSignal
    from crepatrain.training.context import Context

    return Context(plan, screen or Screen(quiet=True), torch.device(device), StopSignal())


def render_clip(path: Path, *, frames: int = 20, height: int = 96, width: int = 160, fps: int = 16, seed: int = 0) -> None:
    """A moving textured square, as H.264."""
    generator = np.random.default_rng(seed)
    background = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
    square = generator.integers(0, 255, (24, 24, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            picture = background.copy()
            left, top = (index * 3) % (width - 24), (index * 2) % (height - 24)
            picture[top : top + 24, left : left + 24] = square
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def render_image(path: Path, *, height: int = 96, width: int = 160, seed: int = 0) -> None:
    """Coloured blocks, in the format of the file's name."""
    blocks = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)).save(path)


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


def tiny_values(wan: Path, clips: Path, output_dir: Path, factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config that trains the tiny Wan with CREPA for a few steps; its caches are shared by all tests."""
    return {
        "model_family": "wan",
        "pretrained_model_name_or_path": str(wan),
        "train_data": str(clips),
        "output_dir": str(output_dir),
        "cache_dir": str(factory.getbasetemp() / "cache"),
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "max_train_steps": 3,
        "mixed_precision": "no",
        "dataloader_num_workers": 0,
        "lora_rank": 4,
        "learning_rate": 1e-3,
        "crepa_enabled": True,
        "crepa_encoder": str(wan / "encoder"),
        "crepa_encoder_image_size": "grid",
    }


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
