"""A run's alignment map in its report: the colours, and the HTML."""

import base64
import html
import io
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from crepatrain.errors import UserError
from crepatrain.records.layout import RunLayout

# Viridis, from dark to bright: as readable to the colour-blind, and in grey.
_COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def map_section(root: Path) -> str:
    """The alignment map of a run; empty where it has none.

    Raises:
        UserError: its file is damaged.
    """
    path = RunLayout(root).alignment_map_file
    if not path.is_file():
        return ""
    try:
        return _section(json.loads(path.read_bytes()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error})", "remove it, or make it again with --map") from error


def _section(found: dict[str, Any]) -> str:
    values = [value for clip in found["clips"] for frame in clip["frames"] for row in frame["cosine"] for value in row]
    low, high = math.floor(10 * min(values)) / 10, math.ceil(10 * max(values)) / 10
    colors = ", ".join(f"rgb{color}" for color in _COLORS)
    scale = f'{low:g}<span class="scale" style="background:linear-gradient(to right, {colors})"></span>{high:g}'
    about = (
        f"Cosine of every patch of block {found['block']} with the teacher's features of the same frame: where the model sees "
        f"what the teacher sees. Step {found['step']}, noise level {found['sigma']:g}."
    )
    parts = [f"<h2>Alignment map</h2><p>{about} {scale}</p>"]
    for clip in found["clips"]:
        frames = "".join(_frame(frame, low, high) for frame in clip["frames"])
        parts.append(
            f'<div class="card" style="margin-top:14px"><b>{html.escape(clip["name"])}</b>'
            f'<p>{html.escape(clip["caption"])}; mean {clip["mean"]:.4f}</p><div class="frames">{frames}</div></div>'
        )
    return "".join(parts)


def _frame(frame: dict[str, Any], low: float, high: float) -> str:
    rows = frame["cosine"]
    mean = sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    return (
        f'<div><img src="{html.escape(frame["picture"])}" alt="frame {frame["frame"]}">'
        f'<img class="map" style="aspect-ratio:{_aspect(frame["picture"])}" src="{_png(rows, low, high)}" '
        f'data-cosine="{html.escape(json.dumps(rows))}" alt="cosines of frame {frame["frame"]}, mean {mean:.3f}">'
        f"frame {frame['frame']}: {mean:.3f}</div>"
    )


def _aspect(picture: str) -> str:
    """Width / height of a picture given as a data URI: the patches lie over it."""
    width, height = Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).size
    return f"{width}/{height}"


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
