"""Placing an adapted transformer on its device. Optimizers come after it, as a parameter may be another one once it is placed."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from crepatrain.config.sections import LoopConfig
from crepatrain.errors import UserError
from crepatrain.families.base import Family
from crepatrain.placement.block_inputs import BlockInputs
from crepatrain.placement.checkpointing import checkpoint_blocks
from crepatrain.placement.ring import leave_to_ring, ring_of


def place(config: LoopConfig, family: Family, transformer: Any, device: torch.device) -> None:
    """Put a transformer on a device in training mode, with gradient checkpointing and compiled blocks.

    Of so many blocks as block_offload says the frozen weights go to host memory instead. A transformer on the meta device gets
    memory there, without values, and none on the host.

    Args:
        transformer: of diffusers, adapted where an adapter is trained.

    Raises:
        UserError: the system does not pin as much host memory as block_offload needs.
    """
    blocks, values = family.blocks(transformer), not next(transformer.parameters()).is_meta
    inputs = BlockInputs(blocks, device, values=values) if config.checkpoint_offload else None
    checkpoint_blocks(config, family, transformer, inputs)
    ring = ring_of(config, blocks, device)
    with ring.apart() if ring else contextlib.nullcontext():
        if not values:
            materialise(transformer, device)
        else:
            transformer.to(device)
            _move_plain_tensors(transformer, device)
    transformer.train()
    if ring:
        leave_to_ring(transformer)
    if config.compile:  # block by block: they share one graph, and a second bucket makes it dynamic rather than one more
        for block in blocks:
            if ring:  # whose hooks have no place in a graph
                block.forward = torch.compile(block.forward)
            else:
                block.compile()


def set_attention(config: LoopConfig, family: Family, transformer: Any) -> None:
    """Set the config's attention backend on the attentions of a transformer that are given no mask, and on nothing else.

    Raises:
        UserError: it is not installed, or its version is too old.
    """
    try:
        family.set_attention(transformer, config.attention_backend)
    except (ValueError, RuntimeError) as error:
        what = f"attention_backend={config.attention_backend}: {error}"
        raise UserError(what, "use native, or leave it out", ("attention_backend",)) from error


def _move_plain_tensors(module: nn.Module, device: torch.device) -> None:
    """Move tensors that are plain attributes, which `.to` leaves: each forward would copy them anew, and wait for the copy."""
    for part in module.modules():
        for name, tensor in list(vars(part).items()):
            if isinstance(tensor, Tensor) and tensor.device != device:
                setattr(part, name, tensor.to(device))


def materialise(module: nn.Module, device: torch.device | str = "cpu") -> None:
    """Give the tensors of a module on the meta device memory, real or fake, without values.

    Also those that are plain attributes. Exchanged one by one, because `.to` does not do it under fake tensors.
    """
    known: dict[int, Tensor] = {}

    def filled(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            new = _empty_like(tensor, device)
            parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if parameter else new
        return known[id(tensor)]

    for part in module.modules():
        for tensors in cast("list[dict[str, Any]]", [part._parameters, part._buffers, vars(part)]):
            for name, tensor in list(tensors.items()):
                if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                    tensors[name] = filled(tensor)


def _empty_like(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor without values; of one that consists of several, as a quantised one does, each of them."""
    if not is_traceable_wrapper_subclass(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    names, settings = tensor.__tensor_flatten__()
    parts = {name: _empty_like(getattr(tensor, name), device) for name in names}
    return type(tensor).__tensor_unflatten__(parts, settings, tensor.shape, tensor.stride())


def free_memory() -> None:
    """Give back what the last stage held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.accelerator.empty_host_cache()  # of pinned memory, which torch keeps for the next who asks for some


def trim_host_memory() -> None:
    """Give pages that are free inside the C library's heap back to the system; it keeps many where sizes alternate."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # of glibc alone
            ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def within_memory(work: str, fix: str) -> Iterator[None]:
    """Tell a user what did not fit, and what to do about it.

    Args:
        work: what is done inside, as "while a video was made".

    Raises:
        UserError: the device is out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory {work}", fix) from error
