"""Modules that several processes train together."""

import contextlib
from collections.abc import Iterator, Sequence

from accelerate import Accelerator
from torch import nn


def wrap(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """What a forward calls in the place of a module: DistributedDataParallel around it, or itself with one process."""
    return accelerator.prepare_model(module)


@contextlib.contextmanager
def no_sync(accelerator: Accelerator, modules: Sequence[nn.Module], *, last: bool) -> Iterator[None]:
    """Within it one micro-batch of an optimizer step: processes exchange gradients in the last one only.

    Args:
        modules: what `wrap` gave.
    """
    with contextlib.ExitStack() as stack:
        for module in () if last else modules:
            stack.enter_context(accelerator.no_sync(module))
        yield
