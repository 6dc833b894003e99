"""The device that a command computes on, and how its libraries are set there."""

import os
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from crepatrain.errors import UserError
from crepatrain.screen import Screen

# accelerate's own: whoever sets it wants the CPU.
_CPU_ASKED = "ACCELERATE_USE_CPU"
# The second is what older versions of torch call it; newer ones read both.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_SEGMENTS = "expandable_segments:True"
_COMPILED = "TORCHINDUCTOR_CACHE_DIR"


def open_device(screen: Screen) -> torch.device:
    """The GPU where there is one that CUDA sees, else the CPU. Called before anything is put on it: its allocator is set here.

    Raises:
        UserError: the machine's GPU is Apple's, which this program does not use.
    """
    if parse_flag_from_env(_CPU_ASKED):
        return torch.device("cpu")
    if torch.cuda.is_available():
        _set_allocator(screen)
        set_precision()
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        raise UserError(
            "this machine's GPU is Apple's (MPS), which crepatrain does not use: it needs CUDA",
            f"use a machine with a GPU of NVIDIA; or, for models as small as the demo's, set {_CPU_ASKED}=true to use the CPU",
        )
    return torch.device("cpu")


def free_bytes(device: torch.device) -> int | None:
    """Memory of a GPU that nobody has taken; None of a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def set_precision() -> None:
    """What an fp32 number goes through on a GPU; the same whatever the versions and the environment have as their default."""
    # fp32 products (the adapter's and the projector's without autocast) keep all 24 bits.
    torch.backends.cuda.matmul.allow_tf32 = False
    # Convolutions are the VAE's, whose fp32 is several times slower without; 11 bits are still three more than bf16 has.
    torch.backends.cudnn.allow_tf32 = True
    # Trying kernels for every new size of clip takes memory that no estimate knows, and two runs may then differ in their bits.
    torch.backends.cudnn.benchmark = False


def _set_allocator(screen: Screen) -> None:
    if any(name in os.environ for name in _ALLOCATOR):
        return
    # Clips of several sizes leave gaps between fixed segments, in which nothing of another size fits.
    for name in _ALLOCATOR:
        os.environ[name] = _SEGMENTS
    screen.note(f"{_ALLOCATOR[0]} was not set: it is {_SEGMENTS}, so that clips of several sizes share the GPU's memory")


def keep_compiled(cache_dir: Path) -> None:
    """Let torch.compile keep what it makes beside the other caches, for the next start; a place that the user has set stays.

    Called before anything is compiled.
    """
    # torch writes its own default there when some of its modules are imported, which says nothing of the user.
    if os.environ.get(_COMPILED) in {None, default_cache_dir()}:
        os.environ[_COMPILED] = str(cache_dir.absolute() / "compiled")
