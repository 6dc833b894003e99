"""The mean of the trained weights over the last steps, which is steadier than any of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """An exponential moving average of parameters, in fp32 beside them.

    Args:
        parameters: as they are, it begins with their values.
        decay: of the average, each step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self._decay = decay
        self._values = [parameter.detach().float().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take an optimizer step into the average; queued on the device, nothing is waited for."""
        torch._foreach_lerp_(self._values, [parameter.detach().float() for parameter in self._parameters], 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages in the place of the parameters; what is loaded into these meanwhile is the average from then on."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for index, parameter in enumerate(self._parameters):
            kept: Tensor = parameter.detach().float().clone()
            parameter.copy_(self._values[index])
            self._values[index] = kept
