"""How many bytes of tensors live at once beside given ones, on any device."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Within the context, counts the storages that operations make; `peak` is the most that lived at once, in bytes.

    Args:
        beside: tensors that exist already and don't count.
    """

    def __init__(self, beside: Sequence[Tensor]) -> None:
        super().__init__()
        self._beside = beside
        self._live: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in beside}
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._live:
                    self._live[key] = storage.nbytes()
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self._now)
        return result

    def _free(self, key: int) -> None:
        self._now -= self._live.pop(key, 0)
