"""Every window of a dataset as it is trained: what is done to its clip, and what its owner may not want in its pictures."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crepatrain.config.plan import Plan
from crepatrain.data.buckets import Window
from crepatrain.preparing.captions import read_captions
from crepatrain.preparing.context import Context
from crepatrain.preparing.preflight import Dataset
from crepatrain.preparing.window_frames import frames_of, read_windows
from crepatrain.preparing.window_rows import WindowRow, window_rows
from crepatrain.training.build import cut_captions

_AHEAD = 3
# Of pictures whose values go from 0 to 255: the mean of a black one, and what noise and compression change in a frozen clip.
_BLACK = 16.0
_FROZEN = 8.0
# Bits by which the marks of two windows may differ, of 64 for each of three pictures, and they still show the same.
_ALIKE = 12
_ROWS, _COLUMNS = 8, 8


def inspect(
    context: Context, dataset: Dataset, each: Callable[[Window, Tensor], None] = lambda _window, _frames: None
) -> list[WindowRow]:
    """Read every window as training reads it, and look at it.

    Args:
        each: called with each window and its frames [F, 3, H, W] uint8.

    Raises:
        UserError: a clip that can't be read any more.
        Stopped: a signal came.
    """
    windows = dataset.clips.windows
    seen: list[tuple[str, ...]] = []
    marks: list[np.ndarray] = []
    with context.screen.progress("looking at windows", len(windows)) as advance:
        for window, reading in read_windows(windows, at_once=_AHEAD):
            context.stop.check("nothing was changed")
            frames = frames_of(window, reading)
            seen.append(pixel_warnings(frames))
            marks.append(mark(frames))
            each(window, frames)
            advance()
    of_captions = _caption_warnings(context.plan, windows)
    alike = _alike(windows, np.stack(marks))
    return [
        replace(row, warnings=(*row.warnings, *of_captions[row.caption], *pixels, *same))
        for row, pixels, same in zip(window_rows(dataset.clips), seen, alike, strict=True)
    ]


def without_caption(plan: Plan) -> list[str]:
    """The clips that have no caption, by their paths."""
    found = [read_captions(plan, dataset, "train_data")[0] for dataset in plan.datasets]
    return [str(clip.path) for listed in found for clip in listed.clips if clip.caption is None]


def pixel_warnings(frames: Tensor) -> tuple[str, ...]:
    """What is wrong with the pictures of a window, [F, 3, H, W] uint8, as far as their values say."""
    small = F.adaptive_avg_pool2d(frames.float(), (32, 32))
    found = []
    dark = int((small.mean(dim=(1, 2, 3)) < _BLACK).sum())
    if dark:
        found.append(f"black: {dark} of {len(frames)} frames")
    # The most that one place changes over all of the window: a still camera on something small that moves is not frozen.
    if len(frames) > 1 and float((small.amax(dim=0) - small.amin(dim=0)).max()) < _FROZEN:
        found.append("frozen: nothing moves")
    return tuple(found)


def mark(frames: Tensor) -> np.ndarray:
    """Which neighbours are brighter, of the first, the middle and the last picture: bits that copies of a picture share."""
    chosen = frames[[0, len(frames) // 2, len(frames) - 1]].float().mean(dim=1, keepdim=True)
    small = F.adaptive_avg_pool2d(chosen, (_ROWS, _COLUMNS + 1))[:, 0]
    return (small[..., 1:] > small[..., :-1]).flatten().to(torch.uint8).numpy()


def _alike(windows: Sequence[Window], marks: np.ndarray) -> list[tuple[str, ...]]:
    """For each window the first earlier one of another clip that shows the same."""
    found: list[tuple[str, ...]] = []
    for index, window in enumerate(windows):
        near: list[int] = np.flatnonzero((marks[:index] != marks[index]).sum(axis=1) <= _ALIKE).tolist()
        other = next((windows[i] for i in near if windows[i].clip is not window.clip), None)
        found.append((f"shows the same as {other.name}",) if other else ())
    return found


def _caption_warnings(plan: Plan, windows: Sequence[Window]) -> Mapping[str, list[str]]:
    """By caption."""
    clips = defaultdict[str, dict[Any, None]](dict)
    for window in windows:
        clips[window.clip.caption][window.clip] = None
    found: dict[str, list[str]] = {caption: [] for caption in clips}
    for caption, of in clips.items():
        if not caption.strip():
            found[caption].append("no caption")
        elif len(of) > 1:
            found[caption].append(f"{len(of)} clips have this caption")
    captions = list(clips)
    for caption, cut in zip(captions, cut_captions(plan, captions, download=False) or [None] * len(captions), strict=True):
        if cut:
            found[caption].append(f"long caption: {cut.tokens} tokens, and {cut.read} are read")
    return found
