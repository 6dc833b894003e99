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
        log: (mark, queue, number), (wait, queue, number), (copy, target, source), and reads, done, written and freed with a
            tensor; tensors by their storage's address.
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
        self.log.append(("copy", _address(target), _address(source)))
        super().copy(target, source)

    def written(self, tensor: Tensor) -> None:
        self.log.append(("written", _address(tensor)))

    def freed(self, tensor: Tensor) -> None:
        self.log.append(("freed", _address(tensor)))

    def reads(self, buffer: Tensor) -> None:
        self.log.append(("reads", _address(buffer)))

    def done(self, buffer: Tensor) -> None:
        self.log.append(("done", _address(buffer)))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Late(Recorded):
    """Copies when it is waited for, which is the latest that a device may; no buffer holds a number but while it may be read."""

    def __init__(self) -> None:
        super().__init__()
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._hidden: dict[int, Tensor] = {}

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.log.append(("copy", _address(target), _address(source)))
        self._hidden.pop(_address(target), None)
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
        if _address(buffer) in self._hidden:
            buffer.copy_(self._hidden.pop(_address(buffer)))

    def done(self, buffer: Tensor) -> None:
        super().done(buffer)
        self._hidden[_address(buffer)] = buffer.clone()
        buffer.fill_(_NO_NUMBER)


def wrong_order(log: Sequence[tuple[Any, ...]]) -> str | None:
    """What may go wrong where two queues do this; None where nothing can.

    A queue does its own entries in order. Of the other it knows what lies before the marks that it has waited for.
    """
    marks: dict[int, tuple[str, int]] = {}
    known = {"compute": -1, "copies": -1}  # of the other queue, the entries that are done
    written: dict[int, tuple[str, int]] = {}  # by which queue, and where
    read: dict[int, int | None] = {}  # None: until now
    copied: dict[int, int] = {}
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
            until, (by, at) = read.get(what, 0), written.get(number[0], ("copies", 0))
            if until is None or known["copies"] < until:
                return f"{place}: a buffer is written before its last reader is done"
            if by == "compute" and known["copies"] < at:
                return f"{place}: a tensor is copied before it is written"
            written[what] = "copies", place
            copied[number[0]] = place
        elif kind == "written":
            written[what] = "compute", place
            copied.pop(what, None)
        elif kind == "freed":
            last = max(copied.pop(what, 0), written.pop(what)[1] if written.get(what, ("", 0))[0] == "copies" else 0)
            if known["compute"] < last:
                return f"{place}: memory is used again before its copy is done"
        elif kind == "reads":
            if what not in written or known["compute"] < written[what][1]:
                return f"{place}: a buffer is read before it is written"
            read[what] = None
        elif kind == "done":
            read[what] = place
    return None
