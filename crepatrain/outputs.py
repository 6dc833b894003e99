"""Where a command is asked to write, checked before anything is loaded."""

import tempfile
from pathlib import Path

from crepatrain.errors import UserError

# Names in a run's folder by which it is recognised as one.
RUN_CONFIG_FILE = "config.json"
RUN_STATUS_FILE = "status.json"
RUN_METRICS_FILE = "metrics.jsonl"


def is_run(folder: Path) -> bool:
    """Whether a folder is one that `fit` wrote."""
    return (folder / RUN_CONFIG_FILE).is_file() and any((folder / name).is_file() for name in (RUN_STATUS_FILE, RUN_METRICS_FILE))


def expect_nothing_at(output: Path, argument: str) -> None:
    """Make sure that nobody's files would be replaced; an empty folder may be there.

    Args:
        argument: name of the option or argument that gave it.

    Raises:
        UserError: it already exists.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{argument} {output}: it already exists", "give a new name")


def expect_writable(output: Path) -> None:
    """Try to write beside a file or folder that is to be made; the folders above it are made.

    Raises:
        UserError: it can't be written there.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output if output.is_dir() else output.parent):
            pass
    except OSError as error:
        raise UserError(f"--output {output}: it can't be written ({error.strerror})", "give another --output") from error
