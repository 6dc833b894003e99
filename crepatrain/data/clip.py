"""What is known of a clip."""

from dataclasses import dataclass
from pathlib import Path


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


@dataclass(frozen=True, eq=False)
class Clip:
    """One video or image file with its caption.

    Attributes:
        digest: of the file's content.
    """

    path: Path
    caption: str
    digest: str
    info: ClipInfo
