"""The casts of CUDA's autocast on CPU tensors: which operators compute in fp32 there, and what a step therefore holds.

The CPU's autocast has other lists: norms, softmax, powers and sums stay in bf16 on it, which CUDA makes fp32. The policies are
those of torch's "CUDA Ops that can autocast" (ATen/autocast_mode.h); a test asks torch itself which operators have one.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_LOWER = (
    "_convolution _convolution.deprecated _scaled_dot_product_flash_attention _thnn_fused_gru_cell "
    "_thnn_fused_lstm_cell addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d conv_tbc "
    "conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution cudnn_convolution "
    "cudnn_convolution_transpose einsum gru_cell linalg_multi_dot linalg_vecdot linear lstm_cell matmul mm mv prelu "
    "rnn_relu_cell rnn_tanh_cell scaled_dot_product_attention"
)
_FP32 = (
    "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d acos asin binary_cross_entropy_with_logits cdist cosh cosine_embedding_loss "
    "cosine_similarity dist erfinv exp expm1 frobenius_norm.dim group_norm hinge_embedding_loss huber_loss kl_div "
    "l1_loss layer_norm log log10 log1p log2 logsumexp margin_ranking_loss mse_loss multi_margin_loss "
    "multilabel_margin_loss native_layer_norm nll_loss nll_loss2d nuclear_norm nuclear_norm.dim pdist "
    "poisson_nll_loss pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor reciprocal renorm rms_norm rsqrt sinh "
    "smooth_l1_loss soft_margin_loss softplus tan triplet_margin_loss upsample_bicubic2d upsample_bilinear2d "
    "upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d"
)
# The result is asked for in fp32, where the caller asks for none; the argument stays as it is.
_FP32_RESULT = (
    "cumprod cumsum linalg_matrix_norm linalg_matrix_norm.str_ord linalg_vector_norm log_softmax.int norm.Scalar "
    "norm.ScalarOpt_dim prod prod.dim_int softmax.int sum sum.dim_IntList"
)
# The widest of the arguments' types.
_PROMOTED = "addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put scatter_add tensordot vdot"
# An error on CUDA, and no operator of a step.
_REFUSED = "binary_cross_entropy"

POLICIES: Mapping[str, str] = {
    name: policy
    for policy, names in {
        "lower": _LOWER,
        "fp32": _FP32,
        "fp32 result": _FP32_RESULT,
        "promoted": _PROMOTED,
        "refused": _REFUSED,
    }.items()
    for name in names.split()
}
"""What CUDA's autocast does with an operator, by its name and overload in `aten`."""

_Kernel = Callable[..., Any]
_KEY = "AutocastCPU"
_WITHOUT = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def operators_with_autocast(key: str) -> set[str]:
    """The operators of `aten` that have a kernel of their own for a dispatch key of autocast, as `name` or `name.overload`."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("aten::") for name in names if name.startswith("aten::") and has_kernel(name, key)}


@contextlib.contextmanager
def cuda_autocast_lists() -> Iterator[None]:
    """Within it, `torch.autocast("cpu")` casts what `torch.autocast("cuda")` would, on real and on fake CPU tensors.

    For the whole process, so for one that computes nothing else meanwhile.
    """
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*[Oo]verriding a previously registered kernel")
            for name, kernel in _kernels().items():
                library.impl(name, kernel, _KEY)
        yield
    finally:
        library._destroy()


@functools.cache
def _kernels() -> Mapping[str, _Kernel]:
    """What takes the place of the CPU's kernels. Where both lists agree torch's own stay, which keep cast weights."""
    of_cpu = operators_with_autocast(_KEY)
    cast = {"fp32": _in_fp32, "fp32 result": _with_fp32_result, "promoted": _promoted, "lower": _in_lower}
    found: dict[str, _Kernel] = {}
    for name, policy in POLICIES.items():
        if policy in cast and not (policy == "lower" and name in of_cpu):
            found[name] = cast[policy](_operator(name))
    for name in of_cpu - POLICIES.keys():
        found[name] = torch.library.fallthrough_kernel
    return found


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _eligible(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64 and value.device.type == "cpu"


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda value: value.to(dtype) if _eligible(value) else value, values)


def _run(operator: Any, args: Any, kwargs: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(_WITHOUT):
        return operator(*args, **kwargs)


def _in_fp32(operator: Any) -> _Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return _run(operator, *_cast((args, kwargs), torch.float32))

    return kernel


def _in_lower(operator: Any) -> _Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return _run(operator, *_cast((args, kwargs), torch.get_autocast_dtype("cpu")))

    return kernel


def _with_fp32_result(operator: Any) -> _Kernel:
    names = [argument.name for argument in operator._schema.arguments]
    takes_dtype = "dtype" in names

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if not _eligible(args[0]):
            return _run(operator, args, kwargs)
        if not takes_dtype:  # a norm: CUDA calls the overload with one
            return _run(operator, (args[0].float(), *args[1:]), kwargs)
        if given.get("dtype") is None:
            given["dtype"] = torch.float32
        return _run(operator, (), given)

    return kernel


def _promoted(operator: Any) -> _Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        types = {value.dtype for value in tree_leaves((args, kwargs)) if _eligible(value)}
        dtype = torch.float32 if torch.float32 in types else torch.get_autocast_dtype("cpu")
        return _run(operator, *_cast((args, kwargs), dtype))

    return kernel
