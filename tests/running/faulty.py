"""crepatrain with a fault, run as a program of its own: python faulty.py FAULT fit CONFIG.

FAULT is `full NAME`: no file of that name can be written, as on a full disk; `assertion STEP`: an error that nobody expected
after that step; `hang STEP`: the first process waits for ever after it, as for a GPU whose other processes are gone;
`error STEP`: the second process alone meets something that the user has to repair.
"""

import errno
import fnmatch
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fill_disk_for(pattern: str) -> None:
    """Opening such a file to write, and renaming one that was written aside, fails."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & os.O_CREAT)
        elif event == "os.rename":
            path, writes = arguments[1], True
        else:
            return
        name = Path(os.fsdecode(path)).name
        if writes and (fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, f"{pattern}.*.tmp")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))

    sys.addaudithook(watch)


def after(step: int, fault: Callable[[int], None]) -> None:
    """Call a fault with the number of the process when that step is settled."""
    from crepatrain.running import loop

    settle = loop._settle

    def broken(run: Any, launched: Any) -> None:
        settle(run, launched)
        if launched.step >= step:
            fault(run.accelerator.process_index)

    loop._settle = broken


def fail(_process: int) -> None:
    raise AssertionError("nobody expected this")


def hang(process: int) -> None:
    if process == 0:
        Path("hanging").touch()
        time.sleep(10_000)


def meet_an_error(process: int) -> None:
    from crepatrain.errors import UserError

    if process == 1:
        raise UserError("clip.mp4: only the second process sees this", "put it back")


if __name__ == "__main__":
    kind, _, what = sys.argv[1].partition(" ")
    sys.argv = ["crepatrain", *sys.argv[2:]]
    from crepatrain.cli import main

    if kind == "full":
        fill_disk_for(what)
    else:
        after(int(what), {"assertion": fail, "hang": hang, "error": meet_an_error}[kind])
    main()
