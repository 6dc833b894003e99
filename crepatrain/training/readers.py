"""What diffusers and ComfyUI make of an adapter file: what they read, how strongly they apply it, what they ignore, and why."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from crepatrain.config.specs import FamilySpec
from crepatrain.training.adapter_file import ENDS, KOHYA, AdapterFile, Model, Pair

_REFUSALS = (ValueError, KeyError, IndexError, AttributeError, RuntimeError, TypeError, NameError)

_COMFYUI_HINTS = {"kandinsky5_video": " (ComfyUI of December 2025 or newer)"}


@dataclass(frozen=True)
class Reading:
    """What one program makes of a file.

    Attributes:
        strengths: by layer, the factor that it applies to lora_B @ lora_A.
        ignored: reason -> how the keys of what it ignores begin.
        refusal: why it does not load the file at all; None where it does.
    """

    program: str
    strengths: Mapping[str, float]
    ignored: Mapping[str, tuple[str, ...]]
    refusal: str | None = None

    @property
    def in_words(self) -> str:
        if self.refusal:
            return f"refuses it: {self.refusal}"
        lost = sum(map(len, self.ignored.values()))
        factors = sorted(set(self.strengths.values()))
        strength = f", at {' and '.join(f'{factor:g}' for factor in factors)} x lora_B lora_A" if factors else ""
        return f"{len(self.strengths)} layers{strength}" + (f"; ignores {lost}" if lost else "")


def read_as_comfyui(file: AdapterFile, model: Model) -> Reading | None:
    """ComfyUI's own rules (comfy.lora.model_lora_keys_unet); None where it has no such model. It never fails and never warns."""
    accepted = model.family.spec.comfyui
    if not accepted:
        return None
    strengths: dict[str, float] = {}
    ignored: dict[str, list[str]] = {}
    for stem, pair in file.pairs.items():
        names = model.kohya if pair.prefix in KOHYA else model.original
        layer = names.get(pair.name) if pair.prefix in accepted else None
        if layer is None:
            ignored.setdefault(_why_ignored(pair, model, accepted), []).append(stem)
        else:
            strengths[layer] = 1.0 if pair.alpha is None or pair.rank is None else pair.alpha / pair.rank
    return Reading("ComfyUI", strengths, {why: tuple(stems) for why, stems in ignored.items()})


def read_as_diffusers(file: AdapterFile, model: Model) -> Reading:
    """What `load_lora_weights` does, of which the pipeline's own converter is run on stand-ins of the tensors.

    A stand-in is all ones, so what the converter makes of it is the factor that it applies.
    """
    spec = model.family.spec
    pipeline = getattr(diffusers, next(iter(spec.pipelines.values())))
    stand_ins = {key: _stand_in(key, tensor) for key, tensor in file.tensors.items()}
    try:
        state = pipeline.lora_state_dict(stand_ins)
    except _REFUSALS as error:
        return Reading("diffusers", {}, {}, f"{type(error).__name__}, {_why_refused(file, model)}")
    foreign = [key for key in state if "lora" not in key]
    if foreign:
        return Reading("diffusers", {}, {}, f"ValueError (Invalid LoRA checkpoint), {_why_refused(file, model)}")
    mine = {key.removeprefix("transformer."): tensor for key, tensor in state.items() if key.startswith("transformer.")}
    if mine and not any("lora_B" in key for key in mine):
        return Reading("diffusers", {}, {}, "IndexError, as no key ends in .lora_B.weight")
    strengths: dict[str, float] = {}
    for key, tensor in mine.items():
        stem, found, end = key.partition(".lora_")
        if found and end in {"A.weight", "B.weight"} and stem in model.layers:
            strengths[stem] = strengths.get(stem, 1.0) * float(tensor.flatten()[0])
    settings = file.settings
    if settings is not None:
        told = told_settings(settings)
        strengths = {layer: factor * _scale(told, layer) for layer, factor in strengths.items() if _is_target(told, layer)}
    ignored: dict[str, list[str]] = {}
    for stem, pair in file.pairs.items():
        layer = model.find(pair)
        if layer not in strengths:
            accepted = ("transformer.", *(prefix for prefix in ("diffusion_model.",) if _exports_with(prefix, model)))
            untold = settings is not None and layer is not None and not _is_target(told_settings(settings), layer)
            why = _why_ignored(pair, model, accepted)
            if untold:
                why = "lora_adapter_metadata does not target it"
            elif any(".default." in end for end in pair.ends):
                why = "the keys hold an adapter's name (default), as they do inside peft"
            ignored.setdefault(why, []).append(stem)
    return Reading("diffusers", strengths, {why: tuple(stems) for why, stems in ignored.items()})


def _stand_in(key: str, tensor: Tensor) -> Tensor:
    kind = next((kind for end, kind in ENDS.items() if key.endswith(end)), None)
    if kind == "alpha":
        return tensor.clone()  # the converter of Wan scales what it is given in place
    if kind is None or tensor.ndim < 2:
        return torch.ones(tensor.shape)
    return torch.ones(tensor.shape[0], 1) if kind == "down" else torch.ones(1, tensor.shape[1])


def told_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of lora_adapter_metadata is for the transformer."""
    return {key.removeprefix("transformer."): value for key, value in settings.items() if key.startswith("transformer.")}


def _is_target(told: Mapping[str, Any], layer: str) -> bool:
    targets = told.get("target_modules", ())
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def _scale(told: Mapping[str, Any], layer: str) -> float:
    """alpha / rank, with peft's defaults for what is not told."""
    rank = of_pattern(told.get("rank_pattern"), layer, told.get("r", 8))
    alpha = of_pattern(told.get("alpha_pattern"), layer, told.get("lora_alpha", 8))
    return alpha / (rank**0.5 if told.get("use_rslora") else rank)


def of_pattern(pattern: Any, layer: str, otherwise: float) -> float:
    """What a rank_pattern or alpha_pattern of peft says of a layer."""
    found = (value for name, value in (pattern or {}).items() if layer == name.lstrip("^") or layer.endswith(f".{name}"))
    return next(found, otherwise)


def _exports_with(prefix: str, model: Model) -> bool:
    first = next(layer for layer in model.layers if layer.startswith(f"{model.family.spec.blocks}."))
    return model.family.export_name(first).startswith(prefix)


def _why_ignored(pair: Pair, model: Model, accepted: Sequence[str]) -> str:
    if model.find(pair) is None:
        return f"{model.title} has no such layer"
    if pair.prefix not in accepted:
        begins = f"begin with {pair.prefix}" if pair.prefix else "have no prefix"
        return f"the keys {begins}, and it reads {' or '.join(prefix or 'none' for prefix in accepted)}"
    found, read = ("diffusers'", "the original's") if pair.name in model.layers else ("the original's", "diffusers'")
    return f"behind {pair.prefix or 'nothing'} it reads {read} names, and these are {found}"


def _why_refused(file: AdapterFile, model: Model) -> str:
    """The cause behind an exception of diffusers, in words."""
    pairs, wan = list(file.pairs.values()), model.family.spec.name == "wan"
    if any(pair.prefix == "lora_unet_" for pair in pairs):
        return "as it takes lora_unet_ keys only with .alpha and for every layer of every block"
    if any(pair.prefix == "diffusion_model." and pair.name in model.layers for pair in pairs) and wan:
        return "as diffusers' own names stand behind diffusion_model., where the original's belong"
    if any(".default." in end for pair in pairs for end in pair.ends):
        return "as it takes no adapter's name (default) in the keys"
    if any(pair.alpha is not None for pair in pairs):
        return "as it takes .alpha " + ("only inside the blocks" if wan else f"of no {model.family.spec.title}")
    if wan and not any(".blocks." in f".{pair.name}" for pair in pairs):
        return "as it looks for blocks, and the file has none"
    if file.strangers:
        return f"as {file.strangers[0]} is no part of a LoRA"
    return "by the names of the keys"


def how_to_load(file: AdapterFile, model: Model) -> list[str]:
    """The lines that load a file."""
    spec, recipe = model.family.spec, file.recipe()
    pipeline = dict(spec.pipelines).get(recipe.get("task", ""), spec.pipelines[model.family.task])
    released = spec.released.get(model.title, spec.first)
    base = recipe.get("base", {}).get("repo") or released.repo
    second = ", load_into_transformer_2=True" if file.metadata.get("crepatrain.expert") == "low" else ""
    lines = [
        "diffusers:",
        f'  pipeline = {pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")',
        f'  pipeline.load_lora_weights("{file.path.parent}", weight_name="{file.path.name}"{second})',
    ]
    if spec.comfyui:
        lines += ["ComfyUI:", "  put it into models/loras and load it at strength 1" + comfyui_hint(spec)]
    return lines


def comfyui_hint(spec: FamilySpec) -> str:
    """What else must be known of loading a family's adapters in ComfyUI."""
    return _COMFYUI_HINTS.get(spec.name, "")
