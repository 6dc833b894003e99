"""Cutting clips into training windows, and windows into buckets of one size."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from crepatrain.data.clip import Clip, ClipInfo
from crepatrain.data.frames import resample_frames
from crepatrain.data.listing import Refusal

# A bucket of another aspect ratio may be that much smaller than the configured size.
_LEAST_AREA = 0.8


@dataclass(frozen=True)
class Bucket:
    """Windows that fit into one batch.

    Attributes:
        frames, height, width: in pixels.
        caption_tokens: of every caption in it, for a model that takes captions of one length alone.
    """

    frames: int
    height: int
    width: int
    caption_tokens: int | None = None

    def __str__(self) -> str:
        size = f"{self.frames} x {self.height} x {self.width}"
        return size if self.caption_tokens is None else f"{size}, {self.caption_tokens} caption tokens"


@dataclass(frozen=True)
class Window:
    """One training sample: some frames of one clip, at one size."""

    clip: Clip
    frames: tuple[int, ...]
    bucket: Bucket

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
    """

    clip: Clip
    kept: float
    enlarged: float
    faster: float
    ends: int
    passed_over: int


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


def cut_clips(
    clips: Sequence[Clip],
    *,
    size: tuple[int, int, int],
    fps: float,
    multiple: tuple[int, int],
    legal_frames: Callable[[int], bool],
    aspect_buckets: bool,
    max_windows_per_clip: int,
    no_images: str | None = None,
) -> ClipWindows:
    """Consecutive windows of every clip; an image is a window of one frame.

    Args:
        size: (frames, height, width) of a window.
        fps: the rate that clips are resampled to.
        multiple: what a bucket's (height, width) must be multiples of.
        legal_frames: whether the model takes that many frames.
        aspect_buckets: keep each clip's aspect ratio at about the area of `size`.
        max_windows_per_clip: spread evenly over the clip; 0 means all.
        no_images: why images can't be used; None where they can.
    """
    wanted_frames, height, width = size
    chosen = [resample_frames(clip.info, fps) for clip in clips]
    lengths = [len(numbers) for clip, numbers in zip(clips, chosen, strict=True) if not clip.info.still]
    too_short = sum(length < wanted_frames for length in lengths)
    fitting = _largest_legal(min(lengths), legal_frames) if too_short else None
    windows: list[Window] = []
    refused: list[Refusal] = []
    cuts: list[ClipCut] = []
    for clip, numbers in zip(clips, chosen, strict=True):
        frames = 1 if clip.info.still else wanted_frames
        if clip.info.still and no_images:
            refused.append(Refusal(clip.path, f"it is an image, and {no_images}", "remove it"))
            continue
        count = len(numbers) // frames
        if count == 0:
            reason = f"{len(numbers)} frames at {min(fps, clip.info.fps):g} fps, and num_frames={frames} are needed"
            if fitting:
                remedy = f"set num_frames to {fitting} ({_all_fit(len(lengths))}), give a longer clip"
            else:
                own = _largest_legal(len(numbers), legal_frames)
                remedy = f"set num_frames to {own} or less, give a longer clip" if own else "give a longer clip"
            refused.append(Refusal(clip.path, reason, remedy))
            continue
        starts = [index * frames for index in _spread(count, max_windows_per_clip)]
        source = clip.info.height, clip.info.width
        sides = nearest_aspect(source, (height, width), multiple) if aspect_buckets else (height, width)
        kept, enlarged = _crop_and_scale(source, sides)
        faster = _speed(clip.info, numbers, fps) if frames > 1 else 1.0
        cuts.append(ClipCut(clip, kept, enlarged, faster, len(numbers) % frames, (count - len(starts)) * frames))
        windows += [Window(clip, tuple(numbers[start : start + frames]), Bucket(frames, *sides)) for start in starts]
    return ClipWindows(tuple(windows), tuple(refused), tuple(cuts), len(lengths), too_short, fitting)


def _largest_legal(most: int, legal_frames: Callable[[int], bool]) -> int | None:
    """The largest legal window of at most so many frames; None where only a single frame is left, as that is no clip."""
    return next((frames for frames in range(most, 1, -1) if legal_frames(frames)), None)


def _all_fit(clips: int) -> str:
    return "the clip fits then" if clips == 1 else f"all {clips} clips fit then"


def _crop_and_scale(source: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """The share of a picture's area that is in the largest middle part of a size's aspect ratio, and how that part is scaled."""
    scale = max(size[0] / source[0], size[1] / source[1])
    return size[0] * size[1] / (source[0] * source[1] * scale**2), scale


def _speed(info: ClipInfo, numbers: Sequence[int], fps: float) -> float:
    """How many times as fast chosen frames run at `fps` as they do in the file."""
    span = info.timestamps[numbers[-1]] - info.timestamps[numbers[0]]
    return span * fps / (len(numbers) - 1) if len(numbers) > 1 else 1.0


def _spread(count: int, limit: int) -> list[int]:
    if limit == 0 or count <= limit:
        return list(range(count))
    if limit == 1:
        return [count // 2]
    return [i * (count - 1) // (limit - 1) for i in range(limit)]


def nearest_aspect(source: tuple[int, int], area_of: tuple[int, int], multiple: tuple[int, int]) -> tuple[int, int]:
    """The legal (height, width) nearest to the source's aspect ratio, of at most the wanted area and not under 80 % of it."""
    area = area_of[0] * area_of[1]
    aspect = source[0] / source[1]
    best = area_of
    best_error = _aspect_error(area_of, aspect)
    for height in range(multiple[0], area // multiple[1] + 1, multiple[0]):
        widest = area // height // multiple[1] * multiple[1]
        for width in range(widest, 0, -multiple[1]):
            if height * width < _LEAST_AREA * area:
                break
            error = _aspect_error((height, width), aspect)
            if error < best_error - 1e-9:
                best, best_error = (height, width), error
    return best


def _aspect_error(size: tuple[int, int], aspect: float) -> float:
    ratio = size[0] / size[1]
    return max(ratio / aspect, aspect / ratio)
