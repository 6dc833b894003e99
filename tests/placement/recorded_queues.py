"""Queues that write down what they are given, and what must hold of that order on a device that does two things at once."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from crepatrain.placement.queues import InOrder, Queue

_NO_NUMBER = 255  # in every byte: NaN in bf16 and fp32

Log = list[tuple[Any, ...]]


class Recorded(InOrder):
    """Copies at once, which is the earliest that a device may.

    Attributes:
        log: (mark, queue, number), (wait, queue, number), (copy, buffer), (reads, buffer), (done, buffer); buffers by address.
    """

    def __init__(self) -> None:
        self.log: Log = []
        self._marks = 0

    def mark(self, queue: Queue) -> Any:
        self._marks += 1
        self.log.append(("mark", queue, self._marks))
        return self._marks

    def wait(self, queue: Queue, mark: Any) -> None:
        self.log.append(("wait", queue, mark))

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.log.append(("copy", target.untyped_storage().data_ptr()))
        super().copy(target, source)

    def reads(self, buffer: Tensor) -> None:
        self.log.append(("reads", buffer.data_ptr()))

    def done(self, buffer: Tensor) -> None:
        self.log.append(("done", buffer.data_ptr()))


class Late(Recorded):
    """Copies when it is waited for, which is the latest that a device may; no buffer holds a number but while it may be read."""

    def __init__(self) -> None:
        super().__init__()
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._hidden: dict[int, Tensor] = {}

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.log.append(("copy", target.untyped_storage().data_ptr()))
        self._hidden.pop(target.untyped_storage().data_ptr(), None)
        target.fill_(_NO_NUMBER)
        self._pending.append((target, source))

    def wait(self, queue: Queue, mark: Any) -> None:
        super().wait(queue, mark)
        if queue == "compute":
            made = self.log.index(("mark", "copies", mark))
            copies = sum(entry[0] == "copy" for entry in self.log[:made])
            behind = sum(entry[0] == "copy" for entry in self.log) - copies
            now = len(self._pending) - behind
            for target, source in self._pending[: max(now, 0)]:
                target.copy_(source)
            del self._pending[: max(now, 0)]

    def reads(self, buffer: Tensor) -> None:
        super().reads(buffer)
        if buffer.data_ptr() in self._hidden:
            buffer.copy_(self._hidden.pop(buffer.data_ptr()))

    def done(self, buffer: Tensor) -> None:
        super().done(buffer)
        self._hidden[buffer.data_ptr()] = buffer.clone()
        buffer.fill_(_NO_NUMBER)


def wrong_order(log: Sequence[tuple[Any, ...]]) -> str | None:
    """What may go wrong where two queues do this; None where nothing can.

    A queue does its own entries in order. Of the other it knows what lies before the marks that it has waited for.
    """
    marks: dict[int, tuple[str, int]] = {}
    known = {"compute": -1, "copies": -1}  # of the other queue, the entries that are done
    written: dict[int, int] = {}
    read: dict[int, int | None] = {}  # None: until now
    for place, (kind, what, *number) in enumerate(log):
        if kind == "mark":
            marks[number[0]] = (what, place)
        elif kind == "wait":
            if number[0] not in marks:
                return f"{place}: waits for a mark that is not there"
            of, at = marks[number[0]]
            if of != what:
                known[what] = max(known[what], at)
        elif kind == "copy":
            until = read.get(what, 0)
            if until is None or known["copies"] < until:
                return f"{place}: a buffer is written before its last reader is done"
            written[what] = place
        elif kind == "reads":
            if what not in written or known["compute"] < written[what]:
                return f"{place}: a buffer is read before it is written"
            read[what] = None
        elif kind == "done":
            read[what] = place
    return None
