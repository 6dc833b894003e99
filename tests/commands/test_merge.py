"""Adapters added into a base: the same output as beside it, and what a cast loses."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from crepatrain.adapters.writing import write_adapter
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
    (merged,) = json.loads((tmp_path / "out" / "merged_from.json").read_text())
    assert merged["file"] == "a.safetensors"
    assert merged["strength"] == 1.0


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


def test_what_cant_be_merged_is_reported(wan, tmp_path):
    file = tmp_path / "a.safetensors"
    adapter(wan, file, seed=0)
    with pytest.raises(UserError, match="--strength: 2 for 1 adapters"):
        merge(str(wan), [file], [1.0, 2.0], tmp_path / "out", "float32", QUIET)
    with pytest.raises(UserError, match="it already exists"):
        merge(str(wan), [file], [1.0], wan, "float32", QUIET)
    for strength in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"--strength: {strength} is not a finite number"):
            merge(str(wan), [file], [strength], tmp_path / "out", "float32", QUIET)
    with pytest.raises(UserError, match=r"--output .*a\.safetensors/out: it can't be written"):
        merge(str(tmp_path / "no base"), [file], [1.0], file / "out", "float32", QUIET)
    assert not (tmp_path / "out").exists()


STEM = "diffusion_model.blocks.0.self_attn.q"


def every(tensors, end, more):
    """The tensors, and one more for each layer."""
    return tensors | {key.replace("lora_A.weight", end): more(tensor) for key, tensor in tensors.items() if "lora_A" in key}


def double(tensor):
    return torch.cat([tensor, tensor], dim=1)


# What is done to an adapter, and what merge says of it.
UNFIT = {
    "not finite": (lambda t: t | {f"{STEM}.lora_A.weight": t[f"{STEM}.lora_A.weight"] / 0}, "1 tensors such as .* not finite"),
    "DoRA of ComfyUI": (lambda t: every(t, "dora_scale", lambda a: torch.ones(48, 1)), "dora_scale are DoRA's magnitudes"),
    "DoRA of peft": (lambda t: every(t, "lora_magnitude_vector", lambda a: torch.ones(48)), "are DoRA's magnitudes"),
    "biases": (lambda t: every(t, "diff_b", lambda a: torch.ones(48)), "diff_b are a bias"),
    "two prefixes": (
        lambda t: t | {key.replace("diffusion_model.", ""): tensor.clone() for key, tensor in t.items()},
        r"100 layers such as blocks\.0\.\S+ appear twice",
    ),
    "two ranks": (lambda t: t | {f"{STEM}.lora_B.weight": torch.ones(48, 5)}, "lora_A has rank 3 and lora_B rank 5"),
    "one half": (lambda t: {k: v for k, v in t.items() if k != f"{STEM}.lora_B.weight"}, f"1 layers such as {STEM} lack lora_B"),
    "another width": (
        lambda t: {key: double(tensor) if "lora_A" in key else tensor for key, tensor in t.items()},
        r"100 layers don't fit .*\n  -> give the base that it was trained on",
    ),
    "a block too many": (
        lambda t: t | {k.replace(".0.", ".77."): v.clone() for k, v in t.items() if k.startswith(STEM)},
        r"1 of 101 layers, such as \S+\.77\.self_attn\.q, are not in ",
    ),
}


@pytest.fixture(scope="module")
def whole(wan, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    adapter(wan, path, seed=0)
    return load_file(path)


@pytest.mark.parametrize("case", UNFIT)
def test_an_adapter_that_is_not_whole_or_not_of_the_base_is_not_merged(case, wan, whole, tmp_path, capsys):
    make, reason = UNFIT[case]
    save_file(make(whole), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"a\.safetensors: .*{reason}"):
        merge(str(wan), [tmp_path / "a.safetensors"], [1.0], tmp_path / "out", "float32", Screen())
    assert "loading" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def settings_of(alpha, rank=3, **more):
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": ["to_q"], **more}
    return {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}


def renamed(tensors, prefix):
    """The one layer's tensors as diffusers names them, behind another prefix."""
    return {f"{prefix}blocks.0.attn1.to_q.{end}": tensors[f"{STEM}.{end}"] for end in ("lora_A.weight", "lora_B.weight")}


# How a file says its scale, and the factor that diffusers applies.
SCALES = {
    "nothing": (lambda t: t, {}, 1.0),
    "alpha and r": (lambda t: t, settings_of(6), 2.0),
    "rsLoRA": (lambda t: t, settings_of(3, use_rslora=True), 3**0.5),
    "patterns": (lambda t: t, settings_of(12, rank=4, rank_pattern={".*": 3}, alpha_pattern={"blocks.0.attn1.to_q": 9}), 3.0),
    ".alpha": (lambda t: every(t, "alpha", lambda a: torch.tensor(6.0)), {}, 2.0),
    "of no program": (lambda t: renamed(t, "base_model.model."), {}, 1.0),
    "of ComfyUI alone": (
        lambda t: every({k: v for k, v in t.items() if "head" in k}, "alpha", lambda a: torch.tensor(6.0)),
        {},
        2.0,
    ),
}


@pytest.mark.parametrize("case", SCALES)
def test_an_adapter_is_merged_at_the_strength_that_diffusers_applies(case, wan, whole, tmp_path):
    make, metadata, factor = SCALES[case]
    down, up = torch.randn(3, 48), torch.randn(64, 3)
    head = {"diffusion_model.head.head.lora_A.weight": down, "diffusion_model.head.head.lora_B.weight": up}
    tensors = make(whole | head if case == "of ComfyUI alone" else whole)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", **metadata})
    merge(str(wan), [tmp_path / "a.safetensors"], [1.0], tmp_path / "out", "float32", QUIET)
    base, merged = (load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (wan, tmp_path / "out"))
    if case == "of ComfyUI alone":
        weight, expected = "proj_out.weight", up @ down
    else:
        weight, expected = "blocks.0.attn1.to_q.weight", whole[f"{STEM}.lora_B.weight"] @ whole[f"{STEM}.lora_A.weight"]
    torch.testing.assert_close(merged[weight] - base[weight], factor * expected, rtol=1e-4, atol=1e-5)


def test_a_scale_that_diffusers_does_not_apply_is_not_guessed(wan, whole, tmp_path):
    save_file(renamed(whole, "base_model.model."), tmp_path / "a.safetensors", metadata=settings_of(6))
    with pytest.raises(UserError, match="its strength is unknown, as it has lora_adapter_metadata and diffusers 0 layers"):
        merge(str(wan), [tmp_path / "a.safetensors"], [1.0], tmp_path / "out", "float32", QUIET)


def test_adapters_of_other_models_and_experts_are_not_merged(wan, whole, tiny_checkpoint, tmp_path):
    two, sana = str(tiny_checkpoint("wan", "tiny-a14b")), str(tiny_checkpoint("sanavideo", "tiny"))
    low, high, plain = (tmp_path / f"style{expert}.safetensors" for expert in ("_low_noise", "_high_noise", ""))
    other = tmp_path / "ltx.safetensors"
    for path in (low, high, plain):
        save_file(whole, path)
    save_file(whole, other, metadata={"crepatrain.recipe": '{"family": "ltxvideo"}'})
    named = tmp_path / "named.safetensors"
    save_file(whole, named, metadata={"crepatrain.expert": "low"})
    for base, files, reason in (
        (str(wan), [low], "it is for the low-noise expert of two, and .* has one transformer"),
        (str(wan), [named], "it is for the low-noise expert of two, and .* has one transformer"),
        (
            two,
            [plain],
            "neither its name nor its header says for which of the two experts .*\n  -> end its name in high_noise or low_noise",
        ),
        (two, [low, plain], r"style\.safetensors: neither its name nor its header says for which of the two experts"),
        (two, [low, high], "the adapters are for both experts: .*low-noise expert and .*high-noise expert"),
        (two, [named, high], "the adapters are for both experts"),
        (str(wan), [plain, other], "the adapters are of several models: .*style.* of Wan 2.1 and 2.2 and .*ltx.* of LTX-Video"),
        (sana, [plain], "its transformer is a SanaVideoTransformer3DModel"),
    ):
        with pytest.raises(UserError, match=reason):
            merge(base, files, [1.0] * len(files), tmp_path / "out", "float32", QUIET)
    assert not (tmp_path / "out").exists()
    merge(two, [low, named], [1.0, 1.0], tmp_path / "out", "float32", QUIET)
    assert (tmp_path / "out" / "transformer_2").is_dir()
