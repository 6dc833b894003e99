"""Reading videos: picture n of a file is the n-th that PyAV decodes from its beginning, by whatever way it is reached."""

import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import av
import decord
import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from crepatrain.data.clip import Clip, ClipInfo, Unreadable
from crepatrain.data.digests import content_digest
from crepatrain.data.frames import CENTRE, Crop, crop_resize
from crepatrain.data.pictures import chosen_pictures, is_image, shown_pictures

# Frames that decord has in memory at once, at the file's own size.
_CHUNK = 16
_FALLBACK_FPS = 25.0
# Frames of a few groups of pictures.
_AHEAD = 100

decord.logging.set_level(decord.logging.QUIET)


class _Damaged(Exception):
    """A packet can't be decoded."""


@dataclass
class _Shown:
    """What a file shows, picture by picture."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    pts: list[int | None] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)

    def add(self, picture: np.ndarray, pts: int | None, seconds: float | None) -> None:
        self.sizes.append((picture.shape[0], picture.shape[1]))
        self.pts.append(pts)
        self.seconds.append(seconds)
        self.marks.append(_mark(picture))


def probe(path: Path, beat: Callable[[], None] = lambda: None) -> ClipInfo:
    """Decode a file from its first to its last picture.

    Args:
        beat: called after each picture.

    Raises:
        Unreadable: it has no pictures, or is damaged somewhere.
        OSError: it can't be read at present.
    """
    if path.stat().st_size == 0:
        raise Unreadable("the file is empty")
    if is_image(path):
        shown = _Shown()
        for seconds, picture in shown_pictures(path):
            shown.add(picture, None, seconds)
            beat()
        rate = _FALLBACK_FPS
    else:
        shown, rate = _decode_strictly(path, beat)
    if not shown.marks:
        raise Unreadable("it has no frames")
    return ClipInfo(
        *shown.sizes[0],
        timestamps=tuple(round(seconds, 4) for seconds in _ascending(shown.seconds, rate)),
        pts=_distinct(shown.pts),
        marks=tuple(shown.marks),
        still=len(shown.marks) == 1 and (is_image(path) or path.suffix.lower() == ".gif"),
    )


def _decode_strictly(path: Path, beat: Callable[[], None]) -> tuple[_Shown, float]:
    """What a video shows, and its mean rate; damage that a decoder would rather conceal is an error."""
    with contextlib.suppress(_Damaged):
        return _decode(path, beat, conceal=False)
    with contextlib.suppress(_Damaged):
        shown, rate = _decode(path, beat, conceal=True)
        if shown.marks and _starts_with_a_cut(path, shown, beat):
            return shown, rate
    raise Unreadable("it is damaged: it can't be decoded to its end")


def _decode(path: Path, beat: Callable[[], None], *, conceal: bool) -> tuple[_Shown, float]:
    shown = _Shown()
    with _opened(path) as (container, stream):
        if not conceal:
            stream.codec_context.options = {"err_detect": "explode"}
        for frame in container.decode(stream):
            shown.add(_upright(frame), frame.pts, frame.time)
            beat()
        return shown, float(stream.average_rate or _FALLBACK_FPS)


def _starts_with_a_cut(path: Path, shown: _Shown, beat: Callable[[], None]) -> bool:
    """Whether all that a strict decoder refuses comes from a cut without encoding, and no picture is wrong for it.

    Such a cut may keep packets of pictures before the first one that is shown, whose references are gone; no player shows them.
    H.264 may also release, in the first group of pictures, a reference that the cut has taken away, which changes no pixel.
    """
    first, groups, marks = shown.pts[0], 0, []
    with _opened(path, threads="NONE") as (container, stream):  # threads report an error packets later
        stream.codec_context.options = {"err_detect": "explode"}
        for packet in container.demux(stream):
            beat()
            groups += packet.is_keyframe
            try:
                marks += [_mark(_upright(frame)) for frame in packet.decode()]
            except av.FFmpegError:
                at = packet.dts if packet.pts is None else packet.pts
                hidden = groups == 0 or (at is not None and first is not None and at < first)
                if not hidden and not (stream.codec_context.name == "h264" and groups == 1):
                    return False
    return marks == shown.marks


@contextlib.contextmanager
def _opened(path: Path, threads: str = "AUTO") -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and the stream that players show.

    Raises:
        Unreadable: it is no video, or (as _Damaged) is damaged.
        OSError: it can't be read at present.
    """
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise _blame(error, Unreadable("it is no video, or is cut off")) from error
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise Unreadable("it has no video stream")
        stream.thread_type = threads
        try:
            yield container, stream
        except av.FFmpegError as error:
            raise _blame(error, _Damaged()) from error


def _blame(error: av.FFmpegError, of_the_file: Exception) -> Exception:
    """The error that says who is to blame: the file, or whoever was to read it."""
    if isinstance(error, (OSError, MemoryError)):
        return OSError(error.errno, error.strerror)
    return of_the_file


def _upright(frame: VideoFrame) -> np.ndarray:
    """A picture as it is shown, [H, W, 3] uint8."""
    picture = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5]  # x' = a x + c y, y' = b x + d y
    if abs(a) < abs(b):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _mark(picture: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(picture).data)


def _ascending(seconds: Sequence[float | None], rate: float) -> list[float]:
    """The times as they are, where some are missing a frame after the one before; at an even rate where they go back."""
    times: list[float] = []
    for second in seconds:
        times.append(second if second is not None else times[-1] + 1 / rate if times else 0.0)
    if all(a <= b for a, b in itertools.pairwise(times)):
        return times
    return [number / rate for number in range(len(seconds))]


def _distinct(pts: Sequence[int | None]) -> tuple[int, ...]:
    known = [at for at in pts if at is not None]
    return tuple(known) if len(known) == len(pts) and all(a < b for a, b in itertools.pairwise(known)) else ()


class FrameReader:
    """Reads frames of clips, by the fastest way that gives the right ones: the mark of each picture decides.

    decord is asked first, then PyAV from a keyframe before, then PyAV from the beginning, which is right by definition. A way
    that failed for a file is not tried again.
    """

    def __init__(self) -> None:
        self._failed: dict[str, int] = {}  # by a file's digest, how many of the ways

    def read(
        self,
        clip: Clip,
        frames: Sequence[int],
        size: tuple[int, int],
        crop: Crop = CENTRE,
        beat: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Some frames of a clip, cropped to an aspect ratio and resized.

        Args:
            frames: which, by their ascending numbers in the file.
            size: pixels (height, width) of the result.
            crop: which part of each picture.
            beat: called after each frame.

        Returns:
            [len(frames), 3, height, width] uint8.

        Raises:
            Unreadable: the file can't be decoded any more, or is another one.
            OSError: it can't be read at present.
        """
        taken = []
        for picture in self._pictures(clip, frames):
            taken.append(crop_resize(_as_tensor(picture), size, crop))
            beat()
        return torch.cat(taken)

    def _pictures(self, clip: Clip, frames: Sequence[int]) -> Iterator[np.ndarray]:
        done = 0
        ways = () if is_image(clip.path) else _FAST_WAYS
        for number, way in enumerate(ways):
            if number < self._failed.get(clip.digest, 0):
                continue
            with contextlib.suppress(Unreadable, _Damaged, OSError):  # counting from the beginning says what is wrong
                for picture in way(clip, frames[done:]):
                    if _mark(picture) != clip.info.marks[frames[done]]:
                        break
                    yield picture
                    done += 1
            if done == len(frames):
                return
            self._failed[clip.digest] = number + 1
        counted = _by_counting(clip.path, frames[done:])
        for number, picture in zip(frames[done:], counted, strict=True):
            # Processors may round colours differently: a mark of another machine decides nothing while the file is the same.
            if _mark(picture) != clip.info.marks[number] and content_digest(clip.path) != clip.digest:
                raise Unreadable("it was changed after it was first read")
            yield picture


def _by_decord(clip: Clip, frames: Sequence[int]) -> Iterator[np.ndarray]:
    try:
        reader = decord.VideoReader(str(clip.path), num_threads=1)
        for start in range(0, len(frames), _CHUNK):
            yield from reader.get_batch(list(frames[start : start + _CHUNK])).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise Unreadable("it can't be decoded") from error


def _by_seeking(clip: Clip, frames: Sequence[int], *, ahead: int = 0) -> Iterator[np.ndarray]:
    """By their times, from the keyframe before the first of them.

    Args:
        ahead: frames by which to begin earlier, where a keyframe is not found exactly or does not stand alone.
    """
    if not clip.info.pts:
        return
    wanted = [clip.info.pts[number] for number in frames]
    with _opened(clip.path) as (container, stream):
        container.seek(clip.info.pts[max(0, frames[0] - ahead)], stream=stream)
        for frame in container.decode(stream):
            if frame.pts in wanted:
                yield _upright(frame)
            if frame.pts is None or frame.pts >= wanted[-1]:
                return


_FAST_WAYS = (_by_decord, _by_seeking, partial(_by_seeking, ahead=_AHEAD))


def _by_counting(path: Path, frames: Sequence[int]) -> Iterator[np.ndarray]:
    """From the beginning.

    Raises:
        Unreadable: it ends before.
        OSError: it can't be read at present.
    """
    if is_image(path):
        yield from chosen_pictures(path, frames)
        return
    wanted = set(frames)
    try:
        with _opened(path) as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    yield _upright(frame)
                if number == frames[-1]:
                    return
    except _Damaged as error:
        raise Unreadable("it can't be decoded any more") from error
    raise Unreadable("it has fewer frames than when it was first read")


def read_first(path: Path, size: tuple[int, int]) -> Tensor:
    """The first picture of an image or video file, [3, height, width] uint8, its middle cropped to an aspect ratio and resized.

    Raises:
        Unreadable: it can't be decoded.
        OSError: it can't be read at present.
    """
    return crop_resize(_as_tensor(next(_by_counting(path, (0,)))), size)[0]


def _as_tensor(picture: np.ndarray) -> Tensor:
    """[H, W, 3] -> [1, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).unsqueeze(0)
