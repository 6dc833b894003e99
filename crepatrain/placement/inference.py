"""Placing models that only compute forward: as a whole where they fit, otherwise with the blocks' weights in host memory.

A ring of blocks brings the weights to the device ahead of their use, as it does in training: what is computed stays the same to
the bit. All else of a model, as the table of a text encoder's words, is on the device.
"""

import contextlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from crepatrain.placement.devices import free_bytes
from crepatrain.placement.flat import plain_tensors
from crepatrain.placement.placing import free_memory
from crepatrain.placement.ring import BlockRing

# Of what is free on a device, the share that weights may take: the rest is for what is computed with them.
_SHARE = 0.75


def block_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of blocks of a model, without those inside a block."""
    found: list[nn.ModuleList] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and any(True for _ in child.parameters()):
                found.append(child)
            else:
                look(child)

    look(model)
    return found


def weights_bytes(models: Sequence[nn.Module]) -> int:
    """Bytes of the parameters of some models; those of quantised ones as they are stored."""
    return sum(plain.nbytes for model in models for each in model.parameters() for plain in plain_tensors(each.detach()))


def fits(models: Sequence[nn.Module], device: torch.device) -> bool:
    """Whether the weights of some models leave room on the device for what is computed with them; always so on a CPU."""
    free_memory()
    free = free_bytes(device)
    return free is None or weights_bytes(models) <= _SHARE * free


def is_offloaded(setting: bool | Literal["auto"], models: Sequence[nn.Module], device: torch.device) -> bool:
    """Whether the blocks' weights of some models are left in host memory: as it is set, or with auto where they do not fit."""
    return not fits(models, device) if setting == "auto" else setting


def place_frozen(models: Sequence[nn.Module], device: torch.device, *, offload: bool) -> None:
    """Put models that are not trained on a device.

    Args:
        models: on the CPU, each with all its weights.
        offload: whether the blocks' weights stay in host memory, pinned where the system has that much of it.
    """
    with contextlib.ExitStack() as apart:
        if offload:
            for model in models:
                model.requires_grad_(False)
                for blocks in block_lists(model):
                    apart.enter_context(BlockRing(list(blocks), device, must_pin=False).apart())
        for model in models:
            model.to(device)
