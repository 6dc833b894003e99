"""The real command as a program of its own, and all processes that it begins."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

FAULTY = Path(__file__).with_name("faulty.py")
_MARK = "TEST_COMMAND"


class Command:
    """`crepatrain fit CONFIG`, which prints to a file.

    Args:
        fault: as faulty.py takes it.
        launcher: what begins Python's part of the command line, such as torchrun.
    """

    def __init__(self, config: Path, log: Path, fault: str | None = None, launcher: Sequence[str] = ()) -> None:
        self.log = log
        self._mark = f"{_MARK}={uuid.uuid4()}"
        words = [str(FAULTY), fault] if fault else ["-m", "crepatrain"]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *words, "fit", str(config)],
                env=os.environ | {"OMP_NUM_THREADS": "1", _MARK: self._mark.partition("=")[2]},
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
            )

    def living(self, *variables: str) -> list[int]:
        """Its processes that have not ended, itself first.

        Args:
            variables: NAME=VALUE that a process has to have in its environment too.
        """
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                state = (folder / "stat").read_text().rpartition(") ")[2][0]
                has = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if state != "Z" and {self._mark, *variables} <= set(has):
                found.append(int(folder.name))
        return sorted(found, key=lambda pid: (pid != self.process.pid, pid))

    def readers(self) -> list[int]:
        return [pid for pid in self.living() if pid != self.process.pid]

    def expect_end(self) -> str:
        """It ends, and within five seconds all that it began; gives what it printed."""
        self.process.wait(timeout=120)
        for _ in range(50):
            if not self.living():
                break
            time.sleep(0.1)
        left = self.living()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left
        return self.log.read_text(encoding="utf-8")
