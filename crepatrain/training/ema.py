"""The mean of the trained weights over the last steps, which is steadier than any of them."""

from collections.abc import Iterator, Mapping, Sequence
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
        self._values = [parameter.detach().to(torch.float32, copy=True) for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take an optimizer step into the average; queued on the device, nothing is waited for."""
        torch._foreach_lerp_(self._values, [parameter.detach().float() for parameter in self._parameters], 1 - self._decay)

    def of(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state with the averages where it has the parameters; nothing is copied, and nothing exchanged.

        Args:
            state: by any names, tensors that share their storages with the parameters.
        """
        averages = {_place(p): value for p, value in zip(self._parameters, self._values, strict=True)}
        found = {name: averages.get(_place(tensor), tensor) for name, tensor in state.items()}
        assert len({id(value) for value in self._values} & {id(tensor) for tensor in found.values()}) == len(self._values)
        return found

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
            kept = parameter.detach().to(torch.float32, copy=True)
            parameter.copy_(self._values[index])
            self._values[index] = kept


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
