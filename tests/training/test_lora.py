"""The adapter: where it sits, in which precision, and what is exported of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from common import tiny_family
from peft.tuners.lora import LoraLayer
from torch import nn

from crepatrain.errors import UserError
from crepatrain.specs import WAN
from crepatrain.training.lora import (
    add_lora,
    baked_adapter,
    is_adapted,
    load_trained_state,
    target_modules,
    trainable_parameters,
    trained_state,
)

DEPTH = 10
FAMILY = tiny_family()


def load(wan: Path, dtype: torch.dtype = torch.float32) -> Any:
    return FAMILY.load_transformer(str(wan), dtype)


def adapted(
    wan: Path,
    dtype: torch.dtype = torch.float32,
    *,
    rank: int = 4,
    alpha: float = 4.0,
    dropout: float = 0.0,
    rslora: bool = False,
) -> Any:
    transformer = load(wan, dtype)
    torch.manual_seed(3)
    modules = target_modules(transformer, WAN.lora_targets, WAN)
    add_lora(transformer, modules, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora)
    return transformer


def shake(transformer: nn.Module) -> None:
    """As after training: lora_B is not zero any more."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in trainable_parameters(transformer):
            parameter.copy_(torch.randn_like(parameter) * 0.3)


@torch.no_grad()
def predict(transformer: nn.Module) -> torch.Tensor:
    torch.manual_seed(5)
    dtype = torch.float32
    return transformer(
        hidden_states=torch.randn(1, 16, 2, 4, 4, dtype=dtype),
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 6, 32, dtype=dtype),
        return_dict=False,
    )[0]


def test_the_default_targets_are_the_attention_of_every_block(wan: Path):
    names = target_modules(load(wan), WAN.lora_targets, WAN)
    layers = [f"attn{which}.{layer}" for which in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    assert sorted(names) == sorted(f"blocks.{block}.{layer}" for block in range(DEPTH) for layer in layers)


def test_all_linear_is_every_linear_of_the_blocks(wan: Path):
    transformer = load(wan)
    names = target_modules(transformer, "all-linear", WAN)
    linears = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    assert set(names) == {name for name in linears if name.startswith("blocks.")}
    assert set(names) < linears
    assert "blocks.0.ffn.net.2" in names


def test_a_target_may_be_a_longer_end_of_a_name(wan: Path):
    names = target_modules(load(wan), ["attn1.to_q", "ffn.net.0.proj"], WAN)
    assert len(names) == 2 * DEPTH
    assert all(name.endswith((".attn1.to_q", ".ffn.net.0.proj")) for name in names)
    assert target_modules(load(wan), ["blocks.3.attn1.to_q"], WAN) == ["blocks.3.attn1.to_q"]


def test_a_target_named_twice_is_taken_once(wan: Path):
    names = target_modules(load(wan), ["to_q", "attn1.to_q"], WAN)
    assert len(names) == len(set(names)) == 2 * DEPTH


def test_a_text_is_a_regex_of_whole_names(wan: Path):
    transformer = load(wan)
    assert target_modules(transformer, r"blocks\.3\.attn1\.to_q", WAN) == ["blocks.3.attn1.to_q"]
    assert len(target_modules(transformer, r"blocks\..*to_[qk]", WAN)) == 4 * DEPTH
    assert target_modules(transformer, r".*\.ffn\..*", WAN) == [
        f"blocks.{block}.ffn.net.{layer}" for block in range(DEPTH) for layer in ("0.proj", "2")
    ]
    assert target_modules(transformer, ".*", WAN) == target_modules(transformer, "all-linear", WAN), "never outside of the blocks"
    for regex in ("to_q", r"blocks\.3\.attn1", "proj_out", r"blocks\.3\.norm2"):
        with pytest.raises(UserError, match="lora_targets"):
            target_modules(transformer, regex, WAN)


def test_a_target_is_a_whole_part_of_a_name(wan: Path):
    with pytest.raises(UserError):
        target_modules(load(wan), ["o_q"], WAN)


@pytest.mark.parametrize("target", ["to_qq", "proj_out", "norm2", ""])
def test_an_unknown_target_names_the_legal_ends(wan: Path, target: str):
    with pytest.raises(UserError) as error:
        target_modules(load(wan), ["to_q", target], WAN)
    text = str(error.value)
    assert f"lora_targets: {target!r}" in text
    for end in ("attn1.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2", "all-linear"):
        assert end in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_fp32_whatever_the_base_is(wan: Path, dtype: torch.dtype):
    transformer = adapted(wan, dtype)
    trainable = trainable_parameters(transformer)
    assert len(trainable) == 2 * 8 * DEPTH
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    base = [p for name, p in transformer.named_parameters() if "lora_" not in name]
    assert not any(parameter.requires_grad for parameter in base)
    assert dtype in {parameter.dtype for parameter in base}


def test_a_fresh_adapter_changes_nothing(wan: Path):
    assert torch.equal(predict(load(wan)), predict(adapted(wan)))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 10.0), (8, 1.0), (3, 0.5)])
def test_the_scale_is_alpha_over_rank_or_over_its_root(wan: Path, rank: int, alpha: float, rslora: bool):
    transformer = adapted(wan, rank=rank, alpha=alpha, rslora=rslora)
    shake(transformer)
    state = trained_state(transformer)
    scale = alpha / rank**0.5 if rslora else alpha / rank
    for name, (down, up) in baked_adapter(transformer).items():
        assert torch.equal(down, state[f"{name}.lora_A.weight"])
        torch.testing.assert_close(up, state[f"{name}.lora_B.weight"] * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 10.0), (8, 1.0), (3, 0.5)])
def test_a_baked_adapter_holds_its_scale(wan: Path, rank: int, alpha: float, rslora: bool):
    """Base + B A of the baked tensors, at strength 1, is the model that was trained."""
    transformer = adapted(wan, rank=rank, alpha=alpha, rslora=rslora)
    shake(transformer)
    trained = predict(transformer)
    baked = baked_adapter(transformer)
    assert len(baked) == 8 * DEPTH
    merged = load(wan)
    assert (trained - predict(merged)).abs().max() > 1e-2
    with torch.no_grad():
        for name, (down, up) in baked.items():
            assert down.shape[0] == up.shape[1] == rank
            assert down.dtype == up.dtype == torch.float32
            merged.get_submodule(name).weight += up @ down
    torch.testing.assert_close(predict(merged), trained, rtol=1e-4, atol=1e-4)


def test_baking_leaves_the_adapter_as_it_is(wan: Path):
    transformer = adapted(wan, alpha=9.0)
    shake(transformer)
    before = {name: tensor.clone() for name, tensor in trained_state(transformer).items()}
    first, second = baked_adapter(transformer), baked_adapter(transformer)
    assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained_state(transformer).items())


def test_an_adapter_comes_back_to_the_bit(wan: Path):
    transformer, other = adapted(wan, torch.bfloat16), adapted(wan, torch.bfloat16)
    shake(transformer)
    state = {name: tensor.clone() for name, tensor in trained_state(transformer).items()}
    assert len(state) == 2 * 8 * DEPTH
    load_trained_state(other, state)
    back = trained_state(other)
    assert all(torch.equal(back[name], tensor) and back[name].dtype == torch.float32 for name, tensor in state.items())
    assert all(parameter.requires_grad for parameter in trainable_parameters(other))


def test_without_an_adapter_the_state_is_every_weight(wan: Path):
    transformer, other = load(wan).requires_grad_(True), load(wan).requires_grad_(True)
    assert not is_adapted(transformer)
    assert is_adapted(adapted(wan))
    shake(transformer)
    state = {name: tensor.clone() for name, tensor in trained_state(transformer).items()}
    assert state.keys() == dict(transformer.named_parameters()).keys()
    assert not torch.equal(trained_state(other)["proj_out.weight"], state["proj_out.weight"])
    load_trained_state(other, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained_state(other).items())
    assert len(trainable_parameters(other)) == len(state)
    state.pop("proj_out.weight")
    with pytest.raises(RuntimeError):
        load_trained_state(other, state)


def test_a_state_with_a_tensor_missing_is_not_taken(wan: Path):
    transformer = adapted(wan)
    state = dict(trained_state(transformer))
    state.popitem()
    with pytest.raises(AssertionError):
        load_trained_state(transformer, state)


def test_dropout_is_of_the_adapter_alone(wan: Path):
    transformer = adapted(wan, dropout=0.5)
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]
    assert {layer.lora_dropout["default"].p for layer in layers} == {0.5}
