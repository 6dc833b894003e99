"""What happens in a run, for whoever subscribes: the screen, trackers, the report, a test. Plain values, no tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # reading a run, which knows events, loads no numpy
    import numpy as np


@dataclass(frozen=True)
class StepBegins:
    """An optimizer step is about to be launched.

    Attributes:
        step: its number, from 0.
    """

    step: int


@dataclass(frozen=True)
class StepLaunched:
    """All work of an optimizer step is queued; the device may still be at it.

    Attributes:
        step: its number, from 0.
    """

    step: int


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


Event = StepBegins | StepLaunched | StepDone | Logged | CheckpointSaved | VideosMade | Ended
Subscriber = Callable[[Event], None]
