"""Training windows, and buckets of windows that fit into one batch."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from crepatrain.data.clip import Clip
from crepatrain.data.frames import CENTRE, Crop
from crepatrain.data.listing import Refusal


@dataclass(frozen=True)
class Bucket:
    """Windows that fit into one batch.

    Attributes:
        frames, height, width: in pixels.
        caption_tokens: of every caption in it, for a model that takes captions of one length alone.
        fps: of every window in it, for a model that sees the rate; None: the run's.
    """

    frames: int
    height: int
    width: int
    caption_tokens: int | None = None
    fps: float | None = None

    def __str__(self) -> str:
        size = f"{self.frames} x {self.height} x {self.width}"
        rate = "" if self.fps is None else f", {self.fps:g} fps"
        return f"{size}{rate}" if self.caption_tokens is None else f"{size}{rate}, {self.caption_tokens} caption tokens"


@dataclass(frozen=True)
class Window:
    """One training sample: some frames of one clip, at one size."""

    clip: Clip
    frames: tuple[int, ...]
    bucket: Bucket
    crop: Crop = CENTRE

    @property
    def path(self) -> Path:
        return self.clip.path

    @property
    def name(self) -> str:
        return f"{self.clip.path.name} frames {self.frames[0]}-{self.frames[-1]}"


@dataclass(frozen=True)
class ClipCut:
    """What a clip that is used goes through on its way into windows.

    Attributes:
        kept: share of its picture's area that the centre crop leaves.
        enlarged: side of the bucket over the same side of the cropped picture, above 1 where it is enlarged.
        faster: how many times as fast as in the file it runs, above 1 where it has fewer frames than the wanted rate.
        ends: frames, after resampling, that fill no window.
        passed_over: frames, after resampling, of windows that max_windows_per_clip leaves out.
        elsewhere: frames, after resampling, where clip_mode takes no window.
        squeezed: the factor between its height and its width where the whole picture is used; 1 where it is cropped.
    """

    clip: Clip
    kept: float
    enlarged: float
    faster: float
    ends: int
    passed_over: int
    elsewhere: int = 0
    squeezed: float = 1.0


@dataclass(frozen=True)
class ClipWindows:
    """A dataset cut into windows.

    Attributes:
        cuts: of every clip that has windows.
        clips: how many clips there are, without images, those that are too short included.
        too_short: how many of these are.
        fitting_frames: the largest legal window that all of them fill; None where they do already, or where there is none.
    """

    windows: tuple[Window, ...]
    refused: tuple[Refusal, ...]
    cuts: tuple[ClipCut, ...]
    clips: int
    too_short: int
    fitting_frames: int | None

    @property
    def ends(self) -> int:
        """Frames, after resampling, that fill no window."""
        return sum(cut.ends for cut in self.cuts)

    @property
    def passed_over(self) -> int:
        """Frames, after resampling, of windows that max_windows_per_clip leaves out."""
        return sum(cut.passed_over for cut in self.cuts)

    @property
    def elsewhere(self) -> int:
        """Frames, after resampling, where clip_mode takes no window."""
        return sum(cut.elsewhere for cut in self.cuts)

    def part(self, windows: Iterable[Window]) -> "ClipWindows":
        """Some of the windows, with what was decided about their clips."""
        chosen = tuple(windows)
        clips = {window.clip for window in chosen}
        return replace(self, windows=chosen, cuts=tuple(cut for cut in self.cuts if cut.clip in clips))

    @property
    def buckets(self) -> dict[Bucket, int]:
        """How many windows each bucket holds, the largest bucket first."""
        counts: dict[Bucket, int] = {}
        for window in self.windows:
            counts[window.bucket] = counts.get(window.bucket, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[0].frames * item[0].height * item[0].width))
