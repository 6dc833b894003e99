"""Which files and captions a dataset names, and which of them can't be used."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from crepatrain.data.lists import CAPTION_KEYS, WHOLE, Entry, Part, read_list, read_pair
from crepatrain.data.search import existing, in_words, is_folder, printable, search
from crepatrain.data.texts import Mistake, as_caption, expect_regular, expect_unicode_name, read_text
from crepatrain.errors import Problem, UserError

_LISTS = ("metadata.jsonl", "metadata.csv", "metadata.json")
# A list of files and a list of their captions, line by line.
_PAIR = ("videos.txt", "prompts.txt")
_MOST_NAMES = 100


@dataclass(frozen=True)
class Refusal:
    """A file that can't be used, why, and what to do about it."""

    path: Path
    reason: str
    remedy: str = "repair or remove it"


@dataclass(frozen=True)
class ListedClip:
    """A video or image file that a dataset names.

    Attributes:
        caption: None where there is none.
        name: of the file below the dataset's folder, or as the list has it.
        source: where its caption stands, or would.
        entry: its number in a list, from 1; None in a folder.
        part: of the file.
    """

    path: Path
    caption: str | None
    name: str
    source: str
    entry: int | None = None
    part: Part = WHOLE


@dataclass(frozen=True)
class Listed:
    """What a dataset names.

    Attributes:
        clips: in a stable order.
        refused: what is named as a clip and is no regular file.
        problems: all that is wrong with its lists, captions and folders.
        notes: on what is there and not used.
        by: the list that names the clips; None of a folder.
        key: of the config, that names the dataset.
    """

    clips: tuple[ListedClip, ...]
    refused: tuple[Refusal, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    by: Path | None = None
    key: str = "train_data"


@dataclass(frozen=True)
class CaptionedClip:
    """A clip with the caption that is trained on, and where that stands."""

    path: Path
    caption: str
    source: str
    part: Part = WHOLE


@dataclass(frozen=True)
class Captioned:
    """The clips of a dataset with their captions.

    Attributes:
        refused: clips that are left out for want of a caption.
        problems: clips that must have a caption and have none. They stand among the clips all the same, so that whatever else
            is wrong with them is found as well.
    """

    clips: tuple[CaptionedClip, ...]
    refused: tuple[Refusal, ...]
    problems: tuple[Problem, ...]


def list_clips(train_data: Path, key: str = "train_data", apart: Callable[[Path], bool] = lambda _: False) -> Listed:
    """Find the video and image files of a dataset, and their captions.

    Args:
        train_data: a folder (searched below it too; captions in NAME.txt, or in a list in it), or such a list.
        key: of the config, that says so.
        apart: whether a folder below it is none of the dataset.
    """
    return replace(_listed(train_data, key, apart), key=key)


def _listed(train_data: Path, key: str, apart: Callable[[Path], bool]) -> Listed:
    if not train_data.is_dir():
        return _listed_by(train_data)
    lists = [path for name in _LISTS for path in _named(train_data, name)]
    if lists:
        listed = _listed_by(lists[0])
        return replace(listed, notes=tuple(_unlisted(train_data, lists, listed, apart)))
    pair = [_named(train_data, name) for name in _PAIR]
    if all(pair):
        return _listed_in(pair[0][0], *read_pair(pair[0][0], pair[1][0]))
    found = search(train_data, apart)
    clips: list[ListedClip] = []
    refused: list[Refusal] = []
    problems = list(found.problems)
    for path, text in found.clips:
        name = printable(path.relative_to(train_data))
        source = text or path.with_suffix(".txt")
        try:
            expect_regular(path)
            expect_unicode_name(path)
        except Mistake as mistake:
            refused.append(Refusal(Path(printable(path)), mistake.what, mistake.fix))
            continue
        try:
            caption = None if text is None else as_caption(read_text(text))
        except Mistake as mistake:
            problems.append(Problem(f"{printable(source)}: {mistake.what}", mistake.fix))
            caption = ""  # this clip's caption has had its message
        clips.append(ListedClip(path, caption, name, printable(source.relative_to(train_data))))
    notes = [*found.notes, *([in_words(found.left_out)] if found.left_out else [])]
    if not found.clips and not problems:
        instead = f" ({notes.pop()})" if found.left_out else ""
        what = f"{key}={train_data}: no video files or images in it{instead}"
        problems.append(
            Problem(what, "put clips (.mp4, .mov, .mkv, .webm or another container of FFmpeg's) and NAME.txt captions into it")
        )
    return Listed(tuple(clips), tuple(refused), tuple(problems), tuple(notes))


def _named(folder: Path, name: str) -> list[Path]:
    """The files of that name in any case, the exact one first; a folder is none of them."""
    try:
        alike = [entry.name for entry in os.scandir(folder) if entry.name.lower() == name and not is_folder(entry)]
    except OSError:  # which the search reports
        return []
    return [folder / found for found in sorted(alike, key=lambda found: (found != name, found))]


def _listed_by(file: Path) -> Listed:
    return _listed_in(file, *read_list(file))


def _listed_in(file: Path, entries: Sequence[Entry], problems: list[Problem]) -> Listed:
    clips: list[ListedClip] = []
    refused: list[Refusal] = []
    seen: dict[tuple[Path, float, float | None], int] = {}
    for entry in entries:
        path = existing(file.parent / entry.video)
        try:
            expect_regular(path)
        except Mistake as mistake:
            refused.append(Refusal(path, f"{mistake.what} (entry {entry.number} of {file.name})", mistake.fix))
            continue
        first = seen.setdefault((path.resolve(), entry.part.start, entry.part.end), entry.number)
        if first != entry.number:
            what = f"{entry.where}: {entry.video}{entry.part} is entry {first} already"
            problems.append(Problem(what, "remove one of the two; to train a clip under two captions, list a copy of it"))
            continue
        source = f"{file.name}, entry {entry.number}"
        clips.append(ListedClip(path, entry.caption, entry.video, source, entry.number, entry.part))
    return Listed(tuple(clips), tuple(refused), tuple(problems), by=file)


def _unlisted(folder: Path, lists: Sequence[Path], listed: Listed, apart: Callable[[Path], bool]) -> list[str]:
    """Notes on what lies beside a list and is not used."""
    used = {clip.path.resolve() for clip in listed.clips}
    extra = [path for path, _ in search(folder, apart).clips if path.resolve() not in used]
    notes = [f"{path.name} is not read, as {lists[0].name} is" for path in lists[1:]]
    if extra and not listed.problems:
        shown = _names([printable(path.relative_to(folder)) for path in extra], 3)
        notes.append(
            f"{len(extra)} clip{'s' * (len(extra) != 1)} in the folder left out, as {lists[0].name} does not list them: {shown}"
        )
    return notes


def choose_captions(
    listed: Listed, missing: Literal["error", "empty", "filename", "skip"], *, prefix: str = "", suffix: str = ""
) -> Captioned:
    """A caption for every clip, by the rule of `missing_captions`.

    Args:
        prefix, suffix: text before and after every caption, as it is.
    """
    without = [clip for clip in listed.clips if clip.caption is None]
    spoken = {"filename": lambda path: " ".join(path.stem.replace("_", " ").replace("-", " ").split())}
    say = spoken.get(missing, lambda _: "")
    clips = tuple(
        CaptionedClip(
            clip.path,
            f"{prefix}{say(clip.path) if clip.caption is None else clip.caption}{suffix}",
            clip.name if clip.caption is None else clip.source,
            clip.part,
        )
        for clip in listed.clips
        if clip.caption is not None or missing != "skip"
    )
    refused = tuple(Refusal(clip.path, "no caption") for clip in without if missing == "skip")
    problems = (_no_caption(listed, without),) if without and missing == "error" else ()
    return Captioned(clips, refused, problems)


def _no_caption(listed: Listed, without: Sequence[ListedClip]) -> Problem:
    """One message of all clips without a caption, with a remedy where captions are looked for."""
    if listed.by is None:
        remedy = f"write {without[0].source}" if len(without) == 1 else "write a NAME.txt beside each"
    elif len(without) == len(listed.clips):
        kind = "column" if listed.by.suffix.lower() == ".csv" else "key"
        remedy = f"give every entry of {listed.by.name} a caption, in a {kind} named one of {', '.join(CAPTION_KEYS)}"
    else:
        numbers = _names([str(clip.entry) for clip in without], _MOST_NAMES)
        remedy = f"give {'entry' if len(without) == 1 else 'entries'} {numbers} of {listed.by.name} a caption"
    dataset = "" if listed.key == "train_data" else f"{listed.key}: "
    return Problem(
        f"{dataset}{_names([clip.name for clip in without], _MOST_NAMES)}: no caption",
        f"{remedy}, or set missing_captions to empty, filename or skip",
    )


def _names(names: Sequence[str], limit: int) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def refusal_error(refused: Sequence[Refusal]) -> UserError:
    """Every refused file, in one error."""
    return UserError.of(
        [Problem(f"{refusal.path}: {refusal.reason}", f"{refusal.remedy}, or set unusable_clips to skip") for refusal in refused]
    )
