"""The attention of a transformer, module by module. diffusers' own `set_attention_backend` changes it in the whole process."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
)
from torch import Tensor

_MARK = "_crepatrain"


def set_backends(transformer: Any, choose: Callable[[str], str]) -> None:
    """Give every attention of a transformer that diffusers dispatches a backend of its own.

    Args:
        choose: the name of an attention module -> the name of its backend.

    Raises:
        ValueError: diffusers knows no such backend.
        RuntimeError: the backend's package is not installed, or too old.
    """
    for name, module in transformer.named_modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = _prepared(choose(name))


def _prepared(name: str) -> AttentionBackendName:
    backend = AttentionBackendName(name)
    if backend is AttentionBackendName.NATIVE:
        return backend
    _check_attention_backend_requirements(backend)
    kernel = _flash_3 if backend is AttentionBackendName._FLASH_3 else _AttentionBackendRegistry._backends[backend]
    if not hasattr(_AttentionBackendRegistry._backends[backend], _MARK):
        # Its checks of data types would see them before they are made the same.
        parallel = _AttentionBackendRegistry._is_context_parallel_available(backend)
        _AttentionBackendRegistry.register(backend, constraints=[], supports_context_parallel=parallel)(_in_one_dtype(kernel))
    return backend


def _in_one_dtype(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel with q, k and v cast to the data type of autocast, or to v's outside of it.

    Autocast casts for torch's own attention alone, and on CUDA it computes norms in fp32: q and k would arrive in fp32 beside v
    in bf16.
    """

    @functools.wraps(kernel)
    def attention(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        kind = value.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
        return kernel(query=query.to(dtype), key=key.to(dtype), value=value.to(dtype), **rest)

    setattr(attention, _MARK, True)
    return attention


def _flash_3(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """FlashAttention 3 with its own backward; diffusers wraps it into an operator that has none.

    Args:
        query, key, value: [B, S, heads, width of a head].
    """
    if attn_mask is not None:
        raise ValueError("FlashAttention 3 takes no mask")
    kernel: Any = attention_dispatch.flash_attn_3_func
    result = kernel(q=query, k=key, v=value, softmax_scale=scale, causal=is_causal)
    return result[0] if isinstance(result, tuple) else result  # some versions add the log-sum-exp
