"""From micro-batches to one line of metrics.jsonl: what is logged is what was optimised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crepatrain.training.step import StepLosses

HOW_TO_READ = (
    "crepa_loss is negative: weight x -alignment, so it also shrinks with the weight; "
    "alignment and self-similarity should rise and then level off"
)

# Ranges of sigma [low, high) for each of which the diffusion loss is logged: it depends on the noise level most of all.
SIGMA_RANGES = ("0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0")

_SCORES = ("diffusion_loss", "crepa_raw", "alignment", "self_similarity", "layersync_raw")
_SUM_OF, _COUNT_OF = "sum of ", "count of "  # the diffusion losses of the samples in a range of sigma


class StepSums:
    """Adds up the micro-batches of one optimizer step on the device, without waiting for it.

    Attributes:
        names: of its numbers, in the order in which they travel packed.
    """

    names = (*_SCORES, *(_SUM_OF + sigmas for sigmas in SIGMA_RANGES), *(_COUNT_OF + sigmas for sigmas in SIGMA_RANGES))

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, losses: StepLosses, sigma: Tensor) -> None:
        """A micro-batch's losses, and the noise levels [B] of its samples."""
        crepa, layersync = losses.crepa, losses.layersync
        absent = losses.diffusion.new_zeros(1)
        scores = (crepa.loss, crepa.alignment, crepa.self_similarity) if crepa else (absent,) * 3
        values = (losses.diffusion, *scores, absent if layersync is None else layersync)
        means = torch.stack([value.float().mean() for value in values])
        packed = torch.cat([means, *_by_sigma(losses.diffusion.float(), sigma)])
        self._sum = packed if self._sum is None else self._sum + packed
        self._count += 1

    def packed(self) -> Tensor:
        """Means over the micro-batches, [len(names)]; 0 for what was not measured."""
        assert self._sum is not None
        assert len(self._sum) == len(self.names)
        return self._sum / self._count


def _by_sigma(losses: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [B] and their sigma [B] -> sums [5] and counts [5] over the ranges of sigma."""
    ranges = torch.arange(len(SIGMA_RANGES), device=sigma.device)
    index = (sigma.float() * len(SIGMA_RANGES)).long().clamp(max=len(SIGMA_RANGES) - 1)
    within = (index.unsqueeze(1) == ranges).to(losses)
    return (within * losses.unsqueeze(1)).sum(dim=0), within.sum(dim=0)


class HostCopy:
    """Numbers on their way from the device. Reading them waits for what was queued before this, and for nothing after it.

    Args:
        names: of the numbers.
        values: as many, on whatever device.
    """

    def __init__(self, names: Sequence[str], values: Tensor) -> None:
        assert values.shape == (len(names),), (names, values.shape)
        self._names = tuple(names)
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> dict[str, float]:
        """The numbers by name."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


@dataclass(frozen=True)
class StepNumbers:
    """One optimizer step, as plain numbers: means over micro-batches and processes; None where nothing was measured.

    Attributes:
        by_sigma: per range of sigma the sum of its samples' diffusion losses and their count, each divided by the same number.
    """

    diffusion_loss: float
    crepa_raw: float | None
    alignment: float | None
    self_similarity: float | None
    layersync_raw: float | None
    by_sigma: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, numbers: Mapping[str, float], *, crepa: bool, layersync: bool) -> "StepNumbers":
        """Of what `StepSums` has packed, by name.

        Args:
            crepa, layersync: whether they were measured.
        """
        return cls(
            diffusion_loss=numbers["diffusion_loss"],
            crepa_raw=numbers["crepa_raw"] if crepa else None,
            alignment=numbers["alignment"] if crepa else None,
            self_similarity=numbers["self_similarity"] if crepa else None,
            layersync_raw=numbers["layersync_raw"] if layersync else None,
            by_sigma={sigmas: (numbers[_SUM_OF + sigmas], numbers[_COUNT_OF + sigmas]) for sigmas in SIGMA_RANGES},
        )

    def total(self, crepa_weight: float, layersync_weight: float) -> float:
        """The loss that was optimised."""
        return self.diffusion_loss + crepa_weight * (self.crepa_raw or 0.0) + layersync_weight * (self.layersync_raw or 0.0)


class Window:
    """Means over the optimizer steps since the last logged line."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, **values: float | None) -> None:
        for name, value in values.items():
            if value is not None:
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1

    def add_mean(self, name: str, total: float, count: float) -> None:
        """Part of a mean over samples: their sum and their count."""
        if count:
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0.0) + count

    def take(self) -> dict[str, Any]:
        """The means, and an empty window again."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
