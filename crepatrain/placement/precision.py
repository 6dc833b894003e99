"""The data types of a run: of weights, of what is computed with them, and of encoders."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from crepatrain.config.resolved import ResolvedConfig
from crepatrain.config.sections import LoopConfig


def compute_dtype(config: LoopConfig) -> torch.dtype:
    """The data type of autocast, and of frozen weights."""
    return torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32


def weights_dtype(config: ResolvedConfig) -> torch.dtype:
    """The data type of the transformer in training: fp32 where its own weights move, as bf16 would round small steps away."""
    return torch.float32 if config.model.model_type == "full" else compute_dtype(config.loop)


def encoding_dtype(device: torch.device) -> torch.dtype:
    """The data type of text and vision encoders: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast(config: LoopConfig, device: torch.device) -> torch.autocast:
    """The precision of a step's forward."""
    return torch.autocast(device.type, dtype=compute_dtype(config), enabled=config.mixed_precision != "no")


def in_own_dtype(method: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    """A method that computes in a model's own data type, whatever autocast it is called in."""

    def call(first: Tensor, *args: Any, **more: Any) -> Any:
        with torch.autocast(device.type, enabled=False):
            return method(first.to(dtype), *args, **more)

    return call
