"""Writing a file so that it is whole or not there."""

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Python tells it only by setting it, which other threads would see; so once, at the beginning.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


# What ends the name of a file or folder that is not whole yet, or not any more.
UNFINISHED = ".tmp"


def unfinished_name(path: Path) -> Path:
    """Where a folder is written until it is whole, and where it is moved before it is removed."""
    return path.with_name(f"{path.name}{UNFINISHED}")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of `path` once it is whole and on the disk; folders are made on the way.

    Raises:
        OSError: it can't be written; `path` is as it was.
    """
    # Processes and threads may write the same file at once: each its own, and the last one stays.
    aside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        share(aside)
        flush(aside)
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def safetensors_header(path: Path) -> dict[str, Any] | None:
    """What a safetensors file says of its tensors, by name, and under `__metadata__`; None of others, and of one cut off."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            header = json.loads(file.read(length)) if length < size else None
    except (OSError, ValueError, RecursionError):
        return None
    if not header or not isinstance(header, dict):
        return None
    ends = [_end(tensor) for name, tensor in header.items() if name != "__metadata__"]
    return header if size == 8 + length + max(ends, default=0) else None


def _end(tensor: object) -> float:
    """Where a tensor of a header ends, in bytes after the header; beyond every file where the header does not tell."""
    match tensor:
        case {"data_offsets": [int(), int(end)]}:
            return end
        case _:
            return math.inf


def share(path: Path) -> None:
    """Let a file be read by those who may read what the user writes; safetensors keeps its own to their owner."""
    with contextlib.suppress(PermissionError):  # a disk of another system has permissions of its own
        path.chmod(0o666 & ~_UMASK)


def flush(path: Path) -> None:
    """Make sure that a file's content is on the disk."""
    with path.open("r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())
