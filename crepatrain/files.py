"""Writing a file so that it is whole or not there."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

# Python tells it only by setting it, which other threads would see; so once, at the beginning.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of `path` once it is whole and on the disk; folders are made on the way.

    Raises:
        OSError: it can't be written; `path` is as it was.
    """
    # Processes and threads may write the same file at once: each its own, and the last one stays.
    aside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
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


def share(path: Path) -> None:
    """Let a file be read by those who may read what the user writes; safetensors keeps its own to their owner."""
    path.chmod(0o666 & ~_UMASK)


def flush(path: Path) -> None:
    """Make sure that a file's content is on the disk."""
    with path.open("r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())
