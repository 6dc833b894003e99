"""One module in training, with all that moves it."""

from dataclasses import dataclass

from torch import nn

from crepatrain.training.ema import WeightAverage
from crepatrain.training.optim import ScheduledOptimizer


@dataclass(eq=False)
class Trained:
    """A module whose weights, or whose adapter's, are trained.

    Attributes:
        module: bare.
        wrapper: what the forward calls: the module, wrapped where there are several processes.
        optimizer: with its learning-rate schedule.
        blocks: of a transformer; None of the projector.
        average: of what is trained; None without use_ema.
    """

    module: nn.Module
    wrapper: nn.Module
    optimizer: ScheduledOptimizer
    blocks: nn.ModuleList | None = None
    average: WeightAverage | None = None
