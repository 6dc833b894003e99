"""Ctrl-C and SIGTERM: a request to stop, which the work checks between two steps."""

import os
import signal
from types import FrameType


class Stopped(Exception):
    """The user or the system asked to stop, at a moment when nothing is lost. Exit code 3."""


class StopSignal:
    """Within the context the first SIGINT or SIGTERM only sets `requested`; the second one ends the process as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self, what: str) -> None:
        """Raise Stopped if a signal has come."""
        if self.requested:
            raise Stopped(what)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        os.write(2, b"\nstopping at the next safe moment; a second signal ends it at once, without saving\n")
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)
