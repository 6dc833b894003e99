"""Everything of a run that a resume needs beside tensors, in one object."""

from dataclasses import dataclass, field
from typing import Any

from crepatrain.alignment.schedule import CrepaSchedule
from crepatrain.training.metrics import Window


@dataclass
class TrainState:
    """Where a run stands. The data order and every random draw are pure functions of the step, so nothing else of them is kept.

    Attributes:
        step: optimizer steps done.
        samples_seen: samples of those steps.
        schedule: CREPA's, whose EMA and latch survive here; None where CREPA is off.
        window: numbers of the steps since the last logged line.
    """

    step: int = 0
    samples_seen: int = 0
    schedule: CrepaSchedule | None = None
    window: Window = field(default_factory=Window)

    @property
    def asks_teacher(self) -> bool:
        """Whether CREPA will measure anything from this step on; if not, nothing needs to be loaded for it."""
        return self.schedule is not None and not self.schedule.is_over(self.step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "window": self.window.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.samples_seen = state["samples_seen"]
        self.window.load_state_dict(state["window"])
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])
