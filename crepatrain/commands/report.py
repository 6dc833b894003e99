"""The report of some runs, with the alignment map where it is asked for."""

from collections.abc import Sequence
from pathlib import Path

from crepatrain.config.run_config import unknown_keys
from crepatrain.errors import UserError
from crepatrain.records.layout import REPORT_FILE, RunLayout
from crepatrain.records.reading import note_unknown_keys, read_run
from crepatrain.reporting.report import MOST_RUNS, write_report
from crepatrain.screen import Screen


def report(roots: Sequence[Path], output: Path | None, screen: Screen, *, with_map: bool = False) -> None:
    """Write the report of some runs.

    Args:
        roots: their folders.
        output: the file; None: report.html in the folder of a single run, or here for several.
        with_map: load each run's model, and measure where in the picture it agrees with the teacher.

    Raises:
        UserError: a folder holds no run, or one that is damaged or has logged nothing, or was given twice.
    """
    if len(roots) > MOST_RUNS:
        raise UserError(f"{len(roots)} runs were given", f"compare {MOST_RUNS} at most")
    if with_map:
        from crepatrain.commands.alignment_map import write_alignment_map

        for root in roots:
            write_alignment_map(root, screen)
    else:
        for root in roots:
            note_unknown_keys(RunLayout(root), unknown_keys(read_run(root).config), screen)
    path = output or (RunLayout(roots[0]).report_file if len(roots) == 1 else Path(REPORT_FILE))
    write_report(roots, path)
    screen.say(f"{path}: open it in a browser")
