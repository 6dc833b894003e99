"""Adapter files in the ways that programs have: right ones and wrong ones."""

import json

import torch
from common import tiny_family

RANK = 4


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "ffn.net.0.proj", "ffn.net.2", "to_query", "to_key"]
TARGETS += ["add_k_proj", "add_v_proj", "to_value", "out_layer", "in_layer"]


def size_of(family):
    """The tiny model of a family with the most kinds of layers."""
    return {"wan": "tiny-i2v"}.get(family, "tiny")


class Foreign:
    """An adapter of every Linear of a tiny model's blocks, to be written in the ways that programs have.

    Attributes:
        pairs: diffusers' name -> lora_A, lora_B.
    """

    def __init__(self, family, size=None):
        self.family = tiny_family(family, size or size_of(family))
        self.layers = {
            name: module.weight.shape
            for name, module in self.family.empty_transformer().named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        inside = [name for name in self.layers if name.startswith(f"{self.family.spec.blocks}.")]
        self.pairs = {name: self.pair(name) for name in inside}

    def pair(self, name):
        out, inside = self.layers[name]
        generator = torch.Generator().manual_seed(len(name) + out)
        return torch.randn(RANK, inside, generator=generator), torch.randn(out, RANK, generator=generator)

    def named(self, how, ends=("lora_A.weight", "lora_B.weight"), alpha=None, scale=1.0):
        """The tensors, `how` naming a layer; the scale baked in, or an alpha beside them."""
        tensors = {}
        for name, (down, up) in self.pairs.items():
            tensors[f"{how(name)}.{ends[0]}"], tensors[f"{how(name)}.{ends[1]}"] = down, up * scale
            if alpha:
                tensors[f"{how(name)}.alpha"] = torch.tensor(float(alpha))
        return tensors

    def original(self, name):
        return f"diffusion_model.{self.family.original_name(name)}"

    def kohya(self, name):
        return f"lora_unet_{self.family.original_name(name).replace('.', '_')}"

    def exported(self, **more):
        return self.named(self.family.export_name, **more)


def diffusers_name(name):
    return f"transformer.{name}"


def settings(alpha, rank=RANK, prefix="transformer.", **more):
    values = {"r": rank, "lora_alpha": alpha, "target_modules": TARGETS, **more}
    return {"lora_adapter_metadata": json.dumps({f"{prefix}{key}": value for key, value in values.items()})}


def changed(tensors, end, change):
    """The first tensor that ends so, changed."""
    key = next(key for key in tensors if key.endswith(end))
    return tensors | {key: change(tensors[key])}


def without(tensors, end):
    key = next(key for key in tensors if key.endswith(end))
    return {name: tensor for name, tensor in tensors.items() if name != key}


def poisoned(tensor):
    tensor = tensor.clone()
    tensor[0, 0] = float("nan")
    return tensor


def first(tensors, end):
    return next(key for key in tensors if key.endswith(end)).removesuffix(end)


def outside(adapter, layer, name, alpha=None):
    """The tensors of one layer that no block holds."""
    down, up = adapter.pair(layer)
    scale = {f"{name}.alpha": torch.tensor(float(alpha))} if alpha else {}
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up} | scale


# What is done to an adapter of a family, its header, and what verify says of it.
WRONG = {
    # prefixes and names
    "wan with diffusers' names": (
        "wan",
        lambda f: (f.named(diffusers_name), {}),
        r"ComfyUI ignores 120 of 120 layers.*begin with transformer\.",
    ),
    "ltx with diffusers' prefix": (
        "ltxvideo",
        lambda f: (f.named(diffusers_name), {}),
        r"ComfyUI ignores 100 of 100 layers.*begin with transformer\.",
    ),
    "wan with diffusers' names behind diffusion_model.": (
        "wan",
        lambda f: (f.named(lambda n: f"diffusion_model.{n}"), {}),
        r"diffusers refuses the file: ValueError, as diffusers' own names follow diffusion_model\.",
    ),
    "wan with diffusers' names behind diffusion_model., ComfyUI": (
        "wan",
        lambda f: (f.named(lambda n: f"diffusion_model.{n}"), {}),
        r"ComfyUI ignores 120 .*after diffusion_model\. it reads the original's names, and these are diffusers'",
    ),
    "wan with the original's names behind transformer.": (
        "wan",
        lambda f: (f.named(lambda n: f"transformer.{f.family.original_name(n)}"), {}),
        r"diffusers refuses .*, as after transformer\. it reads diffusers' names, and these are the original's",
    ),
    "kandinsky behind diffusion_model.": (
        "kandinsky5_video",
        lambda f: (f.named(f.original), {}),
        r"diffusers ignores 110 .*begin with diffusion_model\.",
    ),
    "sana behind diffusion_model.": (
        "sanavideo",
        lambda f: (f.named(lambda n: f"diffusion_model.{n}"), {}),
        r"diffusers ignores 96 .*begin with diffusion_model\.",
    ),
    "wan without a prefix": ("wan", lambda f: (f.named(f.family.original_name), {}), r"ComfyUI ignores 120 .*have no prefix"),
    "wan without a prefix, diffusers": ("wan", lambda f: (f.named(lambda n: n), {}), r"diffusers ignores 120 .*have no prefix"),
    "peft's own file": (
        "wan",
        lambda f: (f.named(lambda n: f"base_model.model.{n}"), {}),
        r"diffusers ignores 120 .*begin with base_model\.model\.",
    ),
    "lycoris": (
        "wan",
        lambda f: (f.named(lambda n: f.kohya(n).replace("lora_unet_", "lycoris_")), {}),
        r"ComfyUI ignores 120 .*begin with lycoris_",
    ),
    "the second expert's prefix": (
        "wan",
        lambda f: (f.named(lambda n: f"transformer_2.{n}"), {}),
        r"diffusers ignores 120 .*begin with transformer_2\.",
    ),
    "a block that is not there": (
        "ltxvideo",
        lambda f: ({key.replace(".9.", ".99."): tensor for key, tensor in f.exported().items()}, {}),
        r"diffusers ignores 10 of 100 layers, such as diffusion_model\.transformer_blocks\.99\.\S+: \S+ has no such layer",
    ),
    # .alpha, lora_down and kohya's names
    "ltx with alpha": (
        "ltxvideo",
        lambda f: (f.exported(alpha=8), {}),
        r"refuses.*ValueError.*as it accepts no \.alpha for LTX-Video",
    ),
    "kandinsky with alpha": (
        "kandinsky5_video",
        lambda f: (f.exported(alpha=8), {}),
        r"refuses.*Invalid LoRA checkpoint.*\.alpha for Kandinsky",
    ),
    "sana with alpha": (
        "sanavideo",
        lambda f: (f.exported(alpha=8), {}),
        r"refuses.*Invalid LoRA checkpoint.*\.alpha for SANA",
    ),
    "ltx with lora_down": (
        "ltxvideo",
        lambda f: (f.exported(ends=("lora_down.weight", "lora_up.weight")), {}),
        r"refuses the file: IndexError, as it finds no lora_B\.weight to read a rank from",
    ),
    "kandinsky with lora_down": (
        "kandinsky5_video",
        lambda f: (f.exported(ends=("lora_down.weight", "lora_up.weight")), {}),
        r"refuses the file: IndexError",
    ),
    "kohya without alpha": (
        "wan",
        lambda f: (f.named(f.kohya, ends=("lora_down.weight", "lora_up.weight")), {}),
        r"diffusers refuses the file: KeyError, as it accepts lora_unet_ keys only with \.alpha",
    ),
    "kohya of a part of the layers": (
        "wan",
        lambda f: (
            {k: t for k, t in f.named(f.kohya, ends=("lora_down.weight", "lora_up.weight"), alpha=8).items() if "self" in k},
            {},
        ),
        r"diffusers refuses the file: .*for every layer of every block",
    ),
    "ltx kohya": (
        "ltxvideo",
        lambda f: (f.named(f.kohya, ends=("lora_down.weight", "lora_up.weight")), {}),
        r"diffusers ignores 100 .*begin with lora_unet_",
    ),
    "wan with alpha behind transformer.": (
        "wan",
        lambda f: (f.named(diffusers_name, alpha=8), {}),
        r"Invalid LoRA checkpoint\), as it accepts no \.alpha after transformer\.",
    ),
    "wan with alpha outside the blocks": (
        "wan",
        lambda f: (f.exported(alpha=8) | outside(f, "proj_out", "diffusion_model.head.head", alpha=8), {}),
        r"as it accepts \.alpha only inside the blocks",
    ),
    "wan without .weight": (
        "wan",
        lambda f: (f.exported(ends=("lora_A", "lora_B")), {}),
        r"^diffusers refuses the file: ValueError, as it accepts no keys that end without \.weight\n[^\n]*$",
    ),
    "wan with lora.down and lora.up": (
        "wan",
        lambda f: (f.exported(ends=("lora.down.weight", "lora.up.weight")), {}),
        r"refuses the file: ValueError, as it accepts \.lora\.down and \.lora\.up only after transformer\.",
    ),
    "wan with a layer that is not there": (
        "wan",
        lambda f: ({key.replace("blocks.0.self_attn.q.", "blocks.0.self_attn.qq."): t for key, t in f.exported().items()}, {}),
        r"refuses the file: ValueError, as diffusion_model\.blocks\.0\.self_attn\.qq is no layer of wan-tiny-i2v",
    ),
    "sana without .weight": (
        "sanavideo",
        lambda f: (f.exported(ends=("lora_A", "lora_B")), {}),
        r"diffusers ignores 96 .*the keys end without \.weight",
    ),
    # strength
    "an alpha that no reader sees": (
        "wan",
        lambda f: (f.exported(), {"ss_network_alpha": "8", "ss_network_dim": "4"}),
        r"wrong strength: ss_network_alpha=8 of ss_network_dim=4.*applied at 1 instead of 2",
    ),
    "baked and scaled again": (
        "wan",
        lambda f: (f.exported(), settings(8) | {"crepatrain.scale": "baked"}),
        r"the scale is inside lora_B already, and would be applied again: diffusers at 2, ComfyUI at 1",
    ),
    "an alpha that diffusers alone sees": (
        "kandinsky5_video",
        lambda f: (f.exported(), settings(8)),
        r"at different strengths: diffusers at 2, ComfyUI at 1",
    ),
    "a rank that the header does not give": (
        "wan",
        lambda f: (f.exported(), settings(8, rank=8)),
        r"diffusers refuses .*blocks\.0\.attn1\.to_q\.lora_A\.weight is \[4, 48\], and lora_adapter_metadata makes it \[8, 48\]",
    ),
    "metadata without a prefix": (
        "wan",
        lambda f: (f.exported(), settings(4, prefix="")),
        r"no key of lora_adapter_metadata begins",
    ),
    "no target_modules": (
        "wan",
        lambda f: (f.exported(), {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 4}'}),
        "diffusers refuses the file: KeyError, as lora_adapter_metadata names no target_modules",
    ),
    "wan with peft's adapter name": (
        "wan",
        lambda f: (f.exported(ends=("lora_A.default.weight", "lora_B.default.weight")), {}),
        r"diffusers refuses the file: ValueError, as it accepts no adapter's name \(default\)",
    ),
    "sana with peft's adapter name": (
        "sanavideo",
        lambda f: (f.exported(ends=("lora_A.default.weight", "lora_B.default.weight")), {}),
        r"diffusers ignores 96 .*the keys hold an adapter's name \(default\)",
    ),
    "a setting of a newer peft": (
        "wan",
        lambda f: (f.exported(), settings(4, of_tomorrow=1)),
        r"peft does not know: of_tomorrow",
    ),
    "a target that is a number": (
        "wan",
        lambda f: (f.exported(), settings(4, target_modules=5)),
        r"diffusers refuses the file: TypeError, because of lora_adapter_metadata: 'int' object is not iterable\n.*leave it out",
    ),
    "a target that is no regex": (
        "wan",
        lambda f: (f.exported(), settings(4, target_modules="((")),
        r"diffusers refuses the file: error, because of lora_adapter_metadata: missing \), unterminated",
    ),
    "a pattern that is no regex": (
        "sanavideo",
        lambda f: (f.exported(), settings(4, rank_pattern={"((": 4})),
        r"diffusers refuses the file: error, because of lora_adapter_metadata: missing \), unterminated",
    ),
    "a pattern that is a list": (
        "sanavideo",
        lambda f: (f.exported(), settings(4, alpha_pattern=[1])),
        r"diffusers refuses the file: AttributeError, because of lora_adapter_metadata: ",
    ),
    "a rank in words": (
        "sanavideo",
        lambda f: (f.exported(), settings(4, rank="four")),
        r"diffusers refuses the file: TypeError, because of lora_adapter_metadata: ",
    ),
    "settings that are a list": (
        "sanavideo",
        lambda f: (f.exported(), {"lora_adapter_metadata": "[4]"}),
        r"is no JSON object",
    ),
    "DoRA by the settings alone": (
        "sanavideo",
        lambda f: (f.exported(), settings(4, use_dora=True)),
        r"diffusers ignores 96 .*it asks for lora_magnitude_vector\.weight in each, and the file has none",
    ),
    "metadata that is no JSON": ("wan", lambda f: (f.exported(), {"lora_adapter_metadata": "{"}), r"is no JSON object"),
    # what is no plain LoRA, and damaged ones
    "DoRA of ComfyUI": (
        "wan",
        lambda f: (f.exported() | {f"{first(f.exported(), '.lora_A.weight')}.dora_scale": torch.ones(48, 1)}, {}),
        r"dora_scale are DoRA's magnitudes, which diffusers drops",
    ),
    "DoRA of peft": (
        "sanavideo",
        lambda f: (f.exported() | {f"{first(f.exported(), '.lora_A.weight')}.lora_magnitude_vector": torch.ones(48)}, {}),
        r"lora_magnitude_vector are DoRA's magnitudes",
    ),
    "biases": (
        "wan",
        lambda f: (
            f.exported()
            | {key.replace("lora_B.weight", "diff_b"): t[:, 0].clone() for key, t in f.exported().items() if "_B" in key},
            {},
        ),
        r"^120 keys such as \S+\.diff_b are a bias[^\n]*\n[^\n]*$",
    ),
    "a bias of one layer": (
        "wan",
        lambda f: (f.exported() | {f"{first(f.exported(), '.lora_A.weight')}.diff_b": torch.ones(48)}, {}),
        r"diffusers ignores 119 of 120 layers.*it asks for lora_B\.bias in each, and the file has none",
    ),
    "a whole difference": (
        "wan",
        lambda f: (f.exported() | {f"{first(f.exported(), '.lora_A.weight')}.diff": torch.ones(48, 48)}, {}),
        r"\.diff are a full difference of weights",
    ),
    "CREPA's projector": (
        "ltxvideo",
        lambda f: (f.exported() | {"crepa.projector.weight": torch.ones(4, 4)}, {}),
        r"CREPA's projector",
    ),
    "LoKr": ("wan", lambda f: (f.exported() | {"diffusion_model.blocks.0.self_attn.q.lokr_w1": torch.ones(4, 4)}, {}), r"LoKr's"),
    "nothing learned": ("wan", lambda f: (f.exported(scale=0.0), {}), r"every lora_B is zero: the adapter does nothing"),
    "not finite": ("wan", lambda f: (changed(f.exported(), "lora_B.weight", poisoned), {}), r"1 tensors such as .* not finite"),
    "half of a pair": ("wan", lambda f: (without(f.exported(), "lora_B.weight"), {}), r"1 layers such as .* lack lora_B"),
    "two ranks in a pair": (
        "wan",
        lambda f: (changed(f.exported(), "lora_B.weight", lambda t: t[:, :3].contiguous()), {}),
        r"lora_A has rank 4 and lora_B rank 3",
    ),
    "two ranks in a pair, diffusers": (
        "wan",
        lambda f: (changed(f.exported(), "lora_B.weight", lambda t: t[:, :3].contiguous()), {}),
        r"diffusers refuses the file: RuntimeError, as \S+ is \[4, 48\], where it expects \[3, 48\]",
    ),
    "lora_B of one dimension": (
        "wan",
        lambda f: (changed(f.exported(), "lora_B.weight", lambda t: t[:, 0].contiguous()), {}),
        r"lora_A has rank 4 and lora_B no rank",
    ),
    "a number for lora_A": (
        "ltxvideo",
        lambda f: (changed(f.exported(), "lora_A.weight", lambda t: t[0, 0]), {}),
        r"1 layers don't fit.*lora_A \[\]",
    ),
    "rank 0": (
        "wan",
        lambda f: (changed(changed(f.exported(), "lora_A.weight", lambda t: t[:0]), "lora_B.weight", lambda t: t[:, :0]), {}),
        r"self_attn\.q has rank 0",
    ),
    "whole numbers": (
        "ltxvideo",
        lambda f: ({key: tensor.to(torch.int8) for key, tensor in f.exported().items()}, {}),
        r"200 tensors such as \S+ are int8, and a LoRA holds floating-point numbers",
    ),
    "whole numbers, diffusers": (
        "wan",
        lambda f: ({key: tensor.to(torch.int8) for key, tensor in f.exported().items()}, {}),
        r"diffusers refuses the file: RuntimeError, with the message: Only Tensors of floating point",
    ),
    "no LoRA": ("wan", lambda f: ({"blocks.0.attn1.to_q.weight": torch.ones(48, 48)}, {}), r"^it holds no layer of a LoRA"),
    "nothing": ("wan", lambda f: ({}, {}), r"^it holds no layer of a LoRA"),
    "an alpha of several numbers, diffusers": (
        "wan",
        lambda f: (changed(f.exported(alpha=8), ".alpha", lambda t: torch.tensor([8.0, 8.0])), {}),
        r"diffusers refuses the file: RuntimeError, as an alpha is not one number",
    ),
    "an alpha of several numbers": (
        "wan",
        lambda f: (changed(f.exported(alpha=8), ".alpha", lambda t: torch.tensor([8.0, 8.0])), {}),
        r"the alpha of \S+ is not one finite number",
    ),
    "a wrong shape": (
        "wan",
        lambda f: (changed(f.exported(), "lora_A.weight", lambda t: t[:, :40].contiguous()), {}),
        r"1 layers don't fit.*lora_A \[4, 40\], lora_B \[48, 4\] on a weight \[48, 48\]",
    ),
    "a layer twice": (
        "kandinsky5_video",
        lambda f: (f.exported() | {k: t.clone() for k, t in list(f.named(f.original).items())[:2]}, {}),
        r"1 layers .* appear twice",
    ),
    "outside the blocks, for LTX": (
        "ltxvideo",
        lambda f: (f.exported() | outside(f, "proj_in", "diffusion_model.patchify_proj"), {}),
        r"diffusers ignores 1 of 101 layers, such as diffusion_model\.patchify_proj: .*these are the original's",
    ),
    "outside the blocks alone, for Wan": (
        "wan",
        lambda f: (outside(f, "proj_out", "diffusion_model.head.head"), {}),
        r"diffusers refuses the file: ValueError, as it looks for blocks, and the file has none",
    ),
}


# Files of other programs that both programs load completely, or the one that knows the family.
GOOD = {
    "wan, baked": ("wan", lambda f: (f.exported(), {}), "at 1 x"),
    "wan with alpha": ("wan", lambda f: (f.exported(alpha=8), {}), "at 2 x"),
    "wan of kohya": ("wan", lambda f: (f.named(f.kohya, ends=("lora_down.weight", "lora_up.weight"), alpha=2), {}), "at 0.5 x"),
    "ltx, baked": ("ltxvideo", lambda f: (f.exported(), {}), "at 1 x"),
    "ltx, rank and alpha given": ("ltxvideo", lambda f: (f.exported(), settings(4)), "at 1 x"),
    "kandinsky, baked": ("kandinsky5_video", lambda f: (f.exported(), {}), "at 1 x"),
    "sana, of save_lora_weights": ("sanavideo", lambda f: (f.exported(), settings(8)), "at 2 x"),
    "sana, rsLoRA": ("sanavideo", lambda f: (f.exported(), settings(8, use_rslora=True)), "at 4 x"),
    "sana, ranks by pattern": (
        "sanavideo",
        lambda f: (f.exported(), settings(8, rank=2, rank_pattern={"to_q": 4, "to_k": 4, "to_v": 4, "to_out.0": 4})),
        "at 2 x",
    ),
    "sana, fewer targets given than there are": (
        "sanavideo",
        lambda f: (f.exported(), settings(8, target_modules=["to_q", "to_k", "to_v"])),
        "at 2 x",
    ),
    "sana, every target given": ("sanavideo", lambda f: (f.exported(), settings(8, target_modules="all-linear")), "at 2 x"),
    "ltx, another target given": ("ltxvideo", lambda f: (f.exported(), settings(4, target_modules=["proj_in"])), "at 1 x"),
    "kandinsky, alphas by pattern": (
        "kandinsky5_video",
        lambda f: (f.exported(), settings(8, alpha_pattern={".*": 4, "to_query": 8})),
        "at 1 x",
    ),
    "ltx, lora.down and lora.up": (
        "ltxvideo",
        lambda f: (f.exported(ends=("lora.down.weight", "lora.up.weight")), {}),
        "at 1 x",
    ),
    "kandinsky, lora.down and lora.up": (
        "kandinsky5_video",
        lambda f: (f.exported(ends=("lora.down.weight", "lora.up.weight")), {}),
        "at 1 x",
    ),
    "sana, lora.down and lora.up": (
        "sanavideo",
        lambda f: (f.exported(ends=("lora.down.weight", "lora.up.weight")), {}),
        "at 1 x",
    ),
    "wan in 8 bits": (
        "wan",
        lambda f: ({key: tensor.to(torch.float8_e4m3fn) for key, tensor in f.exported().items()}, {}),
        "at 1 x",
    ),
    "a recipe of another trainer's family": (
        "wan",
        lambda f: (f.exported(), {"crepatrain.recipe": '{"family": "hunyuan"}'}),
        "at 1 x",
    ),
}
