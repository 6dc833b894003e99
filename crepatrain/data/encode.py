"""Writing video files, and pictures of videos."""

import io
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crepatrain.errors import UserError
from crepatrain.files import written_aside

_GAP = 4
_LABEL_HEIGHT = 22
_STRIP_FRAMES, _STRIP_WIDTH = 6, 320


def write_video(path: Path, frames: np.ndarray, *, fps: float, facts: Mapping[str, Any] | None = None) -> None:
    """Write frames [F, H, W, 3] uint8 as H.264 in yuv420p, whole or not at all.

    Args:
        facts: what the file says of itself, as JSON in its comment, which players and ffprobe show.

    Raises:
        UserError: the disk is full or can't be written to.
    """
    try:
        with written_aside(path) as aside:
            _encode(aside, frames, fps, facts)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror})", "free disk space, or fix its permissions") from error


def _encode(path: Path, frames: np.ndarray, fps: float, facts: Mapping[str, Any] | None) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        if facts:
            container.metadata["comment"] = json.dumps(facts, ensure_ascii=False)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = (side - side % 2 for side in frames.shape[1:3])  # what yuv420p can hold
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            even = np.ascontiguousarray(picture[: stream.height, : stream.width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())


def video_facts(path: Path) -> dict[str, Any]:
    """What `write_video` has let a file say of itself; empty for others."""
    try:
        with av.open(str(path)) as container:
            facts = json.loads(container.metadata.get("comment", "{}"))
    except (av.FFmpegError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def film_strip(frames: np.ndarray) -> Image.Image:
    """A few frames of a video [F, H, W, 3] uint8, evenly spread from the first to the last, side by side."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, _STRIP_FRAMES).round().astype(int))
    pictures = [Image.fromarray(frames[index]) for index in chosen]
    for picture in pictures:
        picture.thumbnail((_STRIP_WIDTH, _STRIP_WIDTH))
    return Image.fromarray(_joined([np.array(picture)[None] for picture in pictures], axis=2)[0])


def as_jpeg(picture: Image.Image) -> bytes:
    """The content of a JPEG file."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return file.getvalue()


def grid_video(rows: Sequence[Sequence[tuple[str, np.ndarray]]]) -> np.ndarray:
    """Labelled videos [F, H, W, 3] uint8 side by side and below each other, as one."""
    return _joined([_joined([_labelled(label, frames) for label, frames in row], axis=2) for row in rows], axis=1)


def _joined(parts: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Videos with a gap between them."""
    gap = list(parts[0].shape)
    gap[axis] = _GAP
    between = np.zeros(gap, dtype=np.uint8)
    return np.concatenate([piece for part in parts for piece in (between, part)][1:], axis=axis)


def _labelled(label: str, frames: np.ndarray) -> np.ndarray:
    """A video under a line of text."""
    width = frames.shape[2]
    strip = Image.new("RGB", (width, _LABEL_HEIGHT), "black")
    ImageDraw.Draw(strip).text((4, 3), label, fill="white", font=ImageFont.load_default(13))
    above = np.broadcast_to(np.array(strip), (len(frames), _LABEL_HEIGHT, width, 3))
    return np.concatenate([above, frames], axis=1)
