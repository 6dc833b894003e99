"""What each optimizer keeps for a parameter, known without running it: the one table of optimizer states."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """One tensor that an optimizer keeps for a parameter: on the parameter's device, or on the host."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_host: bool = False


_States = dict[str, State]


def _adamw(shape: torch.Size, dtype: torch.dtype) -> _States:
    """First and second moment, and a step that the fused kernel counts on the device."""
    return {"exp_avg": State(shape, dtype), "exp_avg_sq": State(shape, dtype), "step": State((), torch.float32)}


def _adamw8bit(shape: torch.Size, _dtype: torch.dtype) -> _States:
    """Two bytes for each number, and two scales for each 256 of them; not by the names that bitsandbytes has for their halves."""
    count = shape.numel()
    return {"states": State((2 * count,), torch.uint8), "scales": State((count // 256 * 2 + 2,), torch.float32)}


def _adafactor(shape: torch.Size, dtype: torch.dtype) -> _States:
    """The mean of the second moments over each row and over each column of a matrix."""
    step = State((), torch.float32, on_host=True)
    if len(shape) < 2:
        return {"variance": State(shape, dtype), "step": step}
    rows, columns = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
    return {"row_var": State(rows, torch.float32), "col_var": State(columns, torch.float32), "step": step}


def _prodigy(shape: torch.Size, dtype: torch.dtype) -> _States:
    """First and second moment, where the parameter began, and the sum of its gradients."""
    return {name: State(shape, dtype) for name in ("exp_avg", "exp_avg_sq", "p0", "s")}


_TABLE: Mapping[str, Callable[[torch.Size, torch.dtype], _States]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
}


def states_of(optimizer: str, parameter: Tensor) -> Mapping[str, State]:
    """What an optimizer, by its name in a config, keeps for a parameter, by the names that torch's own optimizers have for it."""
    return _TABLE[optimizer](parameter.shape, parameter.dtype)


def empty_states(optimizer: str, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that an optimizer makes on the parameters' devices when it first moves them; without values."""
    return [
        torch.empty(state.shape, dtype=state.dtype, device=parameter.device)
        for parameter in parameters
        for state in states_of(optimizer, parameter).values()
        if not state.on_host
    ]


# How many fp32 copies of one parameter a step makes and drops: those that loop over parameters work out an update of each.
_TEMPORARIES: Mapping[str, int] = {"adamw": 0, "adamw8bit": 0, "adafactor": 2, "prodigy": 2}


def empty_temporaries(optimizer: str, parameters: Sequence[Tensor]) -> list[Tensor]:
    """What an optimizer holds in the course of a step at most, beside its states; without values."""
    largest = max(parameters, key=Tensor.numel)
    return [torch.empty(largest.shape, device=largest.device) for _ in range(_TEMPORARIES[optimizer])]
