"""Optimizers and learning-rate schedules, one of each for the transformer and for the projector."""

from collections.abc import Sequence

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from crepatrain.config.sections import OptimConfig


def build_optimizer(config: OptimConfig, parameters: Sequence[nn.Parameter], learning_rate: float) -> Optimizer:
    """The config's optimizer over some parameters.

    AdamW is the fused one: `found_inf` tells it on the device to leave the weights alone, so nothing has to be read first.
    """
    betas = (config.adam_beta1, config.adam_beta2)
    decay, epsilon = config.adam_weight_decay, config.adam_epsilon
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=learning_rate, weight_decay=decay)
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports] - the 8bit extra; make_plan has looked for it

        return AdamW8bit(parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=decay)
    if config.optimizer == "prodigy":
        from prodigyopt import Prodigy  # pyright: ignore[reportMissingImports] - the prodigy extra; make_plan has looked for it

        return Prodigy(parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=decay, use_bias_correction=True)
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=decay, fused=True)


def build_lr_scheduler(config: OptimConfig, optimizer: Optimizer, max_train_steps: int) -> LRScheduler:
    """diffusers' schedule of that name, stepped once per optimizer step."""
    return get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=max_train_steps
    )


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Clip to a norm (0: never) and give the norm from before, a scalar on the device."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    if not with_gradient:  # a projector whose weight is 0
        return parameters[0].new_zeros(())
    if max_norm > 0:
        return nn.utils.clip_grad_norm_(with_gradient, max_norm)
    return nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
