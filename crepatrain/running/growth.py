"""Memory or step time that grows steadily over a run: said once, while the run is still well."""

import os
import statistics
from itertools import pairwise
from pathlib import Path

import torch

from crepatrain.records.events import StepDone
from crepatrain.screen import Screen

_STATM = Path("/proc/self/statm")
_GIB = 1 << 30


class Growth:
    """Whether a number that is observed after every step grows steadily, in bounded memory however long the run is.

    The medians of equal windows over the whole run are compared: in the last ones each is above the one before, the last is far
    above the first of these, and no single rise is most of the growth, as that of another setting from one step on would be.

    Args:
        window: steps of a window at first. So many are left out at the beginning, where caches fill and kernels are compiled;
            a full list of windows is halved by joining two and two.
    """

    _LEAST_WINDOWS, _MOST_WINDOWS = 5, 16
    _WHOLE, _EACH, _LARGEST_SHARE = 1.2, 1.004, 0.5

    def __init__(self, window: int = 50) -> None:
        self._window = window
        self._left_out = window
        self._values: list[float] = []
        self._medians: list[float] = []

    def observe(self, value: float) -> tuple[float, float] | None:
        """Take a step's number.

        Returns:
            The medians of the rise's first window and of its last, at the end of a window where growth is steady; else None.
        """
        if self._left_out:
            self._left_out -= 1
            return None
        self._values.append(value)
        if len(self._values) < self._window:
            return None
        self._medians.append(statistics.median(self._values))
        self._values = []
        found = self._steady_rise()
        if len(self._medians) == self._MOST_WINDOWS:
            self._medians = [(a + b) / 2 for a, b in zip(self._medians[::2], self._medians[1::2], strict=True)]
            self._window *= 2
        return found

    def _steady_rise(self) -> tuple[float, float] | None:
        """The first and the last median of the rise that goes on now, if it is one."""
        medians = self._medians
        begin = len(medians) - 1
        while begin and medians[begin] >= self._EACH * medians[begin - 1]:
            begin -= 1
        first, last = medians[begin], medians[-1]
        if len(medians) - begin < self._LEAST_WINDOWS or first <= 0 or last < self._WHOLE * max(medians[: begin + 1]):
            return None
        largest = max(after - before for before, after in pairwise(medians[begin:]))
        return (first, last) if largest <= self._LARGEST_SHARE * (last - first) else None


class GrowthNotes:
    """A subscriber that notes what grows over a run, each thing once.

    Args:
        device: that the run computes on.
    """

    def __init__(self, screen: Screen, device: torch.device) -> None:
        self._screen = screen
        self._cuda = device.type == "cuda"
        self._watched = {"the time of a step": Growth(), "this process's memory": Growth()}
        if self._cuda:
            self._watched["the GPU memory held between two steps"] = Growth()

    def __call__(self, event: object) -> None:
        if not isinstance(event, StepDone):
            return
        values = {"the time of a step": event.seconds, "this process's memory": resident_bytes()}
        if self._cuda:
            values["the GPU memory held between two steps"] = torch.cuda.memory_allocated()
        for what, growth in list(self._watched.items()):
            value = values[what]
            if value is not None and (found := growth.observe(value)):
                del self._watched[what]
                first, last = (f"{value:.3g} s" if what == "the time of a step" else f"{value / _GIB:.3g} GiB" for value in found)
                self._screen.note(
                    f"step {event.done}: {what} has grown steadily, from {first} to {last}; if it goes on, "
                    "stop the run (Ctrl-C) and start the same command again: it continues from there"
                )


def resident_bytes() -> int | None:
    """Memory that this process holds; None where the system does not tell."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
