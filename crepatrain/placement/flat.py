"""The tensors behind a block's frozen parameters, laid out in one buffer of bytes, so that one copy moves them all."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# CUDA's kernels read whole vectors: every tensor begins where one of the allocator's own would.
_ALIGNED = 256


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a tensor's bytes: itself, or what is inside of a quantised one."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def _rebuilt(tensor: Tensor, plain: Iterator[Tensor]) -> Tensor:
    """A tensor like this one around other plain tensors."""
    if not is_traceable_wrapper_subclass(tensor):
        return next(plain)
    names, context = tensor.__tensor_flatten__()
    inner = {name: _rebuilt(getattr(tensor, name), plain) for name in names}
    if isinstance(context, dict) and "device" in context:
        context = context | {"device": next(iter(inner.values())).device}
    kind: Any = type(tensor)
    return kind.__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())


class Layout:
    """Where each plain tensor of some parameters lies in a buffer.

    Attributes:
        size: bytes of the buffer.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        # On the meta device, so that the weights themselves can go.
        self._like = [_rebuilt(each, (_as_meta(plain) for plain in plain_tensors(each))) for each in parameters]
        self._places: list[tuple[int, Tensor]] = []
        self.size = 0
        for plain in (plain for each in self._like for plain in plain_tensors(each)):
            self._places.append((self.size, plain))
            self.size += -(-plain.nbytes // _ALIGNED) * _ALIGNED

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The plain tensors as views of a buffer, uint8 [at least size]."""
        return [
            buffer[start : start + plain.nbytes]
            .view(plain.dtype)
            .as_strided(plain.size(), plain.stride(), start // plain.itemsize)
            for start, plain in self._places
        ]

    def parameters(self, buffer: Tensor | None) -> list[nn.Parameter]:
        """The parameters with their values in a buffer; None: without values, on the meta device."""
        plain = iter(self.views(buffer) if buffer is not None else [plain for _, plain in self._places])
        return [nn.Parameter(_rebuilt(each, plain), requires_grad=False) for each in self._like]


def _as_meta(plain: Tensor) -> Tensor:
    """Its shape, data type and order of dimensions, without gaps."""
    return torch.empty_like(plain.detach(), device="meta")
