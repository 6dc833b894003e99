"""What tests of several rooms make: tiny families, clips, images, configs."""

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from crepatrain.console import Screen
from crepatrain.data.clip import Rule

if TYPE_CHECKING:
    from crepatrain.config.plan import Plan
    from crepatrain.families.base import Family
    from crepatrain.preparing.context import Context
    from crepatrain.specs import Variant

# Of the run that the fixture `trained` makes.
PROMPTS = ["a square", "another square moves"]


def tiny_family(name: str = "wan", size: str = "tiny", **options: Any) -> "Family":
    """A family as one of its tiny checkpoints is.

    Args:
        options: task and expert, as `get_family` takes them.
    """
    from crepatrain.families import family_class, get_family

    return get_family(name, family_class(name).tiny[size].checkpoint, **options)


def tiny_variants() -> "list[tuple[str, str, Variant]]":
    """Family, size and variant of the tiny checkpoints: of each family the first of every set of tasks."""
    from crepatrain.families import family_class
    from crepatrain.specs import FAMILIES

    found = {}
    for name, spec in FAMILIES.items():
        for size, shapes in family_class(name).tiny.items():
            variant = spec.variant(shapes.checkpoint, None)
            found.setdefault((name, variant.tasks), (name, size, variant))
    return list(found.values())


RULE = Rule((9, 64, 96), 16.0)
"""For clips that no test cuts."""


class Listening(Screen):
    """A quiet screen that keeps its notes and lists."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []
        self.lists: dict[str, dict[str, str]] = {}

    def rows(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        self.lists[title] = dict(rows)

    def note(self, text: str) -> None:
        self.notes.append(text)


def context_of(plan: "Plan", screen: Screen | None = None, device: str = "cpu") -> "Context":
    """What a command works with, on a quiet screen."""
    from crepatrain.preparing.context import Context
    from crepatrain.stopping import StopSignal

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


def frames_of(path):
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow larger; the write then fails as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
