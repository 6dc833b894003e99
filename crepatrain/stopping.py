"""Ctrl-C, a scheduler's signals, a terminal that is gone: a request to stop, which the work checks between two steps."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType


class Stopped(Exception):
    """The user or the system asked to stop, at a moment when nothing is lost. Exit code 3."""


# Ctrl-C and what a scheduler or a launcher sends: a second one is meant to end the process at once.
_ENDING = (signal.SIGINT, signal.SIGTERM)
# A terminal that closes, and a scheduler's warning: they only ask, however often they come. Windows has neither.
_ASKING = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))
# One request reaches a process more than once: from its group, from its launcher, from the shell that a terminal has left.
_ONE_REQUEST_SECONDS = 1.0


class StopSignal:
    """Within the context a signal only sets `requested`; a second SIGINT or SIGTERM, a second after the first, ends the process.

    A SIGHUP that was ignored before, as nohup sees to, stays ignored.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, signal._HANDLER] = {}
        self._wakes: tuple[int, int] | None = None
        self._woken_before = -1

    def __enter__(self) -> "StopSignal":
        # Python calls a handler between two lines of Python, which a device that hangs never reaches; a thread hears it at once.
        reads, writes = self._wakes = os.pipe()
        os.set_blocking(writes, False)
        self._woken_before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        threading.Thread(target=_end_at_the_second, args=(reads,), daemon=True).start()
        for number in (*_ENDING, *_ASKING):
            if number in _ASKING and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # Behind a request the process is about to end, with an exit code that a terminal's second hang-up must not change.
            signal.signal(number, signal.SIG_IGN if self.requested and number in _ASKING else handler)
        signal.set_wakeup_fd(self._woken_before)
        assert self._wakes is not None
        os.close(self._wakes[1])  # the thread reads its end, and ends

    def check(self, what: str) -> None:
        """Raise Stopped if a signal has come."""
        if self.requested:
            raise Stopped(what)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self.requested:
            again = "; a second signal ends it at once, without saving" if number in _ENDING else ""
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"\nstopping at the next safe moment{again}\n".encode())
        self.requested = True


def _end_at_the_second(reads: int) -> None:
    """Read the numbers of the signals that come, and end the process at the second request to end."""
    first: float | None = None
    with os.fdopen(reads, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] not in _ENDING:
                continue
            now = time.monotonic()
            if first is None:
                first = now
            elif now - first > _ONE_REQUEST_SECONDS:
                os._exit(128 + number[0])  # as a shell reports a process that the signal has ended


def leave_signals_to_the_parent() -> None:
    """In a child process: what reaches the whole group is for the parent, which ends its children when it has saved."""
    for number in (*_ENDING, *_ASKING):
        signal.signal(number, signal.SIG_IGN)
