"""What diffusers and ComfyUI make of an adapter file: what they read, how strongly they apply it, what they ignore, and why."""

import json
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from crepatrain.adapters.adapter_file import ENDS, KOHYA, AdapterFile, Model, Pair, end_of, misfit
from crepatrain.specs import Expert, FamilySpec
from crepatrain.training.lora import live_adapter, unknown_settings

# What diffusers, peft and torch raise where they can't load a file.
_REFUSALS = (ValueError, LookupError, AttributeError, RuntimeError, TypeError, NameError, ArithmeticError, re.error)
# As diffusers calls an adapter that is given no name.
_LOADED = "default_0"
# Layers that a damaged file loses in every program: the file is to blame, not its reader.
DAMAGE = _HALF, _MISFIT, _ALPHA = "one half of it is missing", "its tensors don't fit the layer", "its alpha is not one number"

_COMFYUI_HINTS = {"kandinsky5_video": " (ComfyUI of December 2025 or newer)"}


@dataclass(frozen=True)
class Reading:
    """What one program makes of a file.

    Attributes:
        strengths: by layer, the factor that it applies to lora_B @ lora_A.
        ignored: reason -> how the keys of what it ignores begin.
        refusal: why it does not load the file at all; None where it does.
        remedy: of a refusal that other names for the keys don't mend.
    """

    program: str
    strengths: Mapping[str, float]
    ignored: Mapping[str, tuple[str, ...]]
    refusal: str | None = None
    remedy: str | None = None

    @property
    def in_words(self) -> str:
        if self.refusal:
            return f"refuses it: {self.refusal}"
        lost = sum(map(len, self.ignored.values()))
        factors = sorted(set(self.strengths.values()))
        strength = f", at {' and '.join(f'{factor:g}' for factor in factors)} x lora_B lora_A" if factors else ""
        return f"{len(self.strengths)} layers{strength}" + (f"; ignores {lost}" if lost else "")


def read_as_comfyui(file: AdapterFile, model: Model, *, shapes: bool = True) -> Reading | None:
    """ComfyUI's own rules (comfy.lora.model_lora_keys_unet); None where it has no such model. It never warns of a layer."""
    accepted = model.family.spec.comfyui
    if not accepted:
        return None
    strengths: dict[str, float] = {}
    ignored: dict[str, list[str]] = {}
    for stem, pair in file.pairs.items():
        names = model.kohya if pair.prefix in KOHYA else model.original
        layer = names.get(pair.name) if pair.prefix in accepted else None
        damage = _damage(pair, model, shapes=shapes)
        if layer is None or damage:
            ignored.setdefault(damage or _why_ignored(pair, model, accepted), []).append(stem)
        else:
            strengths[layer] = pair.told_scale
    return Reading("ComfyUI", strengths, {why: tuple(stems) for why, stems in ignored.items()})


def read_as_diffusers(file: AdapterFile, model: Model, *, shapes: bool = True) -> Reading:
    """What `load_lora_weights` does: the file is loaded by diffusers itself, into a transformer whose weights take no memory.

    Ones stand for the tensors, so what is then in a layer is the factor that is applied to lora_B @ lora_A.

    Args:
        shapes: whether the model's shapes are those of the file's base; otherwise the stand-ins get the model's.
    """
    raw = file.metadata.get("lora_adapter_metadata")
    try:
        transformer = _load(file, model, raw, shapes=shapes)
    except _Refused as why:
        return Reading("diffusers", {}, {}, str(why), why.remedy)
    layers, live = dict(transformer.named_modules()), live_adapter(transformer, _LOADED)
    halves = {model.find(pair) for pair in file.pairs.values() if not pair.whole}
    strengths = {
        layer: scale * float(down.flatten()[0]) * float(up.flatten()[0])
        for layer, (down, up, scale) in live.items()
        # What no key has filled stays on the meta device.
        if layer not in halves and not any(part.is_meta for part in layers[layer].parameters())
    }
    ignored: dict[str, list[str]] = {}
    for stem, pair in file.pairs.items():
        layer = model.find(pair)
        if layer not in strengths:
            lacking = _lacking(layers[layer]) if layer in live else None
            why = _damage(pair, model, shapes=shapes) or lacking or _why_ignored(pair, model, _accepted(model))
            ignored.setdefault(why, []).append(stem)
    return Reading("diffusers", strengths, {why: tuple(stems) for why, stems in ignored.items()})


class _Refused(Exception):
    """diffusers does not load a file.

    Args:
        error: what it raises.
        why: the cause.
        remedy: None: other names for the keys.
    """

    def __init__(self, error: str, why: str, remedy: str | None = None) -> None:
        super().__init__(f"{error}, {why}")
        self.remedy = remedy


def _load(file: AdapterFile, model: Model, raw: str | None, *, shapes: bool) -> nn.Module:
    """A transformer into which diffusers has loaded stand-ins of a file's tensors, with its lora_adapter_metadata.

    Raises:
        _Refused: it does not.
    """
    pipeline = getattr(diffusers, next(iter(model.family.spec.pipelines.values())))
    stand_ins = {key: _stand_in(key, file, model, shapes=shapes) for key in file.tensors}
    try:
        with _quietly():
            state = pipeline.lora_state_dict(stand_ins)
    except _REFUSALS as error:
        raise _Refused(type(error).__name__, _why_not_converted(file, model)) from error
    if not all("lora" in key for key in state):
        raise _Refused("ValueError (Invalid LoRA checkpoint)", _why_not_converted(file, model))
    transformer, settings = _hollow(model.family.empty_transformer()), None
    try:
        with _quietly():
            settings = json.loads(raw) if raw else None
            into = {"transformer": transformer, "adapter_name": _LOADED, "metadata": settings}
            pipeline.load_lora_into_transformer(state, **into, low_cpu_mem_usage=True)
    except _REFUSALS as error:
        name = type(error).__name__
        if not raw and isinstance(error, IndexError):
            raise _Refused(name, "as it finds no lora_B.weight to take a rank from") from error
        if "not found in the base model" in str(error):
            first = next(iter(file.pairs.values()))
            raise _Refused(name, f"as {_why_ignored(first, model, _accepted(model))}") from error
        remedy = "write lora_adapter_metadata anew, or leave it out" if raw else "write the file again"
        raise _Refused(name, _why_not_loaded(settings, error), remedy) from error
    return transformer


@contextmanager
def _quietly() -> Iterator[None]:
    """What diffusers and peft print while they load is told by the reading."""
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)


def _hollow(transformer: nn.Module) -> nn.Module:
    """A transformer of the meta device with one number for each weight: peft moves an adapter to its layer's device."""
    for module in transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return transformer


def _stand_in(key: str, file: AdapterFile, model: Model, *, shapes: bool) -> Tensor:
    tensor, end = file.tensors[key], end_of(key)
    if end is not None and ENDS[end] == "alpha":
        return tensor.clone()  # the converter of Wan scales what it is given in place
    # Factors are told exactly; a dtype that no layer takes is kept.
    dtype = torch.float32 if tensor.is_floating_point() and tensor.itemsize > 1 else tensor.dtype
    shape = tuple(tensor.shape)
    layer = None if shapes or end is None else model.find(file.pairs[key.removesuffix(end)])
    if layer and end is not None:
        whole = model.layers[layer].shape
        shape = (*shape[:1], *whole[1:]) if ENDS[end] == "down" else (*whole[:1], *shape[1:])
    return torch.ones(shape, dtype=dtype)


def _lacking(layer: nn.Module) -> str | None:
    """What else than lora_A and lora_B diffusers has made room for in a layer, and no key has filled."""
    unfilled = [name.replace(f".{_LOADED}", "") for name, part in layer.named_parameters() if part.is_meta]
    if not unfilled or {"lora_A.weight", "lora_B.weight"} & set(unfilled):
        return None
    return f"it asks for {unfilled[0]} in each, and the file has none"


def _damage(pair: Pair, model: Model, *, shapes: bool) -> str | None:
    if not pair.whole:
        return _HALF
    if math.isnan(pair.told_scale):
        return _ALPHA
    layer = model.find(pair)
    return _MISFIT if layer and shapes and misfit(pair, model.layers[layer]) else None


def _accepted(model: Model) -> tuple[str, ...]:
    """The prefixes of which diffusers takes a model's keys."""
    first = next(layer for layer in model.layers if layer.startswith(f"{model.family.spec.blocks}."))
    exported = model.family.export_name(first).startswith("diffusion_model.")
    return ("transformer.", "diffusion_model.") if exported else ("transformer.",)


def _why_ignored(pair: Pair, model: Model, accepted: Sequence[str]) -> str:
    if model.find(pair) is None:
        return f"{model.title} has no such layer"
    if pair.prefix not in accepted:
        begins = f"begin with {pair.prefix}" if pair.prefix else "have no prefix"
        return f"the keys {begins}, and it reads {' or '.join(prefix or 'none' for prefix in accepted)}"
    ends = {end for end in pair.ends if ".default." in end or not end.endswith(".weight")}
    if ends and accepted[0] == "transformer.":
        named = any(".default." in end for end in ends)
        return "the keys " + ("hold an adapter's name (default), as they do inside peft" if named else "end without .weight")
    found, read = ("diffusers'", "the original's") if pair.name in model.layers else ("the original's", "diffusers'")
    return f"behind {pair.prefix or 'nothing'} it reads {read} names, and these are {found}"


def _why_not_converted(file: AdapterFile, model: Model) -> str:
    """The cause behind an exception of a converter of diffusers, which knows no cause itself."""
    pairs, wan = list(file.pairs.values()), model.family.spec.name == "wan"
    if any(pair.prefix == "lora_unet_" for pair in pairs):
        return "as it takes lora_unet_ keys only with .alpha and for every layer of every block"
    if any(pair.prefix == "diffusion_model." and pair.name in model.layers for pair in pairs) and wan:
        return "as diffusers' own names stand behind diffusion_model., where the original's belong"
    if any(".default." in end for pair in pairs for end in pair.ends):
        return "as it takes no adapter's name (default) in the keys"
    if any(not end.endswith(".weight") for pair in pairs for end in pair.ends):
        return "as it takes no keys that end without .weight"
    scaled = _why_not_scaled(pairs, model.family.spec)
    if scaled:
        return scaled
    if not pairs:
        return "as no key is a LoRA's"
    if wan and not any(".blocks." in f".{pair.name}" for pair in pairs):
        return "as it looks for blocks, and the file has none"
    if file.strangers:
        return f"as {file.strangers[0]} is no part of a LoRA"
    if any(".lora." in end for pair in pairs for end in pair.ends):
        return "as it takes .lora.down and .lora.up only behind transformer."
    unknown = [stem for stem, pair in file.pairs.items() if model.find(pair) is None]
    if unknown:
        return f"as {unknown[0]} is no layer of {model.title}"
    return "by the names of the keys"


def _why_not_scaled(pairs: Sequence[Pair], spec: FamilySpec) -> str | None:
    """Why a converter does not take the .alpha of a file, where that may be the cause."""
    scaled = [pair for pair in pairs if pair.alpha is not None]
    if scaled and spec.name != "wan":
        return f"as it takes .alpha of no {spec.title}"
    outside = [pair for pair in scaled if pair.prefix != "diffusion_model."]
    if outside:
        return f"as it takes no .alpha {f'behind {outside[0].prefix}' if outside[0].prefix else 'without a prefix'}"
    if any(not pair.name.startswith("blocks.") for pair in scaled):
        return "as it takes .alpha only inside the blocks"
    return "as an alpha is not one number" if any(math.isnan(pair.told_scale) for pair in pairs) else None


def _why_not_loaded(settings: Any, error: Exception) -> str:
    """The cause behind an exception while diffusers put the tensors in, or else its own words."""
    if isinstance(error, JSONDecodeError) or not isinstance(settings, (dict, type(None))):
        return "as lora_adapter_metadata in its header is no JSON object"
    if settings is not None:
        told = {key.removeprefix("transformer.") for key in settings if key.startswith("transformer.")}
        strange = unknown_settings(told)
        if not told:
            return "as no key of lora_adapter_metadata begins with transformer."
        if strange:
            return f"as lora_adapter_metadata has keys that peft does not know: {', '.join(sorted(strange))}"
        if "target_modules" not in told:
            return "as lora_adapter_metadata names no target_modules"
    copied = re.search(r"an exception occurred : \('(.+?)',\)", str(error))
    said = copied[1] if copied else str(error)
    sizes = re.search(r"size mismatch for (\S+): .*?Size\((\[.*?\])\).*?Size\((\[.*?\])\)", said)
    wanted = "where it expects" if settings is None else "and lora_adapter_metadata makes it"
    if sizes:
        return f"as {sizes[1].replace(f'.{_LOADED}.', '.')} is {sizes[2]}, {wanted} {sizes[3]}"
    return f"{'in its words' if settings is None else 'by lora_adapter_metadata'}: {' '.join(said.split())[:200]}"


def how_to_load(file: AdapterFile, model: Model, base: str | None) -> list[str]:
    """The lines that load a file.

    Args:
        base: where the model's pipeline is; None: unknown, but for what the file says.
    """
    spec, recipe = model.family.spec, file.recipe()
    pipeline = dict(spec.pipelines).get(recipe.get("task", ""), spec.pipelines[model.family.task])
    released = spec.released.get(model.title, spec.first)
    told = recipe.get("base", {}).get("repo") or str(released.repo)
    base = base or (told if "/" in told else f"PATH TO {told}")  # a header holds no path of a machine
    lines = [
        "diffusers:",
        f'  pipeline = {pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")',
        f"  {load_call(file.path.parent, file.path.name, file.expert)}",
    ]
    if spec.comfyui:
        lines += ["ComfyUI:", "  put it into models/loras and load it at strength 1" + comfyui_hint(spec)]
    return lines


def load_call(folder: Path | str, name: str, expert: Expert | None) -> str:
    """The line that loads an adapter's file of a folder, or of a repository, into diffusers' pipeline."""
    second = ", load_into_transformer_2=True" if expert == "low" else ""
    return f'pipeline.load_lora_weights("{folder}", weight_name="{name}"{second})'


def comfyui_hint(spec: FamilySpec) -> str:
    """What else must be known of loading a family's adapters in ComfyUI."""
    return _COMFYUI_HINTS.get(spec.name, "")
