"""Image files that move are clips; those that do not are stills, whatever their suffix."""

from pathlib import Path

import numpy as np
import pytest
from common import RULE
from PIL import Image
from video_files import encode, numbered

from crepatrain.data.clip import Clip, Unreadable
from crepatrain.data.decode import FrameReader, probe
from crepatrain.data.digests import content_digest

DURATIONS = [40, 40, 120, 40, 200, 40, 40, 40]


def pictures(path: Path, frames: tuple[int, ...]) -> np.ndarray:
    clip = Clip(path, "", content_digest(path), probe(path), RULE)
    return FrameReader().read(clip, frames, (96, 160)).permute(0, 2, 3, 1).numpy()


def save(path: Path, count: int, **options) -> None:
    first, *others = [Image.fromarray(numbered(number)) for number in range(count)]
    first.save(path, **({"save_all": True, "append_images": others, "duration": DURATIONS[:count]} if others else {}), **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.webp", {"lossless": True}),
        ("a.png", {}),
        ("a.apng", {"format": "PNG"}),
        ("hidden.png", {"default_image": True}),
    ],
)
def test_every_picture_of_a_moving_image_is_a_frame(tmp_path: Path, name: str, options: dict):
    path, hidden = tmp_path / name, int("default_image" in options)
    if hidden:
        first, *others = [Image.fromarray(numbered(number)) for number in range(9)]
        first.save(path, save_all=True, append_images=others, duration=DURATIONS, default_image=True)
    else:
        save(path, 8, **options)
    info = probe(path)
    assert (info.frames, info.height, info.width, info.still) == (8, 96, 160, False)
    expected = np.cumsum([0, *DURATIONS[:-1]]) / 1000
    if not hidden:
        assert list(info.timestamps) == pytest.approx(list(expected))
    for number, picture in zip((0, 3, 7), pictures(path, (0, 3, 7)), strict=True):
        assert np.array_equal(picture, numbered(number + hidden))


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.webp", {"lossless": True}), ("a.png", {}), ("a.tiff", {}), ("a.TIF", {"format": "TIFF"}), ("a.gif", {})],
)
def test_one_picture_is_a_still(tmp_path: Path, name: str, options: dict):
    save(tmp_path / name, 1, **options)
    info = probe(tmp_path / name)
    assert (info.frames, info.still) == (1, True)
    assert info.fps == 0


def test_a_gif_moves(tmp_path: Path):
    save(tmp_path / "a.gif", 8)
    info = probe(tmp_path / "a.gif")
    assert (info.frames, info.still) == (8, False)


def test_a_video_of_one_frame_is_no_still(tmp_path: Path):
    encode(tmp_path / "a.mp4", "libx264", {}, ticks=range(1))
    assert not probe(tmp_path / "a.mp4").still


def test_pages_are_not_frames(tmp_path: Path):
    save(tmp_path / "a.tiff", 3)
    with pytest.raises(Unreadable, match="several pages"):
        probe(tmp_path / "a.tiff")


def test_a_phones_photo_with_a_second_picture_inside_is_its_first(tmp_path: Path):
    first, second = (Image.fromarray(numbered(number)) for number in range(2))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second], quality=95)
    assert probe(tmp_path / "a.jpg").still
    assert np.abs(pictures(tmp_path / "a.jpg", (0,))[0].astype(int) - numbered(0)).mean() < 12
