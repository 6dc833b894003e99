"""From micro-batches to one line of metrics.jsonl: what is logged is what was optimised."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crepatrain.training.step import StepLosses

# One optimizer step's numbers, in the order in which they travel packed.
_PACKED = ("diffusion_loss", "crepa_raw", "alignment", "self_similarity", "layersync_raw")


class StepSums:
    """Adds up the micro-batches of one optimizer step on the device, without waiting for it."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, losses: StepLosses) -> None:
        crepa, layersync = losses.crepa, losses.layersync
        absent = losses.diffusion.new_zeros(1)
        scores = (crepa.loss, crepa.alignment, crepa.self_similarity) if crepa else (absent,) * 3
        values = (losses.diffusion, *scores, absent if layersync is None else layersync)
        packed = torch.stack([value.float().mean() for value in values])
        self._sum = packed if self._sum is None else self._sum + packed
        self._count += 1

    def packed(self) -> Tensor:
        """[5], means over the micro-batches; 0 for what was not measured."""
        assert self._sum is not None
        return self._sum / self._count


class HostCopy:
    """Numbers on their way from the device. Reading them waits for what was queued before this, and for nothing after it."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[float]:
        """The numbers."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


@dataclass(frozen=True)
class StepNumbers:
    """One optimizer step, as plain numbers: means over micro-batches and processes; None where nothing was measured."""

    diffusion_loss: float
    crepa_raw: float | None
    alignment: float | None
    self_similarity: float | None
    layersync_raw: float | None

    @classmethod
    def of(cls, packed: list[float], *, crepa: bool, layersync: bool) -> "StepNumbers":
        values = dict(zip(_PACKED, packed, strict=True))
        measured = {"diffusion_loss"} | ({"crepa_raw", "alignment", "self_similarity"} if crepa else set())
        measured |= {"layersync_raw"} if layersync else set()
        return cls(**{name: value if name in measured else None for name, value in values.items()})  # type: ignore[arg-type]

    def total(self, crepa_weight: float, layersync_weight: float) -> float:
        """The loss that was optimised."""
        return self.diffusion_loss + crepa_weight * (self.crepa_raw or 0.0) + layersync_weight * (self.layersync_raw or 0.0)


class Window:
    """Means over the optimizer steps since the last logged line."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, **values: float | None) -> None:
        for name, value in values.items():
            if value is not None:
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, Any]:
        """The means, and an empty window again."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
