"""CUDA's casts on CPU tensors: the operators that torch has them for, their types, and the memory of a step under them."""

import contextlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from crepatrain.config.plan import make_plan
from crepatrain.config.run_config import RunConfig
from crepatrain.data.buckets import Bucket
from crepatrain.memory import stages
from crepatrain.memory.cuda_autocast import POLICIES, cuda_autocast_lists, operators_with_autocast
from crepatrain.specs import FAMILIES


def test_every_operator_that_cuda_casts_has_a_policy():
    assert set(POLICIES) == operators_with_autocast("AutocastCUDA")


BF16, FP32 = torch.bfloat16, torch.float32
# Name, operator, and its type under CUDA's lists for a bf16 argument; the CPU's lists give another one for the first of them.
CASES = {
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[-1:]), FP32),
    "group_norm": (lambda x: F.group_norm(x, 2), FP32),
    "softmax": (lambda x: x.softmax(-1), FP32),
    "log_softmax": (lambda x: F.log_softmax(x, -1), FP32),
    "power": (lambda x: x.pow(2), FP32),
    "square root of the inverse": (lambda x: x.abs().rsqrt(), FP32),
    "exponential": (torch.exp, FP32),
    "sum": (torch.sum, FP32),
    "sum over an axis": (lambda x: x.sum(dim=1), FP32),
    "norm": (lambda x: x.norm(dim=1), FP32),
    "linalg norm": (torch.linalg.vector_norm, FP32),
    "softplus": (F.softplus, FP32),
    "interpolate": (lambda x: F.interpolate(x[None], scale_factor=2.0, mode="linear"), FP32),
    "loss": (lambda x: F.mse_loss(x, x), FP32),
    "similarity": (lambda x: F.cosine_similarity(x, x), FP32),
    "promoted": (lambda x: torch.addcmul(x, x, x.float()), FP32),
    "promoted to nothing": (lambda x: torch.addcmul(x, x, x), BF16),
    "stays": (lambda x: F.gelu(x) + x.mean() + x.sin(), BF16),
    "a type that was asked for": (lambda x: x.softmax(-1, dtype=BF16), BF16),
    "made bf16": (lambda x: x.float() @ x.float().T, BF16),
    "attention": (lambda x: F.scaled_dot_product_attention(*[x.float()[None]] * 3), BF16),
    "concatenated": (lambda x: torch.cat([x, x.float()]), FP32),
    "padded": (lambda x: F.pad(x[None], (1, 1), mode="replicate"), BF16),
    "whole numbers": (lambda x: x.long().sum(), torch.int64),
    "double": (lambda x: x.double().exp(), torch.float64),
}


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_an_operator_has_the_type_that_it_has_on_cuda(name, fake):
    operator, dtype = CASES[name]
    with cuda_autocast_lists():
        mode = FakeTensorMode() if fake else torch.enable_grad()
        with mode, torch.autocast("cpu", BF16):
            assert operator(torch.ones(4, 8, dtype=BF16)).dtype == dtype
        assert torch.ones(4, 8, dtype=BF16).exp().dtype == BF16  # outside of autocast nothing is cast


@pytest.mark.parametrize("failing", [False, True])
def test_the_cpu_has_its_own_lists_again_afterwards(failing):
    def types():
        x = torch.ones(4, 8, dtype=BF16)
        with torch.autocast("cpu", BF16):
            return [x.softmax(-1).dtype, x.exp().dtype, F.pad(x[None], (1, 1), mode="replicate").dtype]

    before = types()
    with pytest.raises(KeyError) if failing else contextlib.nullcontext(), cuda_autocast_lists():
        assert types() != before
        if failing:
            raise KeyError
    assert types() == before


def test_gradients_are_those_of_the_casts():
    x = torch.randn(4, 8, dtype=BF16, requires_grad=True)
    with cuda_autocast_lists(), torch.autocast("cpu", BF16):
        F.layer_norm(x, (8,)).square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == BF16


# GiB of an AdamW LoRA step with CREPA from the cache, on fake tensors of a CUDA device, under torch.autocast("cuda") itself. Made
# with a pretend CUDA device in a CPU build of torch 2.13; attention was the flash kernel, with a mask the memory-efficient
# one, and silu_backward one kernel, as on CUDA: TrainingStep(plan, bucket).place(account, cuda); account.begin(); .run(account).
# The CPU's own lists give 14.4 for sana-2b. Without a kernel for silu_backward, which a CPU build lacks, it would be 17.29.
ON_CUDA = {"sana-2b": 14.9695, "wan2.1-1.3b": 9.8195, "ltx-2b": 5.4275, "kandinsky5-lite": 15.3568}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "sana-2b")) for name in ON_CUDA])
def test_a_step_holds_what_it_holds_under_cudas_autocast(name, tmp_path):
    spec = next(spec for spec in FAMILIES.values() if name in spec.released)
    values = {
        "model_family": spec.name,
        "pretrained_model_name_or_path": spec.released[name].repo,
        "train_data": str(Path(__file__).parent),
        "output_dir": str(tmp_path / "run"),
        "max_train_steps": 100,
        "crepa_enabled": True,
        "crepa_encoder_image_size": "grid",
    }
    plan = make_plan(RunConfig.model_validate(values), online=False)
    held = stages.training_stage(plan, Bucket(*plan.size)).allocated / stages.GIB
    assert held == pytest.approx(ON_CUDA[name], rel=0.01)
