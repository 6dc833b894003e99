"""Reading video and image files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import decord
import numpy as np
import torch
import torch.nn.functional as F
from av.container import InputContainer
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})

# Frames that are in memory at once at the file's own size.
_CHUNK = 16

decord.logging.set_level(decord.logging.QUIET)


def is_image(path: Path) -> bool:
    """Whether a file is one picture, by its name."""
    return path.suffix.lower() in IMAGE_SUFFIXES


class Unreadable(Exception):
    """A file that can't be decoded, with the reason."""


@dataclass(frozen=True)
class ClipInfo:
    """What a video or image file holds, after its rotation is applied.

    Attributes:
        timestamps: of every frame in seconds, ascending.
    """

    height: int
    width: int
    timestamps: tuple[float, ...]

    @property
    def frames(self) -> int:
        return len(self.timestamps)

    @property
    def fps(self) -> float:
        """The mean rate; 0 for a single frame."""
        span = self.timestamps[-1] - self.timestamps[0]
        return (self.frames - 1) / span if span > 0 else 0.0


def probe(path: Path) -> ClipInfo:
    """Decode a file from its first to its last frame.

    Raises:
        Unreadable: it has no video stream, or is damaged somewhere.
    """
    if path.stat().st_size == 0:
        raise Unreadable("the file is empty")
    if is_image(path):
        height, width = _picture(path).shape[:2]
        return ClipInfo(height, width, (0.0,))
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise Unreadable("it is no video, or is cut off") from error
    with container:
        if not container.streams.video:
            raise Unreadable("it has no video stream")
        timestamps = _decode_strictly(container)
    if not timestamps:
        raise Unreadable("it has no frames")
    height, width = next(_pictures(path, [0])).shape[1:3]
    return ClipInfo(height, width, tuple(round(t, 4) for t in sorted(timestamps)))


def _decode_strictly(container: InputContainer) -> list[float]:
    """The time of every frame; damage that a decoder would rather conceal ends it."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    stream.codec_context.options = {"err_detect": "explode"}
    try:
        return [float(frame.time or 0.0) for frame in container.decode(stream)]
    except av.FFmpegError as error:
        raise Unreadable("it is damaged: it can't be decoded to its end") from error


def _pictures(path: Path, frames: Sequence[int]) -> Iterator[np.ndarray]:
    """Some frames of a file as they are shown, [n, H, W, 3] uint8, a few at a time."""
    if is_image(path):
        yield _picture(path)[None]
        return
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        for start in range(0, len(frames), _CHUNK):
            yield reader.get_batch(list(frames[start : start + _CHUNK])).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        if "from_size == to_size" not in str(error):
            raise Unreadable("it can't be decoded") from error
        try:
            yield _narrow_pictures(path, frames)
        except (av.FFmpegError, KeyError, OSError) as gone:
            raise Unreadable("it can't be decoded") from gone


def _picture(path: Path) -> np.ndarray:
    """An image as it is shown, [H, W, 3] uint8, on white where it is transparent."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255
                upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).astype(np.uint8))
            upright = upright.convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise Unreadable("it is no image, or is cut off") from error
    white = Image.new("RGBA", upright.size, "white")
    return np.array(Image.alpha_composite(white, upright).convert("RGB"))


def _narrow_pictures(path: Path, frames: Sequence[int]) -> np.ndarray:
    """What decord can't copy: rows that are padded to four thirds of their length, as those of widths 48, 96 and 144 are."""
    pictures: dict[int, np.ndarray] = {}
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in frames:
                pictures[number] = np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))
    return np.stack([pictures[number] for number in frames])


def resample_frames(info: ClipInfo, fps: float) -> list[int]:
    """The frames nearest to the ticks of a clock of `fps`, each at most once: a slower clip is taken frame by frame."""
    first, last = info.timestamps[0], info.timestamps[-1]
    chosen: list[int] = []
    at = 0
    for tick in range(int((last - first) * fps + 0.5) + 1):
        wanted = first + tick / fps
        while at + 1 < info.frames and abs(info.timestamps[at + 1] - wanted) <= abs(info.timestamps[at] - wanted):
            at += 1
        if not chosen or chosen[-1] != at:
            chosen.append(at)
    return chosen


def read_frames(path: Path, frames: tuple[int, ...], size: tuple[int, int]) -> Tensor:
    """Some frames of a file, its middle cropped to an aspect ratio and resized.

    Args:
        frames: which, by their number in the file.
        size: pixels (height, width) of the result.

    Returns:
        [len(frames), 3, height, width] uint8.

    Raises:
        Unreadable: the file can't be decoded, any more.
    """
    return torch.cat([crop_resize(torch.from_numpy(pictures).permute(0, 3, 1, 2), size) for pictures in _pictures(path, frames)])


def crop_resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """[F, 3, H, W] uint8 -> [F, 3, height, width] uint8: the largest middle part of that aspect ratio, bicubic, antialias."""
    height, width = frames.shape[-2:]
    wanted_h, wanted_w = size
    crop_h = min(height, round(width * wanted_h / wanted_w))
    crop_w = min(width, round(height * wanted_w / wanted_h))
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    frames = frames[..., top : top + crop_h, left : left + crop_w]
    if (crop_h, crop_w) == size:
        return frames.contiguous()
    resized = F.interpolate(frames.float(), size=size, mode="bicubic", align_corners=False, antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def as_video(frames: Tensor) -> Tensor:
    """Frames [F, 3, H, W] uint8 -> [1, 3, F, H, W] in [-1, 1], as a VAE takes them."""
    return (frames.float() / 127.5 - 1).transpose(0, 1).unsqueeze(0)
