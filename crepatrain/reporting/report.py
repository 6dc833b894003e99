"""A run, or several beside each other, as one HTML file: written when asked for, and kept up to date while a run goes on."""

from collections.abc import Callable, Sequence
from pathlib import Path

from crepatrain.errors import UserError
from crepatrain.files import written_aside
from crepatrain.records.events import Ended, Subscriber, VideosMade
from crepatrain.records.layout import RunLayout
from crepatrain.records.reading import read_run, with_distinct_names
from crepatrain.reporting.page import page

# The curves of more runs have colours that look alike.
MOST_RUNS = 8


def write_report(roots: Sequence[Path], path: Path) -> None:
    """Write the report of some runs, as a file that is either whole or as it was.

    Raises:
        UserError: a run is damaged or has logged nothing, or was given twice, or the file can't be written.
    """
    runs = with_distinct_names([read_run(root) for root in roots])
    for run in runs:
        if not run.lines:
            raise UserError(f"{run.layout.metrics}: no step is logged there", "wait for the run's first steps")
    text = page(runs)
    try:
        with written_aside(path) as aside:
            aside.write_text(text, encoding="utf-8", errors="replace")  # paths may hold bytes that are no text
    except OSError as error:
        raise UserError(f"{path} can't be written ({error})", "free disk space, or give another --output") from error


def refresh_report(root: Path) -> None:
    """Bring a run's own report up to date; nothing is done for a run that has logged nothing yet."""
    layout = RunLayout(root)
    if layout.metrics.is_file():
        write_report([root], layout.report_file)


def live_report(root: Path, note: Callable[[str], None]) -> Subscriber:
    """A subscriber that brings a run's own report up to date when videos were made, and when the training has ended.

    Args:
        note: what a report that can't be written is passed to; the training goes on.
    """

    def refresh(event: object) -> None:
        if isinstance(event, (VideosMade, Ended)):
            try:
                refresh_report(root)
            except UserError as error:
                if isinstance(error.__cause__, OSError):  # otherwise there is nothing to report yet, or damage that the end names
                    note(f"no report: {error.problems[0].what}")

    return refresh
