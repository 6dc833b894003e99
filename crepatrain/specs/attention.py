"""The attention backends of diffusers, by its names for them: which can train, and why the others can't."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class AttentionBackend:
    """A backend that has a backward.

    Attributes:
        package: the module that has to be there, with the name under which it is installed; None: torch's own.
        half_only: whether it takes fp16 and bf16 alone.
    """

    package: tuple[str, str] | None = None
    half_only: bool = False


# Takes the masks of NABLA attention, and is for these alone: without a mask it computes what native does.
FLEX = "flex"

TRAINABLE_BACKENDS: Mapping[str, AttentionBackend] = MappingProxyType(
    {
        "native": AttentionBackend(),
        "_native_cudnn": AttentionBackend(half_only=True),
        "_native_flash": AttentionBackend(half_only=True),
        "_native_efficient": AttentionBackend(),
        "_native_math": AttentionBackend(),
        "flash": AttentionBackend(("flash_attn", "flash-attn"), half_only=True),
        "_flash_3": AttentionBackend(
            ("flash_attn_interface", "FlashAttention 3 (the folder hopper of flash-attention)"), half_only=True
        ),
        "xformers": AttentionBackend(("xformers", "xformers")),
        FLEX: AttentionBackend(),
    }
)

_NO_BACKWARD = ("it has no backward: q, k, v would not learn", "use native, _native_cudnn, flash or _flash_3, or leave it out")
_DOWNLOADED = ("it runs code that it downloads", "install the kernels, and use their own name, such as flash")
_VARLEN = ("it is for masks, and waits for the GPU in every attention", "use flash or _flash_3")
_ELSEWHERE = ("it is for another kind of processor", "use native, or leave it out")

# By a part of the name, the first that fits.
_REFUSED = (
    ("sage", _NO_BACKWARD),
    ("_hub", _DOWNLOADED),
    ("varlen", _VARLEN),
    ("_native_npu", _ELSEWHERE),
    ("_native_xla", _ELSEWHERE),
)


def refused_backend(name: str) -> tuple[str, str] | None:
    """Why a backend that diffusers has can't be trained with, and the remedy; None where it can, or where no rule is known."""
    if name in TRAINABLE_BACKENDS:
        return None
    return next((reason for part, reason in _REFUSED if part in name), None)
