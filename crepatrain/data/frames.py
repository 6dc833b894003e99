"""Which frames of a clip are taken, and at what size."""

import torch
import torch.nn.functional as F
from torch import Tensor

from crepatrain.data.clip import ClipInfo


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
