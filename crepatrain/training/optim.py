"""Optimizers and learning-rate schedules, one of each for the transformer and for the projector."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from crepatrain.config.sections import OptimConfig
from crepatrain.training.adafactor import Adafactor
from crepatrain.training.lora import trainable_parameters


def build_optimizer(config: OptimConfig, parameters: Sequence[nn.Parameter], learning_rate: float) -> Optimizer:
    """The config's optimizer over some parameters.

    AdamW is the fused one: it reads `found_inf` on the device and then leaves the weights alone, so the host reads nothing first.
    Adafactor does the same. Of the other packages' optimizers the host waits for the device: once in a step before bitsandbytes'
    AdamW, and before and several times within Prodigy, which reads its own estimate of the learning rate.
    """
    betas = (config.adam_beta1, config.adam_beta2)
    decay, epsilon = config.adam_weight_decay, config.adam_epsilon
    if config.optimizer == "adafactor":
        return Adafactor(parameters, lr=learning_rate, weight_decay=decay)
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports] - the 8bit extra; make_plan has checked that it is installed

        return AdamW8bit(parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=decay)
    if config.optimizer == "prodigy":
        from prodigyopt import Prodigy  # pyright: ignore[reportMissingImports] - the prodigy extra; make_plan has checked that it is installed

        return Prodigy(parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=decay, use_bias_correction=True)
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=decay, fused=True)


def build_lr_scheduler(config: OptimConfig, optimizer: Optimizer, max_train_steps: int) -> LRScheduler:
    """diffusers' schedule of that name, stepped once per optimizer step."""
    return get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=max_train_steps
    )


@dataclass(frozen=True, eq=False)
class ScheduledOptimizer:
    """An optimizer over some parameters, with its learning-rate schedule."""

    parameters: Sequence[nn.Parameter]
    optimizer: Optimizer
    lr_scheduler: LRScheduler

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def guarded(self) -> bool:
        """Whether the optimizer itself reads `found_inf`; torch's GradScaler decides by the same attribute."""
        return getattr(self.optimizer, "_step_supports_amp_scaling", False)

    def step(self, found_inf: Tensor) -> None:
        """Move the weights and the schedule, and drop the gradients.

        Args:
            found_inf: scalar on the device; a guarded optimizer moves nothing where it is 1.
        """
        if self.guarded:
            self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "lr_scheduler": self.lr_scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        schedule = cast("LambdaLR", self.lr_scheduler)
        # Both are the config's, which may have changed since: the states hold what it was.
        peaks, decays = list(schedule.base_lrs), [group["weight_decay"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["lr_scheduler"])
        schedule.base_lrs = peaks
        for group, peak, decay in zip(self.optimizer.param_groups, peaks, decays, strict=True):
            group["initial_lr"], group["weight_decay"] = peak, decay
        # A schedule that has changed holds from this step on, not from the one after it.
        rates = [base * at(schedule.last_epoch) for base, at in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates


def build_scheduled_optimizer(
    config: OptimConfig, module: nn.Module, learning_rate: float, max_train_steps: int
) -> ScheduledOptimizer:
    """An optimizer over what of a module is trained. Built after the module is placed."""
    parameters = trainable_parameters(module)
    optimizer = build_optimizer(config, parameters, learning_rate)
    return ScheduledOptimizer(parameters, optimizer, build_lr_scheduler(config, optimizer, max_train_steps))


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Clip gradients to a norm (0: never), and return their norm from before, a scalar on the device."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    if not with_gradient:  # a projector whose weight is 0
        return parameters[0].new_zeros(())
    if max_norm > 0:
        return nn.utils.clip_grad_norm_(with_gradient, max_norm)
    return nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
