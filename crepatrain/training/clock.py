"""Where the time of an optimizer step goes, measured on the device that spends it and without making it wait."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepClock:
    """Times the parts of one optimizer step; a part that runs more than once is summed.

    On a GPU a part is the time between two events in its queue, so it holds what the device does rather than how long the host
    takes to ask for it; elsewhere it is the host's own time.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._host: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what the device does for this part."""
        if not self._cuda:
            with self.waiting(name):
                yield
            return
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        yield
        ended.record()
        self._events.append((name, began, ended))

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Time what the host waits for, whatever the device does meanwhile."""
        began = time.perf_counter()
        yield
        self._host[name] = self._host.get(name, 0.0) + time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """Seconds of every part. Waits for the last one, and for nothing that was queued after it."""
        total = dict(self._host)
        for name, began, ended in self._events:
            ended.synchronize()
            total[name] = total.get(name, 0.0) + began.elapsed_time(ended) / 1000
        return total
