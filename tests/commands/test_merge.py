"""Adapters added into a base: the same output as beside it, and what a cast loses."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from crepatrain.commands.export import write_adapter
from crepatrain.commands.merge import merge
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.families import family_class, get_family
from crepatrain.training.lora import add_lora, target_modules, trainable_parameters

FAMILY = get_family("wan", family_class("wan").tiny["tiny"].checkpoint)
QUIET = Screen(quiet=True)


def adapter(wan, path, seed, std=0.2):
    """A live adapter, and its file."""
    live = FAMILY.load_transformer(str(wan), torch.float32)
    torch.manual_seed(seed)
    add_lora(live, target_modules(live, "all-linear", FAMILY.spec), rank=3, alpha=5.0, dropout=0.0)
    for parameter in trainable_parameters(live):
        parameter.data.normal_(std=std)
    write_adapter([path], FAMILY, live, {"format": "pt"})
    return live


@torch.no_grad()
def output_of(transformer):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 3, 8, 12, generator=generator)
    text = torch.randn(1, 512, 32, generator=generator)
    return transformer(latents, torch.tensor([500.0]), text, return_dict=False)[0]


def test_one_adapter_merged_does_what_it_does_beside_the_base(wan, tmp_path):
    live = adapter(wan, tmp_path / "a.safetensors", seed=0)
    merge(str(wan), [tmp_path / "a.safetensors"], [1.0], tmp_path / "out", "float32", QUIET)
    merged = WanTransformer3DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    expected = output_of(live)
    assert (output_of(merged) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - output_of(FAMILY.load_transformer(str(wan), torch.float32))).abs().max() > 0.05
    (told,) = json.loads((tmp_path / "out" / "merged_from.json").read_text())
    assert told["file"] == "a.safetensors"
    assert told["strength"] == 1.0


def test_several_adapters_add_up_at_their_strengths(wan, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, file in enumerate(files):
        adapter(wan, file, seed)
    merge(str(wan), files, [0.5, -2.0], tmp_path / "out", "float32", QUIET)
    weight = "blocks.3.attn1.to_q.weight"
    base, merged = (load_file(f / "transformer" / "diffusion_pytorch_model.safetensors")[weight] for f in (wan, tmp_path / "out"))
    stem = "diffusion_model.blocks.3.self_attn.q"
    literal = base.clone()
    for file, strength in zip(files, (0.5, -2.0), strict=True):
        tensors = load_file(file)
        literal += strength * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    torch.testing.assert_close(merged, literal, rtol=1e-5, atol=1e-6)


def test_what_a_cast_loses_is_counted(wan, tmp_path):
    adapter(wan, tmp_path / "faint.safetensors", seed=0, std=0.003)
    shares = {
        dtype: merge(str(wan), [tmp_path / "faint.safetensors"], [1.0], tmp_path / dtype, dtype, QUIET)
        for dtype in ("float32", "bfloat16")
    }
    means = {dtype: sum(share.values()) / len(share) for dtype, share in shares.items()}
    assert means["bfloat16"] > 0.5
    assert means["float32"] < 0.1


def test_what_cant_be_merged_is_told(wan, tmp_path):
    file = tmp_path / "a.safetensors"
    adapter(wan, file, seed=0)
    with pytest.raises(UserError, match="--strength: 2 for 1 adapters"):
        merge(str(wan), [file], [1.0, 2.0], tmp_path / "out", "float32", QUIET)
    with pytest.raises(UserError, match="there is something already"):
        merge(str(wan), [file], [1.0], wan, "float32", QUIET)
    tensors = load_file(file)
    half = {name: tensor for name, tensor in tensors.items() if "blocks.0.self_attn.q.lora_B" not in name}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=r"blocks.0.attn1.to_q: one half of it is missing"):
        merge(str(wan), [tmp_path / "half.safetensors"], [1.0], tmp_path / "out", "float32", QUIET)
    wide = {name: torch.cat([tensor, tensor], dim=1) if "lora_A" in name else tensor for name, tensor in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="give the base that it was trained on"):
        merge(str(wan), [tmp_path / "wide.safetensors"], [1.0], tmp_path / "out", "float32", QUIET)
    assert not (tmp_path / "out").exists()
