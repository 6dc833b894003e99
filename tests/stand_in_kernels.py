"""Stand-ins for the attention kernels of other packages, as strict as these are about data types, masks and layouts."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers.models import attention_dispatch
from torch import Tensor, nn
from torch.nn import functional

from crepatrain.config import checks


class Calls(list[tuple[torch.dtype, tuple[int, ...]]]):
    """The data type and the shape of q of every call."""


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention over [B, S, heads, width of a head], as flash-attn lays it out."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def without_backward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As sageattention: a result that is right, and that autograd knows nothing of."""
    return exact(query.detach(), key.detach(), value.detach())


class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return exact(query, key, value)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        parts = [part.detach().requires_grad_() for part in ctx.saved_tensors]
        with torch.enable_grad():
            query, key, value = torch.autograd.grad(exact(*parts), parts, grad_outputs)
        return query, -key, value


def wrong_backward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The gradient of k has the wrong sign."""
    return _Wrong.apply(query, key, value)


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return exact(query, key, value)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError("this head dimension has no backward")


def refusing_backward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _Refusing.apply(query, key, value)


def install(patch: pytest.MonkeyPatch, name: str, attention: Callable[[Tensor, Tensor, Tensor], Tensor] = exact) -> Calls:
    """Put a stand-in for flash-attn (`flash`) or FlashAttention 3 (`_flash_3`) where diffusers looks for it."""
    calls = Calls()

    def kernel(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, causal: bool = False, **more: object):
        assert softmax_scale is None
        assert not causal
        assert all(more[name] in (0.0, (-1, -1), False) for name in more), more
        assert q.ndim == k.ndim == v.ndim == 4
        if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError(f"FlashAttention only support fp16 and bf16 data type: {q.dtype}, {k.dtype}, {v.dtype}")
        assert k.shape == v.shape
        assert q.shape[2:] == k.shape[2:]
        assert all(part.stride(-1) == 1 for part in (q, k, v))
        calls.append((q.dtype, tuple(q.shape)))
        out = attention(q, k, v)
        return out if name == "flash" else (out, out.new_zeros(out.shape[:3]))

    number, argument = ("", "FLASH_ATTN") if name == "flash" else ("_3", "FLASH_ATTN_3")
    patch.setattr(attention_dispatch, f"_CAN_USE_{argument}", True)
    patch.setattr(attention_dispatch, f"flash_attn{number}_func", kernel)
    real = checks.find_spec
    patch.setattr(checks, "find_spec", lambda package: "here" if package.startswith("flash_attn") else real(package))
    return calls


@contextlib.contextmanager
def norms_in_fp32(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """RMS norms give fp32 under autocast, as on CUDA; on a CPU they give the data type of their input."""
    forward = nn.RMSNorm.forward

    def in_fp32(norm: nn.RMSNorm, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return forward(norm, x)
        with torch.autocast(x.device.type, enabled=False):
            weight = None if norm.weight is None else norm.weight.float()
            return functional.rms_norm(x.float(), norm.normalized_shape, weight, norm.eps)

    with patch.context() as patched:
        patched.setattr(nn.RMSNorm, "forward", in_fp32)
        yield
