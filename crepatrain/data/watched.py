"""Work that may never end, such as reading from a network folder that is gone, done where it can be left behind."""

import atexit
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Beat = Callable[[], None]

# Seconds without a sign of life. A slow disk gives a frame, or a piece of a file, far more often.
PATIENCE = 120.0
_LOOK = 0.5
# Seconds that the end of the process waits for work in the middle of a step of torch's, which the interpreter's end would abort.
_LAST_PATIENCE = 4.0


class GivenUp(Exception):
    """No sign of life for too long."""


class _Abandoned(BaseException):
    """Ends work that nobody waits for any more; no handler of the work itself may take it for its own."""


class Watched(Generic[Result]):
    """Work in a thread of its own, which ends with the process whatever it waits for.

    Args:
        work: is given what it has to call now and then as a sign of life.
    """

    def __init__(self, work: Callable[[Beat], Result]) -> None:
        self._work = work
        self._alive = time.monotonic()
        self._abandoned = False
        self._ended = threading.Event()
        self._result: Result | None = None
        self._error: BaseException | None = None
        _running.add(self)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._work(self._beat)
        except _Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            self._error = error
        finally:
            _running.discard(self)
            self._ended.set()

    def _beat(self) -> None:
        self._alive = time.monotonic()
        if self._abandoned:
            raise _Abandoned

    def result(self, patience: float) -> Result:
        """What the work gave.

        Args:
            patience: seconds without a sign of life after which it is left behind.

        Raises:
            GivenUp: it was left behind.
        """
        while not self._ended.wait(min(_LOOK, patience)):
            if time.monotonic() - self._alive > patience:
                self._abandoned = True
                raise GivenUp
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value] - None only where the work returns it

    def abandon(self) -> None:
        """Let it end at its next sign of life."""
        self._abandoned = True

    def wait(self, seconds: float) -> None:
        """Wait so long for its end, whatever its result."""
        self._ended.wait(seconds)


_running: set[Watched] = set()


@atexit.register
def _end_all() -> None:
    """A thread that comes back from C++ after the interpreter's end aborts the process; one in a system call harms nobody."""
    until = time.monotonic() + _LAST_PATIENCE
    left = list(_running)
    for watched in left:
        watched.abandon()
    for watched in left:
        watched.wait(max(0.0, until - time.monotonic()))


def read_ahead(
    work: Callable[[Item, Beat], Result], items: Iterable[Item], *, at_once: int
) -> Iterator[tuple[Item, Watched[Result]]]:
    """The items in their order with the work on each, of which some is done ahead."""
    waiting = iter(items)
    running: deque[tuple[Item, Watched[Result]]] = deque()
    given: Watched[Result] | None = None

    def begin(item: Item) -> None:
        running.append((item, Watched(lambda beat: work(item, beat))))

    try:
        while True:
            for item in itertools.islice(waiting, at_once - len(running)):
                begin(item)
            if not running:
                return
            item, given = running.popleft()
            yield item, given
    finally:
        for watched in (given, *(watched for _, watched in running)):
            if watched is not None:
                watched.abandon()
