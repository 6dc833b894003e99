"""What happens in a run, for whoever subscribes: the screen, trackers, the report, a test."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # a report of files alone loads no numpy
    import numpy as np


@dataclass(frozen=True)
class StepDone:
    """The run has moved on by an optimizer step.

    Attributes:
        done: optimizer steps done.
        seconds: that the step took, without what happens between two steps.
    """

    done: int
    seconds: float


@dataclass(frozen=True)
class Logged:
    """A line was written to metrics.jsonl."""

    line: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is whole on the disk, and the run's result beside it."""

    step: int
    folder: Path


@dataclass(frozen=True, eq=False)
class VideosMade:
    """The videos of a validation.

    Attributes:
        videos: [F, H, W, 3] uint8 by prompt.
        file: in which they stand side by side.
    """

    step: int
    videos: "Mapping[str, np.ndarray]"
    file: Path


@dataclass(frozen=True)
class Ended:
    """The training is over, however it ended.

    Attributes:
        reason: one line; empty where it was completed.
    """

    status: Literal["completed", "stopped", "failed"]
    step: int
    reason: str = ""


Subscriber = Callable[[object], None]


class Events:
    """Passes what happens on to every subscriber, in the order in which they came."""

    def __init__(self, subscribers: Iterable[Subscriber] = ()) -> None:
        self._subscribers = list(subscribers)

    def subscribe(self, subscriber: Subscriber) -> None:
        self._subscribers.append(subscriber)

    def emit(self, event: object) -> None:
        """Call every subscriber. What one of them raises ends the run, as an error of the run itself does."""
        for subscriber in self._subscribers:
            subscriber(event)
