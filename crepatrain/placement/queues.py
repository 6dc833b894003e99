"""What a device does in which order: the seam between what is kept in host memory and CUDA's streams, which a test can record."""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

# One computes, and the other copies from host memory or to it; each does what it is given in order, and waits for the other only
# at marks.
Queue = Literal["compute", "copies"]


class Queues(Protocol):
    """Where the work goes. Nothing here waits on the host."""

    def mark(self, queue: Queue) -> Any:
        """A mark behind everything that a queue was given so far."""
        ...

    def wait(self, queue: Queue, mark: Any) -> None:
        """What a queue is given from here on happens behind a mark."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Give the queue of copies one from host memory or to it; whoever frees the device's side does so behind a mark."""
        ...

    def fills(self, buffer: Tensor) -> None:
        """A buffer that copies go to until it is freed, which the end of a run may do at any time."""
        ...

    def written(self, tensor: Tensor) -> None:
        """All that writes a tensor has been given to compute."""
        ...

    def freed(self, tensor: Tensor) -> None:
        """What is given to compute from here on may have a tensor's memory."""
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

    def fills(self, buffer: Tensor) -> None: ...

    def written(self, tensor: Tensor) -> None: ...

    def freed(self, tensor: Tensor) -> None: ...

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
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def fills(self, buffer: Tensor) -> None:
        buffer.record_stream(self._copies)  # it is freed behind the copies that were queued

    def written(self, tensor: Tensor) -> None: ...

    def freed(self, tensor: Tensor) -> None: ...

    def reads(self, buffer: Tensor) -> None: ...

    def done(self, buffer: Tensor) -> None: ...


def queues_of(device: torch.device) -> Queues:
    """The queues of a device, with a stream of their own for copies where it has streams."""
    return CudaQueues(device) if device.type == "cuda" else InOrder()
