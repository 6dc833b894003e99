"""The clips of a dataset with their captions, as far as they lie in the page's folders; a caption is written into its file."""

from dataclasses import dataclass, replace
from pathlib import Path

from crepatrain.config.datasets import LISTS, read_datasets
from crepatrain.data.listing import list_clips
from crepatrain.errors import UserError
from crepatrain.files import written_aside
from crepatrain.web.confinement import Folders

_LONGEST_CAPTION = 20_000


@dataclass(frozen=True)
class Shown:
    """A clip on the page.

    Attributes:
        name: of the file below the dataset's folder, or as its list has it.
        caption: None where there is none.
        file: what holds the caption, or would; None where a list does, which the page does not write.
    """

    path: Path
    name: str
    caption: str | None
    file: Path | None


@dataclass(frozen=True)
class Clips:
    """What is shown of a dataset.

    Attributes:
        notes: what is wrong with it, or left out.
    """

    clips: tuple[Shown, ...]
    notes: tuple[str, ...]

    @property
    def without_caption(self) -> tuple[Shown, ...]:
        """The clips that have none."""
        return tuple(clip for clip in self.clips if clip.caption is None)

    def with_caption(self, clip: Shown, caption: str) -> "Clips":
        """The same, but for the caption of one clip."""
        clips = tuple(replace(one, caption=caption or None) if one.path == clip.path else one for one in self.clips)
        return replace(self, clips=clips)


def read_clips(folders: Folders, train_data: Path) -> Clips:
    """The clips of a dataset, or of all that a file names.

    Raises:
        UserError: one, or a list in it, lies outside of the page's folders; or the file can't be read.
    """
    if not folders.holds(train_data):
        raise UserError(f"{train_data}: outside of the folders of this page", "start the page with another --data")
    read = [_read(folders, dataset.path) for dataset in read_datasets(str(train_data))]
    return Clips(tuple(clip for each in read for clip in each.clips), tuple(note for each in read for note in each.notes))


def _read(folders: Folders, train_data: Path) -> Clips:
    listing = [path for path in train_data.iterdir() if path.suffix.lower() in LISTS] if train_data.is_dir() else []
    for path in (train_data, *listing):
        if not folders.holds(path):
            raise UserError(f"{path}: outside of the folders of this page", "start the page with another --data")
    if not train_data.exists():
        return Clips((), (f"{train_data} does not exist",))
    found = list_clips(train_data)
    clips, outside = [], 0
    for clip in found.clips:
        file = None if clip.entry is not None else train_data / clip.source
        if folders.holds(clip.path) and (file is None or folders.holds(file)):
            clips.append(Shown(clip.path, clip.name, clip.caption, file))
        else:
            outside += 1
    notes = [*(problem.what for problem in found.problems), *(f"{one.path}: {one.reason}" for one in found.refused), *found.notes]
    if outside:
        notes.append(f"{outside} clips are not shown, as links lead outside of the folders of this page")
    return Clips(tuple(clips), tuple(notes))


def write_caption(folders: Folders, clip: Shown, text: str) -> None:
    """Write a clip's caption into the file beside it.

    Raises:
        UserError: a list holds the caption, or the file can't be written.
    """
    if clip.file is None:
        raise UserError(f"{clip.name}: its caption stands in a list", "change the list")
    if len(text) > _LONGEST_CAPTION:
        raise UserError(f"{clip.name}: the caption has {len(text)} characters", f"use {_LONGEST_CAPTION} at most")
    if not folders.holds(clip.file) or clip.file.suffix.lower() != ".txt":
        raise UserError(f"{clip.file}: outside of the folders of this page", "start the page with another --data")
    try:
        with written_aside(clip.file) as aside:
            aside.write_text(" ".join(text.split()) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{clip.file} can't be written ({error})", "free disk space, or fix its permissions") from error
