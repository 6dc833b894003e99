"""torch's Adafactor without its reads of the device: for each parameter that one waits twice until the GPU has caught up."""

import math
from typing import Any

import torch
from torch import Tensor


class Adafactor(torch.optim.Adafactor):
    """The same states and, but for rounding, the same numbers as torch's; the step's norms stay on the device.

    It reads `found_inf` on the device, as torch's fused optimizers do, and where that is 1 leaves weights and states alone.
    """

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move the weights, parameter by parameter."""
        assert closure is None
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            rows: list[Tensor | None] = []
            columns: list[Tensor | None] = []
            variances: list[Tensor | None] = []
            steps: list[Tensor] = []
            self._init_group(group, parameters, gradients, rows, columns, variances, steps)
            for index, parameter in enumerate(parameters):
                states = (rows[index], columns[index], variances[index])
                _move(group, parameter, gradients[index], states, steps[index], found_inf)


def _move(
    group: dict[str, Any],
    parameter: Tensor,
    gradient: Tensor,
    states: tuple[Tensor | None, Tensor | None, Tensor | None],
    step: Tensor,
    found_inf: Tensor | None,
) -> None:
    row_mean, column_mean, variance = states
    keep = 1.0
    if found_inf is not None:
        keep = 1 - found_inf.to(parameter.device, torch.float32)
        gradient = gradient.masked_fill(keep == 0, 0.0)
    step += 1  # on the host
    count = float(step)
    smallest = group["eps"][0] if group["eps"][0] is not None else torch.finfo(parameter.dtype).eps
    weight = count ** group["beta2_decay"] * keep  # of what is new
    rate = min(float(group["lr"]), 1 / math.sqrt(count))
    size = parameter.norm(2).div(math.sqrt(parameter.numel())).clamp(min=group["eps"][1])
    if group["weight_decay"]:
        parameter.mul_(1 - float(group["lr"]) * group["weight_decay"] * keep)
    if gradient.dim() > 1:
        assert row_mean is not None
        assert column_mean is not None
        _follow(row_mean, gradient.norm(dim=-1, keepdim=True).square_().div_(gradient.shape[-1]), weight)
        _follow(column_mean, gradient.norm(dim=-2, keepdim=True).square_().div_(gradient.shape[-2]), weight)
        estimate = (row_mean @ column_mean).div_(row_mean.mean(dim=-2, keepdim=True).clamp_(min=smallest))
    else:
        assert variance is not None
        _follow(variance, gradient.square(), weight)
        estimate = variance.clone()
    update = estimate.clamp_(min=smallest * smallest).rsqrt_().mul_(gradient)
    excess = update.norm(2).div(math.sqrt(update.numel()) * group["d"]).clamp(min=1.0)
    parameter.sub_(update.mul_(size * rate / excess))


def _follow(state: Tensor, value: Tensor, weight: "Tensor | float") -> None:
    """Move a running mean towards a value."""
    if isinstance(weight, Tensor):
        weight = weight.to(state.dtype)
    state.lerp_(value.to(state.dtype), weight)  # type: ignore[arg-type] - a tensor without dimensions, or a number
