"""What is known of a clip."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ClipMode = Literal["chunks", "first", "middle", "uniform", "slide", "random"]
"""Where in a clip its windows lie."""


class Unreadable(Exception):
    """A file that can't be decoded, with the reason, which lies in the file itself: asking again changes nothing.

    What a disk or the system is to blame for is an OSError.
    """


@dataclass(frozen=True)
class ClipInfo:
    """What a video or image file holds, after its rotation is applied.

    Attributes:
        timestamps: of every picture in seconds, ascending, in the order in which the file shows them.
        pts: the same in the file's own ticks, to seek by; empty where they don't single out every picture.
        marks: CRC-32 of every picture's pixels as 8-bit RGB, by which a picture that was read is known to be the right one.
        still: whether it is one picture rather than a moving one.
    """

    height: int
    width: int
    timestamps: tuple[float, ...]
    pts: tuple[int, ...] = ()
    marks: tuple[int, ...] = ()
    still: bool = False

    @property
    def frames(self) -> int:
        return len(self.timestamps)

    @property
    def fps(self) -> float:
        """The mean rate; 0 for a single frame."""
        span = self.timestamps[-1] - self.timestamps[0]
        return (self.frames - 1) / span if span > 0 else 0.0


@dataclass(frozen=True)
class Rule:
    """How clips of one source are cut into windows.

    Attributes:
        size: (frames, height, width) of a window; of several lengths or shapes the largest.
        fps: the rate that they are resampled to; None: their own.
        start, end: of the part that is used, in seconds from the first picture; end None: to the last one.
        weight: how often a window is trained on in an epoch, on average.
    """

    size: tuple[int, int, int]
    fps: float | None
    mode: ClipMode = "chunks"
    start: float = 0.0
    end: float | None = None
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Clip:
    """One video or image file, or a part of it, with its caption.

    Attributes:
        digest: of the file's content.
    """

    path: Path
    caption: str
    digest: str
    info: ClipInfo
    rule: Rule
