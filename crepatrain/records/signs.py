"""Signs of life of a run: whose process writes in its folder, when it last did, and whether it still holds the folder's lock."""

import contextlib
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def signs_of_life() -> dict[str, Any]:
    """Of this process, as status.json holds them."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "heartbeat": datetime.now(UTC).isoformat(timespec="seconds")}


def is_of_this_host(status: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a status.json ran on this machine."""
    return status.get("host") == socket.gethostname()


def heartbeat_of(status: Mapping[str, Any]) -> float | None:
    """When a status.json was written, in seconds since 1970 by its writer's clock; None where it does not say."""
    try:
        return datetime.fromisoformat(status["heartbeat"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def is_locked(lock: Path) -> bool | None:
    """Whether a process holds the lock; None where that can't be known. Makes no file, and needs no right to write one."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a disk that knows no locks
        return None
    finally:
        os.close(descriptor)
    return False


def holder_of(lock: Path) -> int | None:
    """The process of this machine that holds the lock; None where there is none, or where the system does not say."""
    try:
        own = lock.stat()
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        # 1: FLOCK  ADVISORY  WRITE 4711 fe:01:1234567 0 EOF
        match line.split():
            case [_, "FLOCK", _, "WRITE", pid, place, *_] if place.endswith(f":{own.st_ino}") and _has_open(pid, own):
                return int(pid)
    return None


def _has_open(pid: str, file: os.stat_result) -> bool:
    """Whether a process has a file open: the inode that a line names may be of another disk."""
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        for opened in Path("/proc", pid, "fd").iterdir():
            with contextlib.suppress(OSError):
                stat = opened.stat()
                if (stat.st_dev, stat.st_ino) == (file.st_dev, file.st_ino):
                    return True
    return False


# Device and inode of the lock files that this process holds.
_held: dict[Path, tuple[int, int]] = {}


def keep_from_children(lock: Path) -> None:
    """Let no child that is forked from now on hold this lock: a reader may outlive a run that is killed by seconds."""
    with contextlib.suppress(OSError):
        stat = lock.stat()
        _held[lock] = (stat.st_dev, stat.st_ino)


def is_given_back(lock: Path) -> None:
    """The lock is not held any more."""
    _held.pop(lock, None)


def _let_go() -> None:
    """In a forked child: put nothing in the place of the lock files that it has inherited."""
    if not _held:
        return
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # a system without /proc
        for own in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError):
                stat = os.fstat(int(own.name))
                if (stat.st_dev, stat.st_ino) in _held.values():
                    os.dup2(nothing, int(own.name), inheritable=False)
    os.close(nothing)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
