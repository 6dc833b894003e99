"""Cutting clips into training windows."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from crepatrain.data.buckets import Bucket, ClipCut, ClipWindows, Window
from crepatrain.data.clip import Clip, ClipInfo, ClipMode
from crepatrain.data.frames import Crop, resample_frames
from crepatrain.data.listing import Refusal
from crepatrain.data.lists import Part

# A bucket of another aspect ratio may be that much smaller than the configured size.
_LEAST_AREA = 0.8


@dataclass(frozen=True)
class Cutting:
    """How the clips of a run are cut, beside what each clip's own rule says.

    Attributes:
        multiple: what a bucket's (height, width) must be multiples of.
        legal_frames: whether the model takes that many frames.
        aspects: True: keep each clip's aspect ratio at about the area of its rule's size; or the (height, width) to choose from.
        lengths: how many frames a window may have; auto: as many as the clip fills. None: as many as the rule's size.
        most: windows of a clip; 0: all.
        crop: where the pictures are cropped.
        seed: of what is drawn: places of windows, and of crops.
        sees_fps: whether the model sees the rate, so that windows of two rates can't be in one batch.
        no_images: why images can't be used; None where they can.
    """

    multiple: tuple[int, int]
    legal_frames: Callable[[int], bool]
    aspects: bool | Sequence[tuple[int, int]] = False
    lengths: Sequence[int] | Literal["auto"] | None = None
    most: int = 0
    crop: Literal["center", "random", "none"] = "center"
    seed: int = 0
    sees_fps: bool = False
    no_images: str | None = None


def cut_clips(clips: Sequence[Clip], fps: float, cutting: Cutting) -> ClipWindows:
    """The windows of every clip; an image is a window of one frame.

    Args:
        fps: the rate of the run.
    """
    chosen = [resample_frames(clip.info, clip.rule.fps, clip.rule.start, clip.rule.end) for clip in clips]
    lengths = [(len(numbers), clip.rule.size[0]) for clip, numbers in zip(clips, chosen, strict=True) if not clip.info.still]
    too_short = sum(length < wanted for length, wanted in lengths) if cutting.lengths is None else 0
    fitting = _largest_legal(min(length for length, _ in lengths), cutting.legal_frames) if too_short else None
    windows: list[Window] = []
    refused: list[Refusal] = []
    cuts: list[ClipCut] = []
    for clip, numbers in zip(clips, chosen, strict=True):
        if clip.info.still and cutting.no_images:
            refused.append(Refusal(clip.path, f"it is an image, and {cutting.no_images}", "remove it"))
            continue
        frames = 1 if clip.info.still else _length_for(len(numbers), clip.rule.size[0], cutting)
        if frames is None or len(numbers) < frames:
            refused.append(_too_short(clip, len(numbers), frames, fitting, len(lengths), cutting))
            continue
        draw = random.Random(f"{cutting.seed}/{clip.digest}/{clip.rule.start}/{clip.rule.end}")
        starts = _starts(len(numbers), frames, clip.rule.mode, cutting.most, draw)
        source = clip.info.height, clip.info.width
        sides = _sides(source, clip.rule.size[1:], cutting)
        taken = [tuple(numbers[start : start + frames]) for start in starts]
        cuts.append(_cut(clip, numbers, taken, sides, fps, cutting))
        bucket = Bucket(frames, *sides, fps=_own_fps(clip, fps) if cutting.sees_fps and frames > 1 else None)
        windows += [Window(clip, each, bucket, _crop(cutting, draw)) for each in taken]
    return ClipWindows(tuple(windows), tuple(refused), tuple(cuts), len(lengths), too_short, fitting)


def _length_for(length: int, wanted: int, cutting: Cutting) -> int | None:
    """Frames of the windows of a clip of so many; None where none of the possible lengths fits."""
    if cutting.lengths is None:
        return wanted
    if cutting.lengths == "auto":
        return _largest_legal(min(length, wanted), cutting.legal_frames)
    return max((each for each in cutting.lengths if each <= min(length, wanted)), default=None)


def _too_short(clip: Clip, length: int, frames: int | None, fitting: int | None, clips: int, cutting: Cutting) -> Refusal:
    rate = clip.info.fps if clip.rule.fps is None else min(clip.rule.fps, clip.info.fps)
    held = f"{length} frames{Part(clip.rule.start, clip.rule.end)} at {rate:g} fps"
    if frames is None:
        what = "too few for the model" if cutting.lengths == "auto" else f"frame_buckets={list(cutting.lengths or ())} are needed"
        own = _largest_legal(length, cutting.legal_frames)
        return Refusal(
            clip.path, f"{held}, and {what}", f"add {own} to them, give a longer clip" if own else "give a longer clip"
        )
    reason = f"{held}, and num_frames={frames} are needed"
    if fitting:
        remedy = f"set num_frames to {fitting} ({_all_fit(clips)}), give a longer clip"
    else:
        own = _largest_legal(length, cutting.legal_frames)
        remedy = f"set num_frames to {own} or less, give a longer clip" if own else "give a longer clip"
    return Refusal(clip.path, reason, remedy)


def _largest_legal(most: int, legal_frames: Callable[[int], bool]) -> int | None:
    """The largest legal window of at most so many frames; None where only a single frame is left, as that is no clip."""
    return next((frames for frames in range(most, 1, -1) if legal_frames(frames)), None)


def _all_fit(clips: int) -> str:
    return "the clip fits then" if clips == 1 else f"all {clips} clips fit then"


def _starts(length: int, frames: int, mode: ClipMode, most: int, draw: random.Random) -> list[int]:
    """Where the windows of a clip of so many frames begin."""
    last = length - frames
    count = length // frames
    match mode:
        case "chunks":
            return [index * frames for index in _spread(count, most)]
        case "first":
            return [0]
        case "middle":
            return [last // 2]
        case "uniform":
            several = min(most or count, last + 1)
            return [last // 2] if several == 1 else [index * last // (several - 1) for index in range(several)]
        case "slide":
            places = range(0, last + 1, max(1, frames // 2))
            return [places[index] for index in _spread(len(places), most)]
        case "random":
            return sorted(draw.sample(range(last + 1), min(most or count, last + 1)))


def _spread(count: int, limit: int) -> list[int]:
    if limit == 0 or count <= limit:
        return list(range(count))
    if limit == 1:
        return [count // 2]
    return [i * (count - 1) // (limit - 1) for i in range(limit)]


def _cut(
    clip: Clip, numbers: Sequence[int], taken: Sequence[Sequence[int]], sides: tuple[int, int], fps: float, cutting: Cutting
) -> ClipCut:
    source, frames = (clip.info.height, clip.info.width), len(taken[0])
    kept, enlarged = _crop_and_scale(source, sides)
    squeezed = 1.0
    if cutting.crop == "none":
        across, down = sides[1] / source[1], sides[0] / source[0]
        kept, enlarged, squeezed = 1.0, max(across, down), max(across / down, down / across)
    faster = _speed(clip.info, numbers, clip.rule.fps or fps) if frames > 1 and clip.rule.fps is not None else 1.0
    rest = len(numbers) - len({number for window in taken for number in window})
    if clip.rule.mode != "chunks":
        return ClipCut(clip, kept, enlarged, faster, 0, 0, rest, squeezed)
    ends = len(numbers) % frames
    return ClipCut(clip, kept, enlarged, faster, ends, rest - ends, 0, squeezed)


def _own_fps(clip: Clip, fps: float) -> float | None:
    """The rate of a clip's windows where it is another than the run's."""
    own = clip.info.fps if clip.rule.fps is None else clip.rule.fps
    return None if round(own, 2) == round(fps, 2) else round(own, 2)


def _crop(cutting: Cutting, draw: random.Random) -> Crop:
    if cutting.crop == "random":
        return Crop(draw.random(), draw.random())
    return Crop(whole=cutting.crop == "none")


def _crop_and_scale(source: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """The share of a picture's area that is in the largest middle part of a size's aspect ratio, and how that part is scaled."""
    scale = max(size[0] / source[0], size[1] / source[1])
    return size[0] * size[1] / (source[0] * source[1] * scale**2), scale


def _speed(info: ClipInfo, numbers: Sequence[int], fps: float) -> float:
    """How many times as fast chosen frames run at `fps` as they do in the file."""
    span = info.timestamps[numbers[-1]] - info.timestamps[numbers[0]]
    return span * fps / (len(numbers) - 1) if len(numbers) > 1 else 1.0


def _sides(source: tuple[int, int], wanted: tuple[int, int], cutting: Cutting) -> tuple[int, int]:
    if cutting.aspects is False:
        return wanted
    if cutting.aspects is True:
        return nearest_aspect(source, wanted, cutting.multiple)
    return min(cutting.aspects, key=lambda size: _aspect_error(size, source[0] / source[1]))


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
