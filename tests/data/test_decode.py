"""Reading frames: which ones, and what is in them."""

import contextlib
import itertools
import math
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from common import RULE
from hard_clips import STEP
from PIL import Image
from torch import Tensor

from crepatrain.data.clip import Clip, ClipInfo, Unreadable
from crepatrain.data.decode import FrameReader, probe, read_first
from crepatrain.data.digests import content_digest
from crepatrain.data.frames import crop_resize, resample_frames
from crepatrain.data.pictures import is_image


def render_numbers(path: Path, milliseconds: Sequence[int], *, width: int = 160, height: int = 64) -> None:
    """Frames whose brightness tells their number, shown at these times; with B-frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"bf": "3", "crf": "4"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number, time in enumerate(milliseconds):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 20 + STEP * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def numbers_in(frames: Tensor) -> list[int]:
    return [round((value - 20) / STEP) for value in frames.float().mean(dim=(1, 2, 3)).tolist()]


def read_frames(path: Path, frames: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Some frames of a file that was looked at just before."""
    return FrameReader().read(Clip(path, "", content_digest(path), probe(path), RULE), frames, size)


def even(count: int, fps: float) -> list[int]:
    return [round(1000 * number / fps) for number in range(count)]


@pytest.fixture(scope="module")
def thirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 numbered frames at 30 fps."""
    path = tmp_path_factory.mktemp("numbered") / "thirty.mp4"
    render_numbers(path, even(36, 30))
    return path


def test_probe_tells_size_and_rate(thirty: Path):
    info = probe(thirty)
    assert (info.frames, info.height, info.width) == (36, 64, 160)
    assert info.fps == pytest.approx(30, rel=1e-2)
    assert info.timestamps[0] == 0
    assert list(info.timestamps) == sorted(info.timestamps)


@pytest.mark.parametrize(
    "wanted", [tuple(range(36)), (0,), (35,), (3, 17, 18, 35), (1, 3, 4, 6, 8, 9, 11, 13, 15, 16, 18, 20, 22)]
)
def test_the_frames_asked_for_are_read(thirty: Path, wanted: tuple[int, ...]):
    frames = read_frames(thirty, wanted, (64, 160))
    assert frames.shape == (len(wanted), 3, 64, 160)
    assert frames.dtype == torch.uint8
    assert numbers_in(frames) == list(wanted)


def test_a_file_that_is_gone_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "gone.mp4")
    with pytest.raises(OSError, match="No such file"):
        read_first(tmp_path / "gone.mp4", (64, 160))


def nearest(info: ClipInfo, fps: float) -> list[int]:
    """Literally: for every tick the nearest frame, each once."""
    ticks = int((info.timestamps[-1] - info.timestamps[0]) * fps + 0.5) + 1
    found: list[int] = []
    for tick in range(ticks):
        distances = [abs(time - info.timestamps[0] - tick / fps) for time in info.timestamps]
        best = max(index for index, distance in enumerate(distances) if distance <= min(distances) + 1e-9)
        if best not in found:
            found.append(best)
    return found


@pytest.mark.parametrize(("source", "wanted"), [(30, 16), (60, 16), (24, 16), (25, 24), (16, 16), (50, 8), (29.97, 24)])
def test_a_faster_clip_is_resampled(source: float, wanted: float):
    info = ClipInfo(64, 64, tuple(round(index / source, 4) for index in range(90)))
    chosen = resample_frames(info, wanted)
    assert chosen == nearest(info, wanted)
    assert len(chosen) == pytest.approx(90 * wanted / source, abs=1)
    assert all(b > a for a, b in itertools.pairwise(chosen))
    for tick, frame in enumerate(chosen[:-1]):  # the last tick may lie behind the last frame
        assert abs(info.timestamps[frame] - tick / wanted) <= 0.5 / source + 1e-3


@pytest.mark.parametrize(("source", "wanted"), [(8, 16), (12, 16), (15, 16), (10, 24), (1, 30)])
def test_a_slower_clip_is_taken_frame_by_frame(source: float, wanted: float):
    info = ClipInfo(64, 64, tuple(round(index / source, 4) for index in range(40)))
    assert resample_frames(info, wanted) == list(range(40))


def test_a_clip_that_begins_late_is_resampled_from_its_own_start():
    times = [index / 29.97 for index in range(60)]
    late = ClipInfo(64, 64, tuple(time + 7.25 for time in times))
    assert resample_frames(late, 16) == resample_frames(ClipInfo(64, 64, tuple(times)), 16)


def test_a_single_frame_is_itself():
    info = ClipInfo(64, 64, (0.0,))
    assert info.fps == 0
    assert resample_frames(info, 16) == [0]


def test_thirty_to_sixteen_from_the_file(thirty: Path):
    chosen = resample_frames(probe(thirty), 16)
    assert chosen[:6] == [0, 2, 4, 6, 8, 9] or chosen[:6] == [0, 2, 4, 6, 7, 9]
    assert numbers_in(read_frames(thirty, tuple(chosen), (64, 160))) == chosen


def test_a_variable_rate_is_followed(tmp_path: Path):
    """Ten frames at 20 fps, then ten at 5 fps: half a second becomes five frames, two seconds stay ten."""
    times = [50 * number for number in range(10)] + [500 + 200 * number for number in range(10)]
    render_numbers(tmp_path / "variable.mp4", times)
    info = probe(tmp_path / "variable.mp4")
    assert [round(1000 * time) for time in info.timestamps] == pytest.approx(times, abs=2)
    chosen = resample_frames(info, 10)
    assert chosen == [0, 2, 4, 6, 8, *range(10, 20)]
    assert numbers_in(read_frames(tmp_path / "variable.mp4", tuple(chosen), (64, 160))) == chosen


def picture(height: int, width: int) -> Tensor:
    """[1, 3, H, W] uint8 with each pixel's coordinates, relative to the middle, in red and green."""
    y = torch.arange(height).view(-1, 1).expand(height, width) - (height - 1) / 2
    x = torch.arange(width).view(1, -1).expand(height, width) - (width - 1) / 2
    scale = 120 / max(height, width) * 2
    planes = torch.stack([128 + y * scale, 128 + x * scale, torch.full((height, width), 60.0)])
    return planes.round().clamp(0, 255).to(torch.uint8).unsqueeze(0)


@pytest.mark.parametrize(
    ("source", "size"),
    [((96, 160), (48, 48)), ((160, 96), (48, 80)), ((100, 100), (48, 96)), ((64, 64), (128, 128)), ((90, 160), (48, 80))],
)
def test_crop_resize_keeps_the_aspect_and_the_middle(source: tuple[int, int], size: tuple[int, int]):
    result = crop_resize(picture(*source), size)
    assert result.shape == (1, 3, *size)
    scale = 120 / max(source) * 2
    zoom = min(source[0] / size[0], source[1] / size[1])  # source pixels per pixel: one number for both axes
    inner = (slice(4, -4), slice(4, -4))
    y = (torch.arange(size[0]) - (size[0] - 1) / 2).view(-1, 1).expand(size)
    x = (torch.arange(size[1]) - (size[1] - 1) / 2).view(1, -1).expand(size)
    assert (result[0, 0].float() - (128 + y * zoom * scale))[inner].abs().max() < 1.6 + scale
    assert (result[0, 1].float() - (128 + x * zoom * scale))[inner].abs().max() < 1.6 + scale
    assert (result[0, 2] == 60).all()


@pytest.mark.parametrize("source", [(96, 160), (160, 96), (128, 128)])
@pytest.mark.parametrize("size", [(48, 48), (48, 80), (96, 64)])
def test_a_circle_stays_a_circle(source: tuple[int, int], size: tuple[int, int]):
    height, width = source
    y, x = torch.meshgrid(torch.arange(height) - height / 2 + 0.5, torch.arange(width) - width / 2 + 0.5, indexing="ij")
    inside = (y**2 + x**2 < 30**2).to(torch.uint8) * 255
    result = crop_resize(inside.expand(1, 3, height, width), size)[0, 0] > 127
    tall, wide = int(result.any(dim=1).sum()), int(result.any(dim=0).sum())
    assert abs(tall - wide) <= 2
    diameter = (tall + wide) / 2
    assert result.sum().item() == pytest.approx(math.pi * diameter**2 / 4, rel=0.08)


def test_the_same_size_is_untouched():
    frames = torch.randint(0, 256, (3, 3, 48, 80), dtype=torch.uint8)
    assert torch.equal(crop_resize(frames, (48, 80)), frames)


def test_a_crop_alone_moves_no_pixel():
    frames = torch.randint(0, 256, (2, 3, 48, 100), dtype=torch.uint8)
    assert torch.equal(crop_resize(frames, (48, 80)), frames[..., 10:90])


def test_clips_longer_than_a_chunk_are_in_order(tmp_path: Path):
    render_numbers(tmp_path / "long.mp4", even(39, 16))
    frames = read_frames(tmp_path / "long.mp4", tuple(range(39)), (32, 80))
    assert numbers_in(frames) == list(range(39))


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("av1.mp4", "av1", "yuv420p"),
        ("hevc-10bit.mp4", "hevc", "yuv420p10le"),
        ("vp9.webm", "vp9", "yuv420p"),
        ("animation.gif", "gif", "bgra"),
        ("variable-frame-rate.mp4", "h264", "yuv420p"),
        ("unordered-timestamps.mov", "h264", "yuv420p"),
    ],
)
def test_hard_clips_are_what_their_names_say(hard_clips: Path, name: str, codec: str, pixels: str):
    with av.open(str(hard_clips / name)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.codec.canonical_name, stream.codec_context.pix_fmt) == (codec, pixels)
        times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
    if name == "unordered-timestamps.mov":
        assert times != sorted(times)
    if name == "variable-frame-rate.mp4":
        gaps = [later - earlier for earlier, later in itertools.pairwise(sorted(times))]
        assert max(gaps) == 3 * min(gaps)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_applied(hard_clips: Path, degrees: int):
    path = hard_clips / f"rotated-{degrees}.mov"
    info = probe(path)
    with av.open(str(path)) as container:
        raw = next(container.decode(video=0))
    assert (raw.width > raw.height, -raw.rotation % 360) == (True, degrees)
    upright = torch.from_numpy(np.rot90(raw.to_ndarray(format="rgb24"), raw.rotation // 90).copy())
    assert (info.height, info.width) == tuple(upright.shape[:2])
    assert (info.height > info.width) == (degrees in {90, 270})
    frame = read_frames(path, (0,), (info.height, info.width))[0]
    assert (frame.permute(1, 2, 0).float() - upright.float()).abs().mean() < 3


@pytest.mark.parametrize(
    "name", ["variable-frame-rate.mp4", "unordered-timestamps.mov", "animation.gif", "av1.mp4", "hevc-10bit.mp4", "vp9.webm"]
)
def test_hard_clips_give_every_frame_in_the_order_of_its_time(hard_clips: Path, name: str):
    with av.open(str(hard_clips / name)) as container:
        shown = sorted(container.decode(video=0), key=lambda frame: frame.pts)
        expected = [frame.to_ndarray(format="rgb24").mean() for frame in shown]
    assert min(later - earlier for earlier, later in itertools.pairwise(expected)) > 4  # so that a wrong frame is noticed
    info = probe(hard_clips / name)
    assert info.frames == len(expected)
    frames = read_frames(hard_clips / name, tuple(range(info.frames)), (info.height, info.width))
    assert frames.float().mean(dim=(1, 2, 3)).tolist() == pytest.approx(expected, abs=2.5)


# Images


def shown(path: Path) -> np.ndarray:
    """An image as it is read at its own size, [H, W, 3]."""
    info = probe(path)
    frames = read_frames(path, (0,), (info.height, info.width))
    assert frames.shape == (1, 3, info.height, info.width)
    assert frames.dtype == torch.uint8
    return frames[0].permute(1, 2, 0).numpy()


@pytest.fixture
def colours() -> np.ndarray:
    """[48, 80, 3], smooth, with a gradient of its own in every channel and direction."""
    y, x = np.mgrid[0:48, 0:80]
    return np.stack([y * 5, x * 3, (x + y) * 2 % 256], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(
    ("suffix", "options", "off"),
    [
        (".png", {}, 0),
        (".bmp", {}, 0),
        (".webp", {"lossless": True}, 0),
        (".webp", {"quality": 95}, 6),
        (".jpg", {"quality": 95}, 3),
        (".jpeg", {"quality": 95}, 3),
        (".JPG", {"quality": 95, "progressive": True}, 3),
        (".PNG", {}, 0),
    ],
)
def test_an_image_is_a_clip_of_one_frame(tmp_path: Path, colours: np.ndarray, suffix: str, options: dict, off: int):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(colours).save(path, **options)
    assert is_image(path)
    info = probe(path)
    assert (info.frames, info.height, info.width, info.fps) == (1, 48, 80, 0)
    assert resample_frames(info, 16) == [0]
    difference = np.abs(shown(path).astype(int) - colours)
    assert difference.mean() <= off
    assert off or not difference.any()


def test_an_image_is_cropped_and_resized_as_a_clip_is(tmp_path: Path, colours: np.ndarray):
    path = tmp_path / "image.png"
    Image.fromarray(colours).save(path)
    frames = torch.from_numpy(colours).permute(2, 0, 1)[None]
    for size in ((32, 32), (96, 64), (48, 80)):
        assert torch.equal(read_frames(path, (0,), size), crop_resize(frames, size))


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_image_is_turned_as_its_camera_says(tmp_path: Path, colours: np.ndarray, orientation: int, suffix: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image{suffix}"
    Image.fromarray(colours).save(path, exif=exif)
    upright = UPRIGHT[orientation](colours)
    info = probe(path)
    assert (info.height, info.width) == upright.shape[:2]
    assert np.abs(shown(path).astype(int) - upright).mean() <= (0 if suffix == ".png" else 4)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_what_is_transparent_is_white(tmp_path: Path, suffix: str):
    pixels = np.zeros((48, 80, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[:, 20:40, 3], pixels[:, 40:, 3] = 128, 255
    path = tmp_path / f"image{suffix}"
    Image.fromarray(pixels).save(path, lossless=True)
    picture = shown(path)
    assert (picture[:, :20] == 255).all()
    assert np.abs(picture[:, 20:40].astype(int) - [227, 127, 127]).max() <= 1
    assert (picture[:, 40:] == [200, 0, 0]).all()


def test_a_transparent_colour_of_a_palette_is_white(tmp_path: Path):
    indices = np.zeros((48, 80), np.uint8)
    indices[:, 40:] = 1
    image = Image.fromarray(indices).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "image.png", transparency=0)
    picture = shown(tmp_path / "image.png")
    assert (picture[:, :40] == 255).all()
    assert (picture[:, 40:] == [40, 50, 60]).all()


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_a_grey_image_has_three_equal_channels(tmp_path: Path, colours: np.ndarray, mode: str):
    grey = Image.fromarray(colours).convert(mode)
    grey.save(tmp_path / "image.png")
    picture = shown(tmp_path / "image.png")
    assert (picture == np.array(grey.convert("L"))[..., None]).all()


def test_an_image_of_printers_colours_is_read(tmp_path: Path, colours: np.ndarray):
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "image.jpg", quality=95)
    assert np.abs(shown(tmp_path / "image.jpg").astype(int) - colours).mean() < 4


def test_a_grey_image_of_16_bits_keeps_its_greys(tmp_path: Path):
    grey = np.linspace(0, 65535, 48 * 80).reshape(48, 80).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "image.png")
    picture = shown(tmp_path / "image.png").astype(int)
    assert np.abs(picture - (grey / 257)[..., None]).max() <= 1


def test_a_colour_image_of_16_bits_keeps_its_colours(tmp_path: Path):
    deep = np.stack([np.linspace(0, 65535, 48 * 80).reshape(48, 80)] * 3, axis=-1).astype(np.uint16)
    with av.open(str(tmp_path / "image.png"), "w", format="image2") as container:
        stream = container.add_stream("png")
        stream.width, stream.height, stream.pix_fmt = 80, 48, "rgb48be"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(deep, format="rgb48le")))
        container.mux(stream.encode())
    picture = shown(tmp_path / "image.png").astype(int)
    assert np.abs(picture - deep / 257).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.02])
def test_a_truncated_image_is_refused(tmp_path: Path, suffix: str, kept: float):
    noise = np.random.default_rng(0).integers(0, 255, (96, 160, 3), dtype=np.uint8)
    path = tmp_path / f"image{suffix}"
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(Unreadable, match="no image, or is cut off"):
        probe(path)
    with pytest.raises(Unreadable):
        read_first(path, (96, 160))


def test_what_is_no_image_is_refused(tmp_path: Path):
    path = tmp_path / "image.png"
    path.write_text("these are words", encoding="utf-8")
    with pytest.raises(Unreadable, match="no image"):
        probe(path)
    path.write_bytes(b"")
    with pytest.raises(Unreadable, match="empty"):
        probe(path)
    with pytest.raises(FileNotFoundError):
        read_first(tmp_path / "gone.png", (16, 16))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damage_in_an_image_is_never_a_traceback(tmp_path: Path, colours: np.ndarray):
    draw = random.Random(0)
    for suffix in (".png", ".jpg", ".webp", ".bmp"):
        path = tmp_path / f"image{suffix}"
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(colours).save(path, **({"exif": exif} if suffix != ".bmp" else {}))
        content = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            for _ in range(3):
                damaged[draw.randrange(min(len(damaged), 400))] = draw.randrange(256)
            path.write_bytes(damaged)
            with contextlib.suppress(Unreadable):
                probe(path)
