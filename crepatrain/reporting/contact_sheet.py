"""The windows of a dataset on one HTML page: the very frames that are trained, beside what was done to them."""

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from PIL import Image
from torch import Tensor

from crepatrain.errors import UserError
from crepatrain.files import written_aside
from crepatrain.preparing.inspection import WindowRow

STILLS = 6
"""Of a window at most, its first and its last frame among them."""

# Images of more windows than that stand in a folder beside the page.
_INLINE = 200
_STILL_HEIGHT, _STRIP_HEIGHT = 96, 160
_STRIP_FRAMES = 32
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: {beside}"


class ContactSheet:
    """A page that grows window by window.

    Args:
        path: of the page; images of many windows go into a folder beside it, with the same name and `-windows`.
        windows: how many there will be.
        fps: at which the strips play.
    """

    def __init__(self, path: Path, windows: int, fps: float) -> None:
        self._path, self._fps = path, fps
        self._beside = path.with_name(f"{path.stem}-windows") if windows > _INLINE else None
        self._images: list[tuple[str, str]] = []
        if self._beside:
            self._beside.mkdir(parents=True, exist_ok=True)

    def add(self, frames: Tensor) -> None:
        """Take the stills and the strip of the next window, [F, 3, H, W] uint8."""
        number = len(self._images)
        self._images.append(
            (self._place(f"{number:05d}.jpg", stills(frames)), self._place(f"{number:05d}.webp", strip(frames, self._fps)))
        )

    def _place(self, name: str, content: bytes) -> str:
        """The address of an image."""
        if self._beside is None:
            kind = "jpeg" if name.endswith("jpg") else "webp"
            return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        (self._beside / name).write_bytes(content)
        return f"{self._beside.name}/{name}"

    def write(self, title: str, rows: Sequence[WindowRow], notes: Sequence[str]) -> None:
        """Write the page of all windows.

        Raises:
            UserError: it can't be written.
        """
        text = _page(title, rows, self._images, notes, _POLICY.format(beside="" if self._beside is None else "'self' file:"))
        try:
            with written_aside(self._path) as aside:
                aside.write_text(text, encoding="utf-8", errors="replace")  # paths may hold bytes that are no text
        except OSError as error:
            raise UserError(f"{self._path} can't be written ({error})", "free disk space, or give another --html") from error


def stills(frames: Tensor) -> bytes:
    """Some frames of a window side by side, as a JPEG."""
    count = min(STILLS, len(frames))
    chosen = [round(index * (len(frames) - 1) / max(1, count - 1)) for index in range(count)]
    pictures = [_picture(frames[index], _STILL_HEIGHT) for index in chosen]
    sheet = Image.new("RGB", (sum(picture.width + 2 for picture in pictures) - 2, _STILL_HEIGHT), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + 2
    return _saved(sheet, "JPEG", quality=80)


def strip(frames: Tensor, fps: float) -> bytes:
    """A window as a moving WebP, of every frame or every second, third and so on."""
    step = -(-len(frames) // _STRIP_FRAMES)
    first, *others = [_picture(frame, _STRIP_HEIGHT) for frame in frames[::step]]
    moving = {"save_all": True, "append_images": others, "duration": round(1000 * step / fps), "loop": 0}
    return _saved(first, "WEBP", quality=60, **moving)


def _picture(frame: Tensor, height: int) -> Image.Image:
    picture = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((max(1, round(picture.width * height / picture.height)), height), Image.Resampling.BICUBIC)


def _saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    held = io.BytesIO()
    picture.save(held, kind, **options)
    return held.getvalue()


def _page(title: str, rows: Sequence[WindowRow], images: Sequence[tuple[str, str]], notes: Sequence[str], policy: str) -> str:
    own = files("crepatrain.reporting")
    css, script = ((own / name).read_text(encoding="utf-8") for name in ("contact_sheet.css", "contact_sheet.js"))
    kinds = sorted({_kind(warning) for row in rows for warning in row.warnings})
    options = "".join(f'<option value="{_escape(kind)}">{_escape(kind)}</option>' for kind in kinds)
    listed = "".join(f"<li>{_escape(note)}</li>" for note in notes)
    body = "".join(_row(number, row, *images[number]) for number, row in enumerate(rows))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escape(title)} - crepatrain</title><style>{css}</style></head>\n<body><main>"
        f"<h1>{_escape(title)}</h1><p>{len(rows)} windows, as they are trained. Choose a row of pictures to play it.</p>"
        f'<ul class="notes">{listed}</ul>'
        '<form class="tools" role="search"><label>Find <input type="search" id="find"></label>'
        '<label>Warning <select id="warning"><option value="">all windows</option><option value="*">any warning</option>'
        f"{options}</select></label>"
        '<label>Order <select id="order"><option value="number">as trained on</option>'
        '<option value="warnings">most warnings</option><option value="frames">frames</option>'
        '<option value="kept">least of the picture left</option><option value="enlarged">most enlarged</option></select></label>'
        f'<output id="count">{len(rows)} shown</output></form><section id="rows">{body}</section></main>\n'
        f"<script>{script}</script></body></html>\n"
    )


def _row(number: int, row: WindowRow, picture: str, moving: str) -> str:
    """One window; what a script sorts by stands in data attributes."""
    facts = {
        "number": number,
        "warnings": len(row.warnings),
        "frames": row.frames,
        "kept": row.kept,
        "enlarged": row.enlarged,
        "kinds": json.dumps([_kind(warning) for warning in row.warnings]),
        "moving": moving,
    }
    data = " ".join(f'data-{name}="{_escape(value)}"' for name, value in facts.items())
    height, width = row.source
    name = f"{Path(row.clip).name} from {row.start:g} s"
    crop = "" if row.crop == "centre" and row.kept == 1 else f", crop {row.crop}, {row.kept:.0%} left"
    weight = "" if row.weight == 1 else f", {row.weight:g} times an epoch"
    warnings = "".join(f"<li>{_escape(warning)}</li>" for warning in row.warnings)
    return (
        f'<article {data}><button type="button" aria-label="play {_escape(name)}">'
        f'<img loading="lazy" alt="{_escape(f"{STILLS} frames of {name}")}" src="{_escape(picture)}"></button>'
        f'<div><h2 title="{_escape(row.clip)}">{_escape(name)}</h2>'
        f"<p>frames {row.first} to {row.last} &middot; {width} x {height} at {row.source_fps:g} fps{_escape(crop)} &rarr; "
        f"{_escape(row.bucket)}{_escape(weight)}</p>"
        f'<p class="caption">{_escape(row.caption)}</p><ul class="warnings">{warnings}</ul></div></article>'
    )


def _kind(warning: str) -> str:
    """What a warning has in common with others of its kind: its words before the first number."""
    words = warning.split(":", maxsplit=1)[0]
    if words.startswith("shows the same"):
        return "shows the same as another"
    return words if not any(letter.isdigit() for letter in words) else " ".join(w for w in words.split() if not w[0].isdigit())


def _escape(text: object) -> str:
    return html.escape(str(text))
