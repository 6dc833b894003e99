"""Every storage that a piece of work holds, and whose it is, at the moment when it holds most."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# CUDA's caching allocator hands out multiples of it.
_ROUND = 512


class StorageAccount(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is active, real or fake.

    Attributes:
        owner: whom new storages are counted for.
        peak: bytes of all at the fullest moment; peak_of: by owner; peak_op: the operator after which that was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owner = "other"
        self.peak_op = ""
        self.peak = 0
        self.peak_of: Counter[str] = Counter()
        self._held: dict[int, tuple[int, str]] = {}
        self._now = 0
        self._now_of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if self._now > self.peak:
            self.peak, self.peak_of, self.peak_op = self._now, self._now_of.copy(), str(func)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held or tensor.device.type == "meta":
            return
        size = -(-storage.nbytes() // _ROUND) * _ROUND
        self._held[key] = (size, self.owner)
        self._now += size
        self._now_of[self.owner] += size
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size, owner = self._held.pop(key)
        self._now -= size
        self._now_of[owner] -= size

    def give(self, tensor: Tensor, owner: str) -> None:
        """Count a tensor's storage for another owner from here on."""
        key = tensor.untyped_storage()._cdata
        if key not in self._held:  # made while the account was not active
            return
        size, before = self._held[key]
        self._held[key] = (size, owner)
        self._now_of[before] -= size
        self._now_of[owner] += size

    def begin(self) -> None:
        """Look for the fullest moment from here on."""
        self.peak, self.peak_of, self.peak_op = self._now, self._now_of.copy(), ""

    @contextmanager
    def of(self, owner: str) -> Iterator[None]:
        """Count what is made inside for an owner."""
        before, self.owner = self.owner, owner
        try:
            yield
        finally:
            self.owner = before


def materialise(module: nn.Module, device: torch.device | str = "cpu") -> None:
    """Give the tensors of a module on the meta device memory, real or fake, without values.

    Also those that are plain attributes. Swapped one by one: under fake tensors `.to` does not.
    """
    known: dict[int, Tensor] = {}

    def filled(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if parameter else new
        return known[id(tensor)]

    for part in module.modules():
        for tensors in cast("list[dict[str, Any]]", [part._parameters, part._buffers, vars(part)]):
            for name, tensor in list(tensors.items()):
                if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                    tensors[name] = filled(tensor)
