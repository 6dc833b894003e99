"""Arithmetic in a module's own precision, whatever the step around it runs in."""

import contextlib
from contextlib import AbstractContextManager

import torch


def own_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off on a device; the meta device knows none."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
