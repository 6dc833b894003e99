"""Every storage that a piece of work holds on each device, and whose it is, at the moment when the device holds most."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

# CUDA's caching allocator gives memory in multiples of it.
_ROUND = 512
_DEVICE = torch.ops.prim.device.default


def allocated_bytes(tensors: Iterator[Tensor] | list[Tensor]) -> int:
    """What the allocator takes for tensors that share no storage."""
    return sum(_rounded(tensor.nbytes) for tensor in tensors)


def _rounded(size: int) -> int:
    return -(-size // _ROUND) * _ROUND


@dataclass
class DeviceAccount:
    """Bytes on one device.

    Attributes:
        now: held at present; now_of: by owner.
        peak: held at the fullest moment; peak_of: by owner; peak_op: the operator after which that was.
    """

    now: int = 0
    now_of: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    peak_of: Counter[str] = field(default_factory=Counter)
    peak_op: str = ""

    def change(self, size: int, owner: str) -> None:
        """Hold so many bytes more, or fewer, for an owner."""
        self.now += size
        self.now_of[owner] += size

    def mark(self, op: str) -> None:
        """Take the present for the fullest moment."""
        self.peak, self.peak_of, self.peak_op = self.now, self.now_of.copy(), op


class StorageAccount(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is active, real or fake; on the meta device there are none.

    Attributes:
        owner: the name under which new storages are counted.
        devices: the account of each device that holds something, or did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owner = "other"
        self.devices: dict[torch.device, DeviceAccount] = {}
        self._held: dict[int, tuple[DeviceAccount, int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a quantised tensor: its own operators come one by one
        out = func(*args, **(kwargs or {}))
        if func is _DEVICE:  # two of three calls on fake tensors, and no tensor
            return out
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        for account in self.devices.values():
            if account.now > account.peak:
                account.mark(str(func))
        return out

    def _see(self, tensor: Tensor) -> None:
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                self._see(getattr(tensor, name))
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held or tensor.device.type == "meta":
            return
        account, size = self.on(tensor.device), _rounded(storage.nbytes())
        self._held[key] = (account, size, self.owner)
        account.change(size, self.owner)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        account, size, owner = self._held.pop(key)
        account.change(-size, owner)

    def on(self, device: torch.device) -> DeviceAccount:
        """The account of a device; an empty one where nothing was ever held there."""
        return self.devices.setdefault(device, DeviceAccount())

    def give(self, tensor: Tensor, owner: str) -> None:
        """Count a tensor's storage for another owner from here on."""
        key = tensor.untyped_storage()._cdata
        if key not in self._held:  # made while the account was not active
            return
        account, size, before = self._held[key]
        self._held[key] = (account, size, owner)
        account.change(-size, before)
        account.change(size, owner)

    def begin(self) -> None:
        """Look for the fullest moments from here on."""
        for account in self.devices.values():
            account.mark("")

    @contextmanager
    def of(self, owner: str) -> Iterator[None]:
        """Count what is made inside for an owner."""
        before, self.owner = self.owner, owner
        try:
            yield
        finally:
            self.owner = before
