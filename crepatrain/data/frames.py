"""Which frames of a clip are taken, and at what size."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crepatrain.data.clip import ClipInfo


def resample_frames(info: ClipInfo, fps: float | None, start: float = 0.0, end: float | None = None) -> list[int]:
    """The frames nearest to the ticks of a clock of `fps`, each at most once: a slower clip is taken frame by frame.

    Args:
        fps: None: every frame.
        start, end: in seconds from the first picture; only frames from `start` on and before `end`, of which there may be none.
    """
    zero = info.timestamps[0]
    inside = [n for n, at in enumerate(info.timestamps) if start <= at - zero and (end is None or at - zero < end)]
    if fps is None or not inside:
        return inside
    first, last = info.timestamps[inside[0]], info.timestamps[inside[-1]]
    chosen: list[int] = []
    at = inside[0]
    for tick in range(int((last - first) * fps + 0.5) + 1):
        wanted = first + tick / fps
        while at + 1 <= inside[-1] and abs(info.timestamps[at + 1] - wanted) <= abs(info.timestamps[at] - wanted):
            at += 1
        if not chosen or chosen[-1] != at:
            chosen.append(at)
    return chosen


@dataclass(frozen=True)
class Crop:
    """Which part of a picture is used: the largest one of a wanted aspect ratio.

    Attributes:
        down, right: where it lies, from 0 at the top or left to 1 at the bottom or right.
        whole: use the whole picture instead, and change its aspect ratio.
    """

    down: float = 0.5
    right: float = 0.5
    whole: bool = False

    def __str__(self) -> str:
        if self.whole:
            return "whole"
        return "centre" if (self.down, self.right) == (0.5, 0.5) else f"{self.down!r} down, {self.right!r} right"


CENTRE = Crop()


def crop_resize(frames: Tensor, size: tuple[int, int], crop: Crop = CENTRE) -> Tensor:
    """[F, 3, H, W] uint8 -> [F, 3, height, width] uint8: the largest part of that aspect ratio, bicubic, antialias."""
    height, width = frames.shape[-2:]
    wanted_h, wanted_w = size
    if not crop.whole:
        crop_h = min(height, round(width * wanted_h / wanted_w))
        crop_w = min(width, round(height * wanted_w / wanted_h))
        top, left = int((height - crop_h) * crop.down), int((width - crop_w) * crop.right)
        frames = frames[..., top : top + crop_h, left : left + crop_w]
    if frames.shape[-2:] == size:
        return frames.contiguous()
    resized = F.interpolate(frames.float(), size=size, mode="bicubic", align_corners=False, antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def as_video(frames: Tensor) -> Tensor:
    """Frames [F, 3, H, W] uint8 -> [1, 3, F, H, W] in [-1, 1], as a VAE takes them."""
    return (frames.float() / 127.5 - 1).transpose(0, 1).unsqueeze(0)
