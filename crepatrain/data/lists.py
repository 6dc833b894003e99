"""Reading a .jsonl, .csv or .json list of clips and captions."""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crepatrain.data.search import CLIP_SUFFIXES
from crepatrain.data.texts import Mistake, as_caption, is_unicode, read_text
from crepatrain.errors import Problem

VIDEO_KEYS = ("video", "file_name", "media_path", "video_path", "path", "file", "image")
CAPTION_KEYS = ("caption", "text", "prompt", "cap")
_MOST_PROBLEMS = 100
_DELIMITERS = {";": "';'", "\t": "tabs", "|": "'|'"}
_EXAMPLE = 'write {"video": "clip.mp4", "caption": "..."}'
# A line within a quoted text that begins as an entry does: the quote was never closed.
_SWALLOWED = re.compile(
    rf'\n[ \t]*"?[^,;"\n]+(?:{"|".join(re.escape(suffix) for suffix in sorted(CLIP_SUFFIXES))})"?[ \t]*,', re.IGNORECASE
)

# A caption may be longer than the 131,072 characters at which the module gives up; unclosed quotes are found otherwise.
csv.field_size_limit(2**31 - 1)


@dataclass(frozen=True)
class Part:
    """Which part of a file is a clip, and how it is trained on, where an entry of a list says so.

    Attributes:
        start, end: in seconds; end None: to the last picture.
        fps: the rate that it is resampled to; None: as the others.
        repeats: how often its windows are trained on in an epoch, as a factor.
    """

    start: float = 0.0
    end: float | None = None
    fps: float | None = None
    repeats: float = 1.0

    def __str__(self) -> str:
        until = "the end" if self.end is None else f"{self.end:g} s"
        return "" if (self.start, self.end) == (0.0, None) else f" from {self.start:g} s to {until}"


WHOLE = Part()


@dataclass(frozen=True)
class Entry:
    """One clip of a list.

    Attributes:
        where: the list, the entry and its line, for messages.
        number: of the entry, from 1.
    """

    where: str
    number: int
    video: str
    caption: str | None
    part: Part = WHOLE


@dataclass(frozen=True)
class _Row:
    number: int
    line: int
    values: dict[str, Any]


def read_list(file: Path) -> tuple[list[Entry], list[Problem]]:
    """The entries that name a file, and all that is wrong with any."""
    try:
        text = read_text(file)
        rows = _ROWS.get(file.suffix.lower(), _json_rows)(text)
        entries, problems = _entries(file, rows)
    except Mistake as mistake:
        return [], [Problem(f"{file}: {mistake.what}", mistake.fix)]
    if not entries and not problems:
        example = 'write the header "video,caption"' if file.suffix.lower() == ".csv" else _EXAMPLE
        problems = [Problem(f"{file}: the list is empty", f"{example}, and one for each clip")]
    if len(problems) > _MOST_PROBLEMS:
        more = len(problems) - _MOST_PROBLEMS
        problems = [*problems[:_MOST_PROBLEMS], Problem(f"{file}: {more} more entries can't be used", "correct them as well")]
    return entries, problems


def read_pair(videos: Path, prompts: Path) -> tuple[list[Entry], list[Problem]]:
    """The entries of a file with a name on each line, and one with their captions; and what is wrong with them."""
    try:
        names, captions = (read_text(path).rstrip().split("\n") for path in (videos, prompts))
        if len(names) != len(captions):
            what = f"it has {len(captions)} lines, and {videos.name} has {len(names)}"
            return [], [Problem(f"{prompts}: {what}", "write one line for each clip")]
        pairs = zip(names, captions, strict=True)
        rows = (_Row(line, line, {"video": name, "caption": text}) for line, (name, text) in enumerate(pairs, 1))
        return _entries(videos, rows)
    except Mistake as mistake:
        return [], [Problem(f"{videos}, {prompts.name}: {mistake.what}", mistake.fix)]


def _entries(file: Path, rows: Iterable[_Row | tuple[int, int, Mistake]]) -> tuple[list[Entry], list[Problem]]:
    """The entries that name a file; the caption of one whose caption can't be used is empty, and among the problems."""
    entries: list[Entry] = []
    problems: list[Problem] = []

    def problem(where: str, mistake: Mistake) -> None:
        problems.append(Problem(f"{where}: {mistake.what}", mistake.fix))

    for row in rows:
        number, line = (row.number, row.line) if isinstance(row, _Row) else row[:2]
        where = f"{file}, entry {number}" + (f" (line {line})" if line else "")
        if not isinstance(row, _Row):
            problem(where, row[2])
            continue
        try:
            video, part = _video(row.values), _part(row.values)
        except Mistake as mistake:
            problem(where, mistake)
            continue
        try:
            caption = as_caption(_text(row.values, CAPTION_KEYS, "caption") or "")
        except Mistake as mistake:
            problem(where, mistake)
            caption = ""
        entries.append(Entry(where, number, video, caption, part))
    return entries, problems


def _video(values: dict[str, Any]) -> str:
    video = (_text(values, VIDEO_KEYS, "file's name") or "").strip()
    if not video:
        raise Mistake("no video", f"give the file's name as one of {', '.join(VIDEO_KEYS)}")
    if "\0" in video or not is_unicode(video):
        raise Mistake("the file's name holds what is no character", "correct the name")
    return video


def _part(values: dict[str, Any]) -> Part:
    start, end, fps, repeats = (_number(values, key) for key in ("start", "end", "fps", "repeats"))
    for key, value, zero in (("start", start, True), ("end", end, False), ("fps", fps, False), ("repeats", repeats, False)):
        if value is not None and (value < 0 or (value == 0 and not zero)):
            raise Mistake(f"{key} is {value:g}", f"write a number {'of 0 or more' if zero else 'above 0'}")
    if end is not None and end <= (start or 0):
        raise Mistake(f"end is {end:g}, and start {start or 0:g}", "let the clip end after its start")
    return Part(start or 0.0, end, fps, 1.0 if repeats is None else repeats)


def _number(values: dict[str, Any], key: str) -> float | None:
    """A number, also one in quotes, as all values of a .csv list are."""
    value = values.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        shown = json.dumps(value)[:60]
        raise Mistake(f"{key} is {shown}, and no number", "write seconds" if key in {"start", "end"} else "write a number")
    return number


def _text(values: dict[str, Any], keys: Iterable[str], meaning: str) -> str | None:
    """The first of some keys that holds something."""
    key = next((key for key in keys if values.get(key) not in (None, "")), None)
    if key is None:
        return None
    value = values[key]
    if isinstance(value, str):
        return value
    try:
        shown = json.dumps(value)
    except RecursionError:
        shown = "..."
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    raise Mistake(f"{key} is {_kind(value)}, {shown}, and no text", f'write the {meaning} as one text in quotes: "{key}": "..."')


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    kinds: dict[type, str] = {list: "a list", dict: "an object", int: "a number", float: "a number"}
    return kinds[type(value)]


def _json_rows(text: str) -> Iterator[_Row | tuple[int, int, Mistake]]:
    if _is_array(text):
        raise Mistake(
            "line 1 is not an object, as all of it is one JSON array",
            f"name the file .json, or {_EXAMPLE} on each line, without brackets around them",
        )
    number = 0
    for line, content in enumerate(text.split("\n"), start=1):  # not splitlines(): a caption may hold other separators
        if not content.strip():
            continue
        number += 1
        try:
            yield _Row(number, line, _object(content))
        except Mistake as mistake:
            yield number, line, mistake


def _array_rows(text: str) -> Iterator[_Row | tuple[int, int, Mistake]]:
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise Mistake(f"line {error.lineno} is not valid JSON ({error.msg})", "correct that line") from None
    except RecursionError:
        raise Mistake("it is nested too deeply", f"write one list of objects: {_EXAMPLE}") from None
    except ValueError:  # a whole number of thousands of digits
        raise Mistake("it holds a number that is too long", _EXAMPLE) from None
    if not isinstance(values, list):
        raise Mistake("it is no list", f"write one list of objects: {_EXAMPLE}")
    for number, value in enumerate(values, start=1):
        yield _Row(number, 0, value) if isinstance(value, dict) else (number, 0, Mistake("not an object", _EXAMPLE))


def _object(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise Mistake(f"not valid JSON ({error.msg})", "write one object per line") from None
    except RecursionError:
        raise Mistake("it is nested too deeply", _EXAMPLE) from None
    except ValueError:  # a whole number of thousands of digits
        raise Mistake("it holds a number that is too long", _EXAMPLE) from None
    if not isinstance(values, dict):
        raise Mistake("not an object", _EXAMPLE)
    return values


def _is_array(text: str) -> bool:
    try:
        return text.lstrip().startswith("[") and isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name.strip().casefold() for name, _ in pairs]
    twice = next((name for name, count in Counter(names).items() if count > 1 and name in VIDEO_KEYS + CAPTION_KEYS), None)
    if twice:
        raise Mistake(f"{twice} stands twice", "keep one of the two")
    return dict(zip(names, (value for _, value in pairs), strict=True))


def _csv_rows(text: str) -> Iterator[_Row | tuple[int, int, Mistake]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        header = [name.strip().casefold() for name in next(filter(None, reader), [])]
    except csv.Error as error:
        raise Mistake(f"line 1 can't be read ({error})", "close every quote") from None
    if not text.strip():
        return
    _expect_header(header, text)
    number = 0
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = f"its quotes do not close ({error}), so it and all after it can't be read"
            yield number + 1, line, Mistake(what, 'close the quote; write a quote within a quoted text twice: ""')
            return
        if not cells:
            continue
        number += 1
        mistake = _row_mistake(header, cells)
        values = {name: cell for name, cell in zip(header, cells, strict=False) if name}
        yield (number, line, mistake) if mistake else _Row(number, line, values)


def _expect_header(header: list[str], text: str) -> None:
    """Make sure that the first line names columns, once each.

    Raises:
        Mistake: it does not.
    """
    first = text.lstrip().split("\n", 1)[0].strip()
    shown = first if len(first) <= 80 else f"{first[:80]}..."
    for delimiter, words in _DELIMITERS.items():
        if len(header) == 1 and delimiter in text.lstrip().split("\n", 1)[0].strip(" \r"):
            raise Mistake(
                f"its columns are separated by {words} ({shown!r})", "separate them by commas, and put captions in quotes"
            )
    twice = next((name for name, count in Counter(header).items() if count > 1 and name in VIDEO_KEYS + CAPTION_KEYS), None)
    if twice:
        raise Mistake(f"the header has the column {twice!r} twice", "keep one of the two, or rename one")
    if not set(header) & set(VIDEO_KEYS):
        fix = f"give the files' names in a column named one of {', '.join(VIDEO_KEYS)}; the first line is the header"
        raise Mistake(f"the header {shown!r} has no column for the video", fix)


_ROWS: Mapping[str, Callable[[str], Iterator[_Row | tuple[int, int, Mistake]]]] = {".csv": _csv_rows, ".json": _array_rows}


def _row_mistake(header: list[str], cells: list[str]) -> Mistake | None:
    if any(_SWALLOWED.search(cell) for cell in cells):
        return Mistake("its quote closes only in a later entry, which it swallows", "close the quote")
    nameless = [index for index, name in enumerate(header) if not name and index > 0]  # the first is the index of a table
    if len(cells) > len(header):
        what = f"it has more columns than the header ({len(cells)}, not {len(header)})"
        return Mistake(what, 'put a caption that holds commas in quotes: "a dog, running"')
    if any(index < len(cells) and cells[index].strip() for index in nameless):
        index = next(index for index in nameless if cells[index].strip())
        return Mistake(
            f"it has a value in column {index + 1}, which has no name", 'name the column, or put the caption in quotes: "a, b"'
        )
    return None
