"""Which files and captions a dataset names, and which of them can't be used."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crepatrain.data.pictures import IMAGE_SUFFIXES
from crepatrain.errors import Problem, UserError

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".gif", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv"}
)
_VIDEO_KEYS = ("video", "file_name", "path", "file", "image")
_CAPTION_KEYS = ("caption", "text", "prompt")


@dataclass(frozen=True)
class Refusal:
    """A file that can't be used, why, and what to do about it."""

    path: Path
    reason: str
    remedy: str = "repair or remove it"


def list_clips(train_data: Path, key: str = "train_data") -> list[tuple[Path, str | None]]:
    """Video and image files with their captions, in a stable order; None where there is no caption.

    Args:
        train_data: a folder (searched below it too; captions in NAME.txt, metadata.jsonl or metadata.csv), or such a list.
        key: of the config, that says so.

    Raises:
        UserError: no videos, or a list that can't be read.
    """
    if train_data.is_file():
        return _read_list(train_data, key)
    for name in ("metadata.jsonl", "metadata.csv"):
        if (train_data / name).is_file():
            return _read_list(train_data / name, key)
    videos = sorted(
        path
        for path in train_data.rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(train_data).parts)
    )
    if not videos:
        raise UserError(
            f"{key}={train_data}: no video files or images in it",
            f"put clips ({', '.join(sorted(VIDEO_SUFFIXES))}) and NAME.txt captions into it",
        )
    return [(path, _sidecar(path)) for path in videos]


def _sidecar(video: Path) -> str | None:
    text = video.with_suffix(".txt")
    return " ".join(_read_text(text).split()) or None if text.is_file() else None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8", "save it as UTF-8") from None


def _read_list(file: Path, key: str) -> list[tuple[Path, str | None]]:
    text = _read_text(file)
    rows = list(csv.DictReader(io.StringIO(text, newline=""))) if file.suffix.lower() == ".csv" else _read_lines(file, text)
    found = []
    for number, row in enumerate(rows, start=1):
        name = next((row[key] for key in _VIDEO_KEYS if row.get(key)), None)
        if name is None:
            raise UserError(f"{file}, entry {number}: no video", f"give the file's name as one of {', '.join(_VIDEO_KEYS)}")
        caption = next((str(row[key]).strip() for key in _CAPTION_KEYS if row.get(key)), "")
        found.append((file.parent / str(name), " ".join(caption.split()) or None))
    if not found:
        raise UserError(f"{key}={file}: the list is empty", 'write {"video": "clip.mp4", "caption": "..."} lines')
    return found


def _read_lines(file: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): a caption may hold other separators
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number}: not valid JSON ({error.msg})", "write one object per line") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}: not an object", 'write {"video": "clip.mp4", "caption": "..."}')
        rows.append(row)
    return rows


def choose_captions(
    found: Sequence[tuple[Path, str | None]], missing: Literal["error", "empty", "filename", "skip"]
) -> tuple[list[tuple[Path, str]], list[Refusal]]:
    """A caption for every clip, by the rule of `missing_captions`.

    Raises:
        UserError: the rule is error and a clip has none.
    """
    without = [path for path, caption in found if caption is None]
    if without and missing == "error":
        name = without[0].stem if len(without) == 1 else "NAME"
        raise UserError(
            f"{_names(without)}: no caption", f"write {name}.txt beside it, or set missing_captions to empty, filename or skip"
        )
    spoken = {"empty": lambda _: "", "filename": lambda path: " ".join(path.stem.replace("_", " ").replace("-", " ").split())}
    chosen = [
        (path, caption if caption is not None else spoken[missing](path))
        for path, caption in found
        if caption is not None or missing != "skip"
    ]
    return chosen, [Refusal(path, "no caption") for path in without if missing == "skip"]


def _names(paths: Sequence[Path], limit: int = 5) -> str:
    shown = ", ".join(path.name for path in paths[:limit])
    return f"{shown} and {len(paths) - limit} more" if len(paths) > limit else shown


def refusal_error(refused: Sequence[Refusal]) -> UserError:
    """Every refused file, in one error."""
    return UserError.of(
        [Problem(f"{refusal.path}: {refusal.reason}", f"{refusal.remedy}, or set unusable_clips to skip") for refusal in refused]
    )
