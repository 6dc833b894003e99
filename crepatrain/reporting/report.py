"""A run, or several beside each other, as one HTML file."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from crepatrain.errors import UserError
from crepatrain.files import written_aside
from crepatrain.records.events import Ended, VideosMade
from crepatrain.records.reading import read_run, told_apart
from crepatrain.reporting.page import page
from crepatrain.screen import Screen

REPORT_FILE = "report.html"
# More curves than that can't be told apart by their colour.
_MOST_RUNS = 8


def report(roots: Sequence[Path], output: Path | None, screen: Screen) -> None:
    """Write the report of some runs.

    Args:
        roots: their folders.
        output: the file; None: report.html in the folder of a single run, or here for several.

    Raises:
        UserError: a folder holds no run, or one that is damaged or has logged nothing, or was given twice.
    """
    if len(roots) > _MOST_RUNS:
        raise UserError(f"{len(roots)} runs were given", f"compare {_MOST_RUNS} at most")
    path = output or (roots[0] / REPORT_FILE if len(roots) == 1 else Path(REPORT_FILE))
    write_report(roots, path)
    screen.say(f"{path}: open it in a browser")


def refresh_report(root: Path) -> None:
    """Bring a run's own report up to date; nothing is done for a run that has logged nothing yet."""
    if (root / "metrics.jsonl").is_file():
        write_report([root], root / REPORT_FILE)


class LiveReport:
    """Keeps a run's own report up to date while it trains; that it can't be written ends nothing."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, event: object) -> None:
        if isinstance(event, (VideosMade, Ended)):
            with contextlib.suppress(UserError):
                refresh_report(self._root)


def write_report(roots: Sequence[Path], path: Path) -> None:
    """The report of some runs, as a file that is whole or as it was.

    Raises:
        UserError: a run is damaged or has logged nothing, or the file can't be written.
    """
    runs = told_apart([read_run(root) for root in roots])
    for run in runs:
        if not run.lines:
            raise UserError(f"{run.root / 'metrics.jsonl'}: no step is logged there", "wait for the run's first steps")
    text = page(runs)
    try:
        with written_aside(path) as aside:
            aside.write_text(text, encoding="utf-8", errors="replace")  # paths may hold what is no text
    except OSError as error:
        raise UserError(f"{path} can't be written ({error})", "free disk space, or give another --output") from error
