"""Searching a folder for clips and their captions."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crepatrain.data.pictures import IMAGE_SUFFIXES
from crepatrain.data.texts import is_unicode
from crepatrain.errors import Problem

# Containers that FFmpeg reads and that keep the time of every frame.
# fmt: off
VIDEO_SUFFIXES = frozenset(
    {
        ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".ivf", ".m1v", ".m2t",
        ".m2ts", ".m2v", ".m4v", ".mk3d", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpeg2", ".mpg", ".mpv", ".mts",
        ".mxf", ".nut", ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".wtv", ".y4m",
    }
)
# fmt: on
CLIP_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
_OF_THE_SYSTEM = frozenset({"thumbs.db", "desktop.ini", "icon\r"})
_NAMED = 3


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        clips: video and image files, in the order of their paths, each with its caption's file; None where it has none.
        left_out: files that are neither clips nor captions.
        notes: on folders that are not searched.
        problems: folders that can't be read.
    """

    clips: tuple[tuple[Path, Path | None], ...]
    left_out: tuple[Path, ...]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]


@dataclass
class _Search:
    root: Path
    apart: Callable[[Path], bool]
    clips: list[tuple[Path, Path | None]] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    searched: dict[Path, Path] = field(default_factory=dict)  # where a folder really is -> the path it was searched under
    links: list[Path] = field(default_factory=list)
    set_apart: list[str] = field(default_factory=list)

    def folder(self, folder: Path) -> None:
        """Search a folder and those in it; links to folders are kept for later, so that a file has its shortest path."""
        waiting = [folder]
        while waiting:
            folder = waiting.pop()
            self.searched[folder.resolve()] = folder
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                what = f"{printable(folder)}: the folder can't be read ({error.strerror})"
                self.problems.append(Problem(what, "make it readable, or move it elsewhere"))
                continue
            entries = [entry for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in _OF_THE_SYSTEM]
            folders = [entry for entry in entries if is_folder(entry)]
            self._files([folder / entry.name for entry in entries if entry not in folders])
            self.links += [folder / entry.name for entry in folders if entry.is_symlink()]
            waiting += [
                path for path in (folder / entry.name for entry in folders if not entry.is_symlink()) if self._belongs(path)
            ]

    def _belongs(self, folder: Path) -> bool:
        if self.apart(folder):
            self.set_apart.append(printable(folder.relative_to(self.root)))
            return False
        return True

    def _files(self, files: Sequence[Path]) -> None:
        clips = [path for path in files if path.suffix.lower() in CLIP_SUFFIXES]
        texts = [path for path in files if path.suffix.lower() == ".txt"]
        self.clips += zip(clips, captions_of(clips, texts), strict=True)
        self.left_out += [path for path in files if path.suffix.lower() not in {*CLIP_SUFFIXES, ".txt"}]

    def follow_links(self) -> None:
        while self.links:
            link = self.links.pop(0)
            real = link.resolve()
            name = printable(link.relative_to(self.root))
            if real in self.searched:
                same = self.searched[real].relative_to(self.root)
                self.notes.append(f"{name} is a link to a folder that is searched already, {same}: it is not searched again")
            elif self.root.resolve().is_relative_to(real):
                self.notes.append(f"{name} is a link to {printable(real)}, which holds this folder itself: it is not searched")
            elif self._belongs(link):
                self.folder(link)


def search(root: Path, apart: Callable[[Path], bool]) -> Found:
    """Find the clips in a folder, below it and behind links in it; what is hidden is not looked at.

    Args:
        apart: whether a folder below it is none of the dataset.
    """
    state = _Search(root, apart)
    state.folder(root)
    state.follow_links()
    clips = sorted(state.clips, key=lambda item: item[0])
    if state.set_apart:
        what = "the folder of a run or of a cache" if len(state.set_apart) == 1 else "folders of runs or of caches"
        state.notes.append(f"not searched for clips, as {what}: {', '.join(sorted(state.set_apart))}")
    return Found(tuple(clips), tuple(sorted(state.left_out)), tuple(state.notes), tuple(state.problems))


def captions_of(clips: Iterable[Path], texts: Iterable[Path]) -> list[Path | None]:
    """Of every clip of one folder NAME.txt, else a file that differs from it in the case of .txt or in its Unicode form."""
    exact = {text.name: text for text in texts}
    alike = {_composed(text.stem): text for text in sorted(exact.values(), reverse=True)}
    return [exact.get(f"{clip.stem}.txt") or alike.get(_composed(clip.stem)) for clip in clips]


def existing(path: Path) -> Path:
    """The path under which a named file is found, where the name has another Unicode form."""
    forms = (str(path), *(unicodedata.normalize(form, str(path)) for form in ("NFC", "NFD")))
    # Path.exists raises where a name is too long, or a folder may not be looked into.
    return next((Path(form) for form in forms if os.path.exists(form)), path)  # noqa: PTH110


def in_words(left_out: Sequence[Path]) -> str:
    """Files that are left out, by suffix, and a few by name: `3 files left out: 2 .heic, 1 .zip`."""
    counts = Counter(path.suffix.lower() for path in left_out).most_common()
    kinds = ", ".join(f"{count} {printable(Path(suffix)) if suffix else 'without a suffix'}" for suffix, count in counts)
    names = f" ({', '.join(printable(Path(path.name)) for path in left_out)})" if len(left_out) <= _NAMED else ""
    return f"{len(left_out)} file{'s' * (len(left_out) != 1)} left out: {kinds}{names}"


def printable(path: Path) -> str:
    """A path in characters that every terminal takes."""
    text = str(path)
    return text if is_unicode(text) else text.encode("utf-8", "backslashreplace").decode()


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _composed(stem: str) -> str:
    return unicodedata.normalize("NFC", stem)
