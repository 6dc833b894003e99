"""What is seen of windows before they are trained."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from common import Listening, context_of, render_clip
from PIL import Image

from crepatrain.config.plan import Plan, read_plan
from crepatrain.data.decode import FrameReader
from crepatrain.errors import UserError
from crepatrain.preparing import window_frames
from crepatrain.preparing.inspection import WindowRow, inspect, mark, pixel_warnings, without_caption
from crepatrain.preparing.preflight import Dataset, read_dataset


def moving(frames: int = 9, level: int = 120, noise: int = 0) -> torch.Tensor:
    """A square that moves over a plain picture."""
    clip = torch.full((frames, 3, 64, 96), level, dtype=torch.uint8)
    for index in range(frames):
        clip[index, :, 10:30, 5 * index : 5 * index + 20] = 250
    generator = torch.Generator().manual_seed(0)
    return (clip + torch.randint(0, noise + 1, clip.shape, generator=generator)).clamp(max=255).to(torch.uint8)


def test_a_moving_clip_has_no_warning():
    assert pixel_warnings(moving()) == ()
    assert pixel_warnings(moving(1)) == (), "nor has an image"


def test_frozen_clips_are_named_also_with_noise():
    still = moving()[:1].expand(9, -1, -1, -1)
    noisy = (still + torch.randint(0, 5, still.shape, generator=torch.Generator().manual_seed(1))).to(torch.uint8)
    assert pixel_warnings(still) == pixel_warnings(noisy) == ("frozen: nothing moves",)


def test_black_frames_are_counted():
    clip = moving()
    clip[:3] = 3
    assert pixel_warnings(clip) == ("black: 3 of 9 frames",)


def test_copies_have_like_marks_and_others_not():
    clip = torch.randint(0, 256, (9, 3, 8, 12), generator=torch.Generator().manual_seed(0)).float()
    clip = torch.nn.functional.interpolate(clip, size=(64, 96), mode="bicubic").clamp(0, 255).to(torch.uint8)
    brighter = (clip.float() * 0.9 + 20).to(torch.uint8)
    other = clip.flip(-1)
    assert (mark(clip) != mark(brighter)).sum() <= 6
    assert (mark(clip) != mark(other)).sum() > 40


def write(path: Path, pictures: list[np.ndarray], crf: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A good clip, a copy of it in other bytes, one that is frozen, one that is tall and small, and one without a caption."""
    root = tmp_path_factory.mktemp("inspected")
    coarse = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    scene = np.array(Image.fromarray(coarse).resize((160, 96), Image.Resampling.BICUBIC))
    pictures = [np.ascontiguousarray(np.roll(scene, 3 * index, axis=1)) for index in range(18)]
    write(root / "a.mp4", pictures, 20)
    write(root / "copy.mp4", pictures, 32)
    write(root / "frozen.mp4", [np.ascontiguousarray(scene[:, ::-1])] * 18, 28)
    render_clip(root / "tall.mp4", frames=9, height=64, width=32, seed=5)
    render_clip(root / "silent.mp4", frames=9, seed=6)
    for name in ("a", "copy", "frozen", "tall"):
        (root / f"{name}.txt").write_text("the same words" if name != "tall" else "word " * 700, encoding="utf-8")
    return root


@pytest.fixture
def look(config_file, folder) -> Callable[..., tuple[Plan, Dataset, list[WindowRow]]]:
    def command(**changes: Any) -> tuple[Plan, Dataset, list[WindowRow]]:
        values = {"height": 64, "width": 96, "num_frames": 9, "fps": 16, "missing_captions": "empty", **changes}
        plan = read_plan(config_file(train_data=str(folder), **values))
        context = context_of(plan, Listening())
        dataset = read_dataset(context)
        return plan, dataset, inspect(context, dataset)

    return command


def test_each_window_says_what_is_done_and_what_is_wrong(look, folder):
    plan, dataset, rows = look()
    found = {Path(row.clip).stem: row for row in rows}
    assert len(rows) == len(dataset.clips.windows)
    assert found["a"].warnings == ("3 clips have this caption",)
    assert found["copy"].warnings[1] == "shows the same as a.mp4 frames 9-17"
    assert "frozen: nothing moves" in found["frozen"].warnings
    assert found["tall"].warnings[:2] == ("cropped: 33% of the picture is left", "enlarged 3 times")
    assert "and 512 are read" in found["tall"].warnings[2]
    assert found["silent"].warnings == ("no caption",)
    assert without_caption(plan) == [str(folder / "silent.mp4")]
    assert (found["tall"].kept, found["tall"].enlarged, found["tall"].bucket) == (0.333, 3.0, "9 x 64 x 96")
    second = [row for row in rows if Path(row.clip).stem == "a"][1]
    assert (second.first, second.last, second.frames, second.start) == (9, 17, 9, 0.562)
    json.dumps([row.plain() for row in rows])


def test_the_frames_are_those_that_are_trained(look, folder):
    """To the bit what the encoder is given, with a crop of its own for every window."""
    plan, dataset, _ = look(crop="random")
    seen: list[torch.Tensor] = []
    inspect(context_of(plan, Listening()), dataset, lambda _window, frames: seen.append(frames))
    for window, frames in zip(dataset.clips.windows, seen, strict=True):
        size = window.bucket.height, window.bucket.width
        assert torch.equal(frames, FrameReader().read(window.clip, window.frames, size, window.crop))


def test_a_disk_that_does_not_answer_is_named(look, monkeypatch):
    plan, dataset, _ = look()
    answers = threading.Event()
    monkeypatch.setattr(window_frames, "PATIENCE", 0.1)
    monkeypatch.setattr(FrameReader, "read", lambda *_: answers.wait())
    try:
        with pytest.raises(UserError, match=r"nothing could be read of it for 0\.1 seconds"):
            inspect(context_of(plan, Listening()), dataset)
    finally:
        answers.set()
