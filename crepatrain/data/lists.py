"""Reading a .jsonl or .csv list of clips and captions."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crepatrain.data.search import CLIP_SUFFIXES
from crepatrain.data.texts import Mistake, as_caption, is_unicode, read_text
from crepatrain.errors import Problem

VIDEO_KEYS = ("video", "file_name", "path", "file", "image")
CAPTION_KEYS = ("caption", "text", "prompt")
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


@dataclass(frozen=True)
class _Row:
    number: int
    line: int
    values: dict[str, Any]


def read_list(file: Path) -> tuple[list[Entry], list[Problem]]:
    """The entries that name a file, and all that is wrong with any."""
    try:
        text = read_text(file)
        rows = _csv_rows(text) if file.suffix.lower() == ".csv" else _json_rows(text)
        entries, problems = _entries(file, rows)
    except Mistake as mistake:
        return [], [Problem(f"{file}: {mistake.what}", mistake.fix)]
    if not entries and not problems:
        example = _EXAMPLE if file.suffix.lower() == ".jsonl" else 'write the header "video,caption"'
        problems = [Problem(f"{file}: the list is empty", f"{example}, and a line for each clip")]
    if len(problems) > _MOST_PROBLEMS:
        more = len(problems) - _MOST_PROBLEMS
        problems = [*problems[:_MOST_PROBLEMS], Problem(f"{file}: {more} more entries can't be used", "correct them as well")]
    return entries, problems


def _entries(file: Path, rows: Iterable[_Row | tuple[int, int, Mistake]]) -> tuple[list[Entry], list[Problem]]:
    """The entries that name a file; the caption of one whose caption can't be used is empty, and among the problems."""
    entries: list[Entry] = []
    problems: list[Problem] = []

    def problem(where: str, mistake: Mistake) -> None:
        problems.append(Problem(f"{where}: {mistake.what}", mistake.fix))

    for row in rows:
        number, line = (row.number, row.line) if isinstance(row, _Row) else row[:2]
        where = f"{file}, entry {number} (line {line})"
        if not isinstance(row, _Row):
            problem(where, row[2])
            continue
        try:
            video = _video(row.values)
        except Mistake as mistake:
            problem(where, mistake)
            continue
        try:
            caption = as_caption(_text(row.values, CAPTION_KEYS, "caption") or "")
        except Mistake as mistake:
            problem(where, mistake)
            caption = ""
        entries.append(Entry(where, number, video, caption))
    return entries, problems


def _video(values: dict[str, Any]) -> str:
    video = (_text(values, VIDEO_KEYS, "file's name") or "").strip()
    if not video:
        raise Mistake("no video", f"give the file's name as one of {', '.join(VIDEO_KEYS)}")
    if "\0" in video or not is_unicode(video):
        raise Mistake("the file's name holds what is no character", "correct the name")
    return video


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
            "line 1 is not an object, as all of it is one JSON array", f"{_EXAMPLE} on each line, without brackets around them"
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
