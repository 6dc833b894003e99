"""Every window of a dataset as plain values: which frames of which file, and what is done to them."""

from dataclasses import asdict, dataclass
from typing import Any

from crepatrain.data.buckets import ClipCut, ClipWindows, Window
from crepatrain.preparing.decisions import clip_warnings


@dataclass(frozen=True)
class WindowRow:
    """One window, as plain values.

    Attributes:
        clip: path of the file.
        start: of its first frame, in seconds from the first picture.
        first, last, frames: numbers of its frames in the file, and how many there are.
        source: (height, width) of the file's pictures.
        kept: share of the picture's area that the crop leaves.
        enlarged: how the cropped picture is scaled.
        weight: how often it is trained on in an epoch, on average.
        warnings: what its owner should look at.
    """

    clip: str
    start: float
    first: int
    last: int
    frames: int
    source: tuple[int, int]
    source_fps: float
    crop: str
    kept: float
    enlarged: float
    faster: float
    bucket: str
    weight: float
    caption: str
    warnings: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def window_rows(clips: ClipWindows) -> list[WindowRow]:
    """Of every window, in the dataset's order, with the warnings that need no pixels."""
    cuts = {cut.clip: cut for cut in clips.cuts}
    return [_row(window, cuts[window.clip]) for window in clips.windows]


def _row(window: Window, cut: ClipCut) -> WindowRow:
    info, frames = window.clip.info, window.frames
    return WindowRow(
        clip=str(window.path),
        start=round(info.timestamps[frames[0]] - info.timestamps[0], 3),
        first=frames[0],
        last=frames[-1],
        frames=len(frames),
        source=(info.height, info.width),
        source_fps=round(info.fps, 3),
        crop=str(window.crop),
        kept=round(cut.kept, 3),
        enlarged=round(cut.enlarged, 3),
        faster=round(cut.faster, 3),
        bucket=str(window.bucket),
        weight=window.clip.rule.weight,
        caption=window.clip.caption,
        warnings=tuple(clip_warnings(cut)),
    )
