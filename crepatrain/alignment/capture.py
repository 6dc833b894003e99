"""Reading a block's output out of a transformer's forward, without touching the transformer."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def capture_blocks(blocks: nn.ModuleList, wanted: Collection[int]) -> Iterator[dict[int, Any]]:
    """Within the context each wanted block's output lands in the dict that is yielded, by the block's index.

    The hooks are off again at the end of the context, so leave it before backward: what gradient checkpointing computes again is
    not captured. The first output of a block is kept, the one that carries the gradient of the forward.

    Args:
        blocks: of the transformer itself, not of a wrapper around it.
        wanted: indices, from 0.
    """
    captured: dict[int, Any] = {}

    def keep(index: int):  # noqa: ANN202 - a forward hook
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            captured.setdefault(index, output)

        return hook

    handles = [blocks[index].register_forward_hook(keep(index)) for index in sorted(set(wanted))]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
