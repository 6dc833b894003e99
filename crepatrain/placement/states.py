"""What each optimizer keeps on the device for a parameter, known without running it: the one table of state sizes."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

_States = list[tuple[tuple[int, ...], torch.dtype]]


def _adamw(shape: torch.Size, dtype: torch.dtype) -> _States:
    """First and second moment, and a step that the fused kernel counts on the device."""
    return [(shape, dtype), (shape, dtype), ((), torch.float32)]


def _adamw8bit(shape: torch.Size, _dtype: torch.dtype) -> _States:
    """Two bytes for each number, and two scales for each 256 of them."""
    return [((2 * shape.numel(),), torch.uint8), ((shape.numel() // 256 * 2 + 2,), torch.float32)]


def _adafactor(shape: torch.Size, dtype: torch.dtype) -> _States:
    """The mean of the second moments over each row and over each column of a matrix."""
    if len(shape) < 2:
        return [(shape, dtype)]
    return [(shape[:-1], torch.float32), ((*shape[:-2], shape[-1]), torch.float32)]


def _prodigy(shape: torch.Size, dtype: torch.dtype) -> _States:
    """First and second moment, where the parameter began, and the sum of its gradients."""
    return [(shape, dtype)] * 4


_TABLE: Mapping[str, Callable[[torch.Size, torch.dtype], _States]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
}


def empty_states(optimizer: str, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that an optimizer makes when it first moves some parameters, on their devices; without values."""
    return [
        torch.empty(shape, dtype=dtype, device=parameter.device)
        for parameter in parameters
        for shape, dtype in _TABLE[optimizer](parameter.shape, parameter.dtype)
    ]
