"""Reading video files."""

from dataclasses import dataclass
from pathlib import Path

import av
import decord
import torch
import torch.nn.functional as F
from torch import Tensor

# Frames that are in memory at once, at the file's own size, beside the result.
_CHUNK = 16

decord.logging.set_level(decord.logging.QUIET)


class Unreadable(Exception):
    """A file that can't be decoded, with the reason."""


@dataclass(frozen=True)
class ClipInfo:
    """What a video file holds, after its rotation is applied.

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
    reader = _open(path)
    count = len(reader)
    if count == 0:
        raise Unreadable("it has no frames")
    height, width = 0, 0
    try:
        for start in range(0, count, _CHUNK):
            frames = reader.get_batch(list(range(start, min(start + _CHUNK, count)))).asnumpy()
            height, width = frames.shape[1:3]
        timestamps = sorted(float(start) for start, _ in reader.get_frame_timestamp(range(count)))
    except (decord.DECORDError, RuntimeError) as error:
        raise Unreadable("the file is damaged: it can't be decoded to its end") from error
    return ClipInfo(height, width, tuple(round(t, 4) for t in timestamps))


def _open(path: Path) -> decord.VideoReader:
    try:
        with av.open(str(path)) as container:  # asked first, as decord prints to the terminal on a file that it can't open
            if not container.streams.video:
                raise Unreadable("it has no video stream")
        return decord.VideoReader(str(path), num_threads=1)
    except (av.FFmpegError, decord.DECORDError, RuntimeError) as error:
        raise Unreadable("it is no video, or is cut off") from error


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
        Unreadable: the file can't be decoded (any more).
    """
    reader = _open(path)
    parts = []
    try:
        for start in range(0, len(frames), _CHUNK):
            array = reader.get_batch(list(frames[start : start + _CHUNK])).asnumpy()
            parts.append(crop_resize(torch.from_numpy(array).permute(0, 3, 1, 2), size))
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise Unreadable("it can't be decoded") from error
    return torch.cat(parts)


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
