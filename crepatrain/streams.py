"""Standard output and error, which may end before the command does: a closed terminal, a pipe without a reader, a full disk."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

# Nothing will ever be read again at the other end.
_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Within it a write to a standard stream that fails is given up, rather than to end the work that wanted to say something."""
    before = sys.stdout, sys.stderr
    lasting = [stream and _Lasting(stream) for stream in before]  # None: closed before the command began
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        for stream in lasting:
            if stream:
                stream.settle()
        sys.stdout, sys.stderr = before


class _Lasting:
    """A text stream whose write and flush never fail for what lies behind it; in all else it is that stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def settle(self) -> None:
        """Give up what can't be written, so that Python does not fail over it when it ends."""
        try:
            self._stream.flush()
        except OSError:
            self._to_nowhere()

    def _give_up(self, error: OSError) -> None:
        if error.errno in _GONE:
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        """What is written from now on, by whatever library, goes nowhere."""
        with contextlib.suppress(OSError, ValueError):  # a stream in memory has no descriptor
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)
