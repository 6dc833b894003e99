"""A frozen base in fewer bits: what is quantised, how exact it is, how much is held while it is loaded."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import tiny_family
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from crepatrain.config.plan import read_plan
from crepatrain.errors import UserError
from crepatrain.placement import quantizing
from crepatrain.placement.quantizing import Nf4Linear, load_quantized
from crepatrain.specs import FAMILIES
from crepatrain.training import build, selftest

CPU = torch.device("cpu")
WAYS = ("int8", "fp8", "nf4")
REAL = {
    "wan": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "ltxvideo": "Lightricks/LTX-Video",
    "sanavideo": "Efficient-Large-Model/SANA-Video_2B_480p_diffusers",
    "kandinsky5_video": "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
}


def is_quantized(module: nn.Module) -> bool:
    return isinstance(module, Nf4Linear) or is_traceable_wrapper_subclass(module._parameters.get("weight"))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_linear_layers_inside_the_blocks_are_quantised_and_nothing_else(tiny_checkpoint, name, how):
    family, folder = tiny_family(name), str(tiny_checkpoint(name))
    plain = family.load_transformer(folder, torch.bfloat16)
    found = load_quantized(family, folder, torch.bfloat16, how, CPU)
    assert not found.training
    inside = []
    for path, module in plain.named_modules():
        mine = found.get_submodule(path)
        if is_quantized(mine):
            inside.append(path)
            assert isinstance(module, nn.Linear)
            assert path.startswith(f"{family.spec.blocks}.")
            assert mine.bias is None or torch.equal(mine.bias, module.bias)
        elif isinstance(module, nn.Linear) and path.startswith(f"{family.spec.blocks}."):
            assert "norm" in path or "modulation" in path
        else:
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                other = getattr(mine, key)
                assert torch.equal(tensor, other), f"{path}.{key}"
                assert tensor.dtype == other.dtype
    assert len(inside) >= 4 * len(family.blocks(found))
    assert not any(parameter.requires_grad for parameter in found.parameters())


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "wan")) for name in FAMILIES])
def test_gradients_at_released_widths(config_file, monkeypatch, name, how):
    """One block with random weights, as wide as the released model's."""
    monkeypatch.setattr(selftest, "_ALLOWED_OF_BASE", {"int8": 0.02, "fp8": 0.06, "nf4": 0.25})
    path = config_file(
        model_family=name,
        pretrained_model_name_or_path=REAL[name],
        base_quantization=how,
        mixed_precision="bf16",
        crepa_enabled=False,
        **dict.fromkeys(("height", "width", "num_frames")),
    )
    plan = read_plan(path, online=False)
    selftest.expect_gradients(plan, build.build_family(plan), CPU)


def test_a_quantisation_that_loses_gradients_is_refused(config_file, monkeypatch):
    """torchao's own config, whose output has no gradient towards its input."""
    from torchao import quantization

    monkeypatch.setattr(
        quantization,
        "Int8WeightOnlyConfig",
        lambda **_: quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
    )
    plan = read_plan(config_file(base_quantization="int8", mixed_precision="bf16", crepa_enabled=False))
    with pytest.raises(UserError, match=r"base_quantization=int8: in a trial of one block"):
        selftest.expect_gradients(plan, build.build_family(plan), CPU)


@pytest.mark.parametrize("how", WAYS)
def test_rows_quantised_apart_are_those_of_the_whole(monkeypatch, how):
    torch.manual_seed(0)
    plain, found = nn.Linear(96, 200).to(torch.bfloat16), []
    inputs = torch.randn(4, 96, dtype=torch.bfloat16)
    for at_once in (1 << 21, 96 * 60):
        monkeypatch.setattr(quantizing, "_AT_ONCE", at_once)
        module = nn.Sequential(copy.deepcopy(plain))
        quantizing.quantize_layer(module, "0", how)
        weight = module[0].weight
        tensors = (
            [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
            if how != "nf4"
            else [*module.state_dict().values()]
        )
        found.append([*tensors, module(inputs)])
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))
    error = (found[0][-1] - plain(inputs)).float().norm() / plain(inputs).float().norm()
    assert 0 < error < {"int8": 0.02, "fp8": 0.06, "nf4": 0.2}[how]


@pytest.mark.parametrize("how", WAYS)
def test_autocast_decides_the_data_type_that_is_computed_in(how):
    module = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16))
    quantizing.quantize_layer(module, "0", how)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.randn(3, 64)).dtype is torch.bfloat16  # as of a norm on CUDA


@pytest.mark.parametrize("shape", [(32, 32), (64, 96), (6, 5), (96, 128)])
def test_nf4_holds_rows_that_end_inside_a_block(shape):
    torch.manual_seed(1)
    plain = torch.nn.Linear(shape[1], shape[0], bias=False)
    error = (Nf4Linear(plain).dequantized() - plain.weight).norm() / plain.weight.norm()
    assert error < 0.12


def test_nf4_is_bitsandbytes_own_to_the_bit():
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    plain = nn.Linear(128, 96).to(torch.bfloat16)
    own, theirs = Nf4Linear(plain), Linear4bit(128, 96, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=False)
    weight = Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False, module=theirs)
    theirs.weight, theirs.bias = weight, plain.bias
    theirs = theirs.to("cpu")
    outputs, gradients = [], []
    for layer in (own, theirs):
        inputs = torch.randn(3, 5, 128, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outputs.append(layer(inputs))
        outputs[-1].float().square().sum().backward()
        gradients.append(inputs.grad)
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)


_READ = """
import json, sys
from dataclasses import replace
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from crepatrain.families import family_class, get_family
from crepatrain.placement.quantizing import load_quantized

def most():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

def size(tensor):
    if is_traceable_wrapper_subclass(tensor):
        return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes

def load(folder, changes):
    checkpoint = family_class("wan").tiny["tiny"].checkpoint
    family = get_family("wan", replace(checkpoint, transformer={**checkpoint.transformer, **changes}))
    return load_quantized(family, folder, torch.bfloat16, sys.argv[1], torch.device("cpu"))

torch.set_num_threads(1)
first = load(sys.argv[2], {})
before = most()
made = load(sys.argv[3], json.loads(sys.argv[4]))
print(most() - before, sum(map(size, made.state_dict().values())) / 2**20)
"""
_LARGE = {"num_attention_heads": 8, "attention_head_dim": 128, "text_dim": 512, "freq_dim": 256, "ffn_dim": 4096, "num_layers": 8}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the most memory that a process held is read from /proc")
@pytest.mark.parametrize("shard", ["60MB", pytest.param("10GB", marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])  # bitsandbytes' CPU kernel holds more
def test_little_beside_the_result_is_held_while_it_is_loaded(tiny_checkpoint, tmp_path, how, shard):
    tiny = tiny_family()
    shapes = {**tiny.checkpoint.transformer, **_LARGE}
    WanTransformer3DModel.from_config(shapes).save_pretrained(tmp_path / "transformer", max_shard_size=shard)
    command = [sys.executable, "-c", _READ, how, str(tiny_checkpoint("wan")), str(tmp_path), json.dumps(_LARGE)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    held, result = map(float, ended.stdout.split()[-2:])
    width, hidden = 8 * 128, 4096
    block = 4 * (8 * width**2 + 2 * width * hidden) / 2**20  # in fp32, in which a layer is quantised
    assert result < 8 * block * 0.33
    assert held <= result + block + 16, "16 MiB of the libraries' code"


def test_a_tensor_that_is_missing_is_named(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint("wan") / "transformer", tmp_path / "transformer")
    [path] = (tmp_path / "transformer").glob("*.safetensors")
    tensors = load_file(path)
    del tensors["blocks.3.attn1.to_q.weight"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"transformer can't be loaded: it lacks blocks\.3\.attn1\.to_q\.weight"):
        load_quantized(tiny_family(), str(tmp_path), torch.bfloat16, "int8", CPU)
