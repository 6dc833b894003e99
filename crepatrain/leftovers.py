"""Files and folders that a killed process has left half written, by their names."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from crepatrain.files import UNFINISHED

# As `written_aside` names them: with the process and the thread that write.
_WITH_PROCESS = re.compile(rf"(.+)\.(\d+)-\d+{re.escape(UNFINISHED)}")
# As safetensors names what it writes, until it is whole.
_OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")

# Untouched for so many seconds a file is given up where its process is not on this machine: it may be on another one.
_PROCESS_GONE = 600.0
# And where a process of its number is there, or none is named: the number may be another one's by now.
_PROCESS_UNKNOWN = 86400.0


def written_for(path: Path) -> str | None:
    """The name that a half written file would have got, empty where it does not tell; None of a file that is none."""
    match = _WITH_PROCESS.fullmatch(path.name)
    if match:
        return match.group(1)
    return "" if _OF_SAFETENSORS.fullmatch(path.name) else None


def is_abandoned(path: Path) -> bool:
    """Whether no process can be writing this half written file any more."""
    match = _WITH_PROCESS.fullmatch(path.name)
    patience = _PROCESS_GONE if match and not _is_alive(int(match.group(2))) else _PROCESS_UNKNOWN
    try:
        return time.time() - path.stat().st_mtime > patience
    except OSError:
        return False


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders; what can't be removed stays, and does no harm."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def remove_abandoned(root: Path) -> None:
    """Remove the files below a folder, which several commands share, that processes which are gone have left half written."""
    for folder, _, names in os.walk(root):
        found = (Path(folder, name) for name in names)
        remove([path for path in found if written_for(path) is not None and is_abandoned(path)])
