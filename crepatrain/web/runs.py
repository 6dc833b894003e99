"""The runs below a folder, as a list that stays up whatever one of them holds."""

from dataclasses import dataclass
from pathlib import Path

from crepatrain.errors import UserError
from crepatrain.records.layout import RunLayout
from crepatrain.records.reading import RunRecord, read_run
from crepatrain.records.standing import numbers_of, progress_of, state_of
from crepatrain.web.confinement import Folders
from crepatrain.web.processes import Processes


@dataclass(frozen=True)
class Row:
    """A run in the list.

    Attributes:
        name: its path below the folder of runs.
        state: one word: running, completed, stopped, failed, starting, or damaged.
        words: where it stands, or what is wrong with it.
    """

    name: str
    state: str
    words: str
    progress: str = ""
    numbers: str = ""


@dataclass(frozen=True)
class _Seen:
    """What a run's record was read from: the times and sizes of its files."""

    marks: tuple[tuple[int, int] | None, ...]
    record: RunRecord


class Runs:
    """Reads runs, and reads one again only when its files have changed."""

    def __init__(self, folders: Folders, processes: Processes) -> None:
        self._folders = folders
        self._processes = processes
        self._seen: dict[str, _Seen] = {}

    def read(self, name: str) -> RunRecord:
        """The record of a run.

        Raises:
            UserError: there is none, or it is damaged.
        """
        root = self._folders.run(name)
        layout = RunLayout(root)
        files = (layout.config_file, layout.status_file, layout.metrics, layout.dataset_file, layout.best_file, layout.changes)
        marks = tuple(map(_mark, files))
        seen = self._seen.get(name)
        if seen is None or seen.marks != marks:
            seen = self._seen[name] = _Seen(marks, read_run(root))
        return seen.record

    def rows(self) -> list[Row]:
        """Every run; the one that was written to last comes first."""
        names = self._folders.run_names()
        for gone in self._seen.keys() - set(names):
            self._seen.pop(gone, None)
        order = {name: written_at(RunLayout(self._folders.runs / name).status_file) for name in names}
        waiting = [self._pending(name) for name in self._processes.pending()]
        return waiting + [self._row(name) for name in sorted(names, key=lambda name: (-order[name], name))]

    def _pending(self, name: str) -> Row:
        if self._processes.is_at_work(self._folders.runs / name):
            return Row(name, "starting", "its clips are read and encoded")
        return Row(name, "failed", "it ended before its first step: see its log")

    def _row(self, name: str) -> Row:
        try:
            run = self.read(name)
            state = run.status.get("status", "not started")
            words = state_of(run)
            if state == "running" and words.startswith("it ended"):
                state = "ended"
            elif state != "running" and self._processes.is_at_work(run.root):
                state = "starting"
            return Row(name, state, words, progress_of(run), numbers_of(run))
        except UserError as error:
            return Row(name, "damaged", error.problems[0].what)
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
            return Row(name, "damaged", f"{type(error).__name__}: {error}")


def written_at(path: Path) -> int:
    """When a file was last written to, in nanoseconds; 0 where it is not there."""
    mark = _mark(path)
    return mark[0] if mark else 0


def _mark(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
