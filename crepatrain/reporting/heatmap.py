"""A run's alignment map in its report: the colours, and the HTML."""

import base64
import html
import io
import json
import math
from pathlib import Path
from typing import Annotated

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError

from crepatrain.errors import UserError
from crepatrain.records.layout import RunLayout

# Viridis, from dark to bright: as readable to the colour-blind, and in grey.
_COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def _picture_size(picture: str) -> tuple[int, int]:
    """(width, height) of a picture given as a data URI."""
    return Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).size


def _expect_picture(picture: str) -> str:
    try:
        _picture_size(picture)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a picture ({error})") from error
    return picture


def _expect_rectangle(rows: list[list[float]]) -> list[list[float]]:
    if len({len(row) for row in rows}) > 1:
        raise ValueError("the rows are not of one length")
    return rows


class _Expected(BaseModel):
    model_config = ConfigDict(strict=True)


# A cosine, with what rounding adds to it.
_Cosine = Annotated[float, Field(ge=-1.01, le=1.01)]
_Row = Annotated[list[_Cosine], Field(min_length=1)]


class _Frame(_Expected):
    """One frame of a clip: its number, its picture as a data URI, and the cosine of every patch in rows."""

    frame: NonNegativeInt
    picture: Annotated[str, Field(pattern="^data:image/[a-z]+;base64,"), AfterValidator(_expect_picture)]
    cosine: Annotated[list[_Row], Field(min_length=1), AfterValidator(_expect_rectangle)]


class _Clip(_Expected):
    name: str
    caption: str
    mean: _Cosine
    frames: Annotated[list[_Frame], Field(min_length=1)]


class _Map(_Expected):
    """What alignment_map.json holds."""

    step: NonNegativeInt
    block: NonNegativeInt
    sigma: FiniteFloat
    clips: Annotated[list[_Clip], Field(min_length=1)]


def map_section(root: Path) -> str:
    """The alignment map of a run; empty where it has none.

    Raises:
        UserError: its file is damaged.
    """
    path = RunLayout(root).alignment_map_file
    return _section(_read(path)) if path.is_file() else ""


def _read(path: Path) -> _Map:
    fix = "remove it, or make it again with --map"
    try:
        return _Map.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read ({error})", fix) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} can't be read ({f'{place}: ' if place else ''}{first['msg']})", fix) from error


def _section(found: _Map) -> str:
    values = [value for clip in found.clips for frame in clip.frames for row in frame.cosine for value in row]
    low, high = math.floor(10 * min(values)) / 10, math.ceil(10 * max(values)) / 10
    colors = ", ".join(f"rgb{color}" for color in _COLORS)
    scale = f'{low:g}<span class="scale" style="background:linear-gradient(to right, {colors})"></span>{high:g}'
    about = (
        f"Cosine of every patch of block {found.block} with the teacher's features of the same frame: where the model sees "
        f"what the teacher sees. Step {found.step}, noise level {found.sigma:g}."
    )
    parts = [f"<h2>Alignment map</h2><p>{about} {scale}</p>"]
    for clip in found.clips:
        frames = "".join(_frame(frame, low, high) for frame in clip.frames)
        parts.append(
            f'<div class="card" style="margin-top:14px"><b>{html.escape(clip.name)}</b>'
            f'<p>{html.escape(clip.caption)}; mean {clip.mean:.4f}</p><div class="frames">{frames}</div></div>'
        )
    return "".join(parts)


def _frame(frame: _Frame, low: float, high: float) -> str:
    rows = frame.cosine
    mean = sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    width, height = _picture_size(frame.picture)  # the patches lie over it
    return (
        f'<div><img src="{html.escape(frame.picture)}" alt="frame {frame.frame}">'
        f'<img class="map" style="aspect-ratio:{width}/{height}" src="{_png(rows, low, high)}" '
        f'data-cosine="{html.escape(json.dumps(rows))}" alt="cosines of frame {frame.frame}, mean {mean:.3f}">'
        f"frame {frame.frame}: {mean:.3f}</div>"
    )


def _png(rows: list[list[float]], low: float, high: float) -> str:
    """One pixel per patch, as a data URI."""
    image = Image.new("RGB", (len(rows[0]), len(rows)))
    image.putdata([color((value - low) / (high - low or 1.0)) for row in rows for value in row])
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def color(share: float) -> tuple[int, int, int]:
    """The colour of a value between the scale's ends, 0 and 1."""
    at = min(max(share, 0.0), 1.0) * (len(_COLORS) - 1)
    below = min(int(at), len(_COLORS) - 2)
    pairs = zip(_COLORS[below], _COLORS[below + 1], strict=True)
    red, green, blue = (round(first + (second - first) * (at - below)) for first, second in pairs)
    return red, green, blue
