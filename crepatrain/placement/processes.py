"""Modules that several processes train together."""

import contextlib
import os
from collections.abc import Iterator, Sequence

from accelerate import Accelerator
from torch import nn

from crepatrain.errors import UserError


def expect_all_processes() -> None:
    """Make sure that a launcher began the processes that it was asked for.

    Raises:
        UserError: it began this one alone.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if launched and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch --num_processes: it began one process, as on a CPU it begins several only with MPI",
            "use torchrun --nproc_per_node N -m crepatrain fit CONFIG, or leave --num_processes out",
        )


def local_processes() -> int:
    """How many processes train on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def wrap(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """What a forward calls in the place of a module: DistributedDataParallel around it, or itself with one process."""
    return accelerator.prepare_model(module, device_placement=False)  # it is where it should be


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
