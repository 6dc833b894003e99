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
    order = _Order()
    for place, (kind, *values) in enumerate(log):
        wrong = getattr(order, kind)(place, *values)
        if wrong:
            return f"{place}: {wrong}"
    return None


class _Order:
    """What has been given to the queues so far; a method for each kind of entry."""

    def __init__(self) -> None:
        self._marks: dict[int, tuple[str, int]] = {}
        self._known = {"compute": -1, "copies": -1}  # of the other queue, the entries that are done
        self._written: dict[int, tuple[str, int]] = {}  # by which queue, and where
        self._read: dict[int, int | None] = {}  # by compute; None: until now
        self._copied: dict[int, int] = {}  # from there

    def mark(self, place: int, queue: str, number: int) -> None:
        self._marks[number] = (queue, place)

    def wait(self, _place: int, queue: str, number: int) -> str | None:
        if number not in self._marks:
            return "waits for a mark that is not there"
        of, at = self._marks[number]
        if of != queue:
            self._known[queue] = max(self._known[queue], at)
        return None

    def copy(self, place: int, target: int, source: int) -> str | None:
        until, (by, at) = self._read.get(target, 0), self._written.get(source, ("copies", 0))
        if until is None or self._known["copies"] < until:
            return "a buffer is written before its last reader is done"
        if by == "compute" and self._known["copies"] < at:
            return "a tensor is copied before it is written"
        self._written[target], self._copied[source] = ("copies", place), place
        return None

    def written(self, place: int, tensor: int) -> None:
        self._written[tensor] = ("compute", place)
        self._copied.pop(tensor, None)

    def freed(self, _place: int, tensor: int) -> str | None:
        by, at = self._written.pop(tensor, ("compute", 0))
        last = max(self._copied.pop(tensor, 0), at if by == "copies" else 0)
        return "memory is used again before its copy is done" if self._known["compute"] < last else None

    def reads(self, _place: int, tensor: int) -> str | None:
        if tensor not in self._written or self._known["compute"] < self._written[tensor][1]:
            return "a buffer is read before it is written"
        self._read[tensor] = None
        return None

    def done(self, place: int, tensor: int) -> None:
        self._read[tensor] = place
