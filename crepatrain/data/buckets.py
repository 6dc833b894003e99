"""Cutting clips into training windows, and windows into buckets of one size."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crepatrain.data.clip import Clip
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
class ClipWindows:
    """A dataset cut into windows.

    Attributes:
        dropped_frames: frames, after resampling, that no window holds.
        slower: clips below the wanted rate, taken frame by frame, with the factor by which they run faster.
    """

    windows: tuple[Window, ...]
    refused: tuple[Refusal, ...]
    dropped_frames: int
    slower: tuple[tuple[Path, float], ...]

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
    aspect_buckets: bool,
    max_windows_per_clip: int,
    no_images: str | None = None,
) -> ClipWindows:
    """Consecutive windows of every clip; an image is a window of one frame.

    Args:
        size: (frames, height, width) of a window.
        fps: the rate that clips are resampled to.
        multiple: what a bucket's (height, width) must be multiples of.
        aspect_buckets: keep each clip's aspect ratio at about the area of `size`.
        max_windows_per_clip: spread evenly over the clip; 0 means all.
        no_images: why images can't be used; None where they can.
    """
    wanted_frames, height, width = size
    windows: list[Window] = []
    refused: list[Refusal] = []
    slower: list[tuple[Path, float]] = []
    dropped = 0
    for clip in clips:
        chosen = resample_frames(clip.info, fps)
        frames = 1 if clip.info.still else wanted_frames
        if clip.info.still and no_images:
            refused.append(Refusal(clip.path, f"it is an image, and {no_images}", "remove it"))
            continue
        count = len(chosen) // frames
        if count == 0:
            reason = f"{len(chosen)} frames at {min(fps, clip.info.fps):g} fps, and num_frames={frames} are needed"
            refused.append(Refusal(clip.path, reason, "lower num_frames, give a longer clip"))
            continue
        if 0 < clip.info.fps < fps * 0.97 and frames > 1:
            slower.append((clip.path, fps / clip.info.fps))
        starts = [index * frames for index in _spread(count, max_windows_per_clip)]
        dropped += len(chosen) - len(starts) * frames
        sides = (
            nearest_aspect((clip.info.height, clip.info.width), (height, width), multiple) if aspect_buckets else (height, width)
        )
        bucket = Bucket(frames, *sides)
        windows += [Window(clip, tuple(chosen[start : start + frames]), bucket) for start in starts]
    return ClipWindows(tuple(windows), tuple(refused), dropped, tuple(slower))


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
