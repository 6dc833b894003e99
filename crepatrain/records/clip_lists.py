"""The clips of a run as its folder lists them, and how two such lists differ. No torch."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

# Clips that a message names of each kind.
_NAMED = 5

# The keys of allow_changes by which a difference may be meant.
_CAPTIONS = frozenset({"train_data", "caption_prefix", "caption_suffix", "missing_captions"})
_CLIPS = frozenset({"train_data", "missing_captions", "unusable_clips", "max_windows_per_clip"})
_CUT = frozenset({"train_data", "max_windows_per_clip"})


class ListedClip(BaseModel, frozen=True):
    """A clip of a list.

    Attributes:
        file: its path, from the folder of the dataset where it is in it.
        content: digest of the file.
        caption: digest of the caption.
        cut: digest of the windows that are cut from it.
    """

    model_config = ConfigDict(strict=True)

    file: str
    content: str
    caption: str
    cut: str


_List = TypeAdapter(list[ListedClip])


@dataclass(frozen=True)
class Difference:
    """One kind of difference between two lists, for people.

    Attributes:
        keys: of these allow_changes has to name one for it.
    """

    words: str
    keys: frozenset[str]


def read_clip_list(path: Path) -> list[ListedClip] | None:
    """A list that a run has written; None where there is none that can be read: an earlier version wrote none."""
    try:
        return _List.validate_python(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError, ValidationError):
        return None


def differences(before: Sequence[ListedClip], now: Sequence[ListedClip]) -> list[Difference]:
    """What happened to a dataset, clip by clip, where its samples are not the same any more."""
    known, present = ({clip.file: clip for clip in clips} for clips in (before, now))
    gone = [clip for clip in before if clip.file not in present]
    renamed: dict[str, ListedClip] = {}
    unclaimed = Counter(clip.content for clip in gone)
    for clip in now:
        if clip.file not in known and unclaimed[clip.content]:
            unclaimed[clip.content] -= 1
            renamed[clip.file] = next(old for old in gone if old.content == clip.content and old not in renamed.values())
    pairs = [(known.get(clip.file) or renamed[clip.file], clip) for clip in now if clip.file in known or clip.file in renamed]
    taken = {old.file for old in renamed.values()}
    found = [
        _difference("added", [clip.file for clip in now if clip.file not in known and clip.file not in renamed], _CLIPS),
        _difference("removed", [clip.file for clip in gone if clip.file not in taken], _CLIPS),
        _difference("renamed", [f"{old.file} to {clip.file}" for old, clip in pairs if old.file != clip.file], _CLIPS),
        _difference("with another content", [clip.file for old, clip in pairs if old.content != clip.content], {"train_data"}),
        _difference("with another caption", [clip.file for old, clip in pairs if old.caption != clip.caption], _CAPTIONS),
        _difference(
            "cut into other windows", [c.file for old, c in pairs if old.cut != c.cut and old.content == c.content], _CUT
        ),
    ]
    listed = [difference for difference in found if difference]
    return listed or [Difference("the clips stand in another order", frozenset({"train_data"}))]


def _difference(how: str, files: Sequence[str], keys: frozenset[str] | set[str]) -> Difference | None:
    if not files:
        return None
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    clips = "1 clip" if len(files) == 1 else f"{len(files)} clips"
    return Difference(f"{clips} {how} ({', '.join(files[:_NAMED])}{more})", frozenset(keys))


def as_plain(clips: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """A list as its file holds it.

    Args:
        clips: the fields of a `ListedClip` of each.
    """
    return [ListedClip.model_validate(clip).model_dump() for clip in clips]
