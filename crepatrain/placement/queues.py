"""What a device does in which order: the seam between the ring of blocks and CUDA's streams, which a test can record."""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

# One computes, and the other copies from host memory; each does what it is given in order, and waits for the other only at marks.
Queue = Literal["compute", "copies"]


class Queues(Protocol):
    """Where the ring's work goes. Nothing here waits on the host."""

    def mark(self, queue: Queue) -> Any:
        """A mark behind everything that a queue was given so far."""
        ...

    def wait(self, queue: Queue, mark: Any) -> None:
        """What a queue is given from here on happens behind a mark."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Give the queue of copies one from host memory."""
        ...

    def reads(self, buffer: Tensor) -> None:
        """From here on what is given to compute reads a buffer."""
        ...

    def done(self, buffer: Tensor) -> None:
        """All that reads a buffer has been given to compute."""
        ...


class InOrder:
    """A device that computes and copies in the order in which it is told to: a CPU."""

    def mark(self, queue: Queue) -> None:  # noqa: ARG002 - the protocol's
        return None

    def wait(self, queue: Queue, mark: None) -> None: ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def reads(self, buffer: Tensor) -> None: ...

    def done(self, buffer: Tensor) -> None: ...


class CudaQueues:
    """The current stream and one beside it, with CUDA's events for marks."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, torch.cuda.Stream(device)

    def _stream(self, queue: Queue) -> torch.cuda.Stream:
        return self._copies if queue == "copies" else torch.cuda.current_stream(self._device)

    def mark(self, queue: Queue) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream(queue))
        return event

    def wait(self, queue: Queue, mark: torch.cuda.Event) -> None:
        self._stream(queue).wait_event(mark)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.record_stream(self._copies)  # should it be freed at the end of a run, then not before what was queued
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def reads(self, buffer: Tensor) -> None: ...

    def done(self, buffer: Tensor) -> None: ...
