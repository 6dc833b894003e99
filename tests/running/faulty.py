"""crepatrain with a fault, run as a program of its own: python faulty.py FAULT fit CONFIG.

FAULT is `full NAME`: no file of that name can be written, as on a full disk; or `assertion STEP`: an error that nobody expected
in the step after that.
"""

import errno
import fnmatch
import os
import sys
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


def assert_after(step: int) -> None:
    from crepatrain.running import loop

    settle = loop._settle

    def broken(run: Any, launched: Any) -> None:
        settle(run, launched)
        assert launched.step < step, "nobody expected this"

    loop._settle = broken


if __name__ == "__main__":
    kind, _, what = sys.argv[1].partition(" ")
    sys.argv = ["crepatrain", *sys.argv[2:]]
    from crepatrain.cli import main

    {"full": fill_disk_for, "assertion": lambda step: assert_after(int(step))}[kind](what)
    main()
