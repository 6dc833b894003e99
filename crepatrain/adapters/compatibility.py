"""What diffusers and ComfyUI do with an adapter file: what they load, at which strength, what they ignore, and why."""

import json
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from crepatrain.adapters.adapter_file import ENDS, KOHYA, AdapterFile, Model, Pair, end_of, shape_mismatch
from crepatrain.specs import Expert, FamilySpec, Task
from crepatrain.training.lora import live_adapter, target_modules, unknown_settings

# What diffusers, peft and torch raise where they can't load a file. A bug of ours may raise the same, or a library that does not
# fit: so before the file is blamed, diffusers is given an adapter that is known to be right.
_REFUSALS = (ValueError, LookupError, AttributeError, RuntimeError, TypeError, NameError, ArithmeticError, re.error)
# The name that diffusers gives to an adapter without one.
_LOADED = "default_0"
# Why a layer of a damaged file is lost in every program: the file is to blame, not the program.
DAMAGE = _HALF, _MISFIT, _ALPHA = "one half of it is missing", "its tensors don't fit the layer", "its alpha is not one number"
_NO_OBJECT = "lora_adapter_metadata in its header is no JSON object"
_REWRITE_METADATA = "write lora_adapter_metadata again, or leave it out"


@dataclass(frozen=True)
class Compatibility:
    """What one program does with a file.

    Attributes:
        strengths: layer -> the factor that it applies to lora_B @ lora_A.
        ignored: reason -> what the ignored keys begin with.
        refusal: why it does not load the file at all; None where it does.
        remedy: what to do about the refusal; None where other names for the keys are the remedy.
    """

    program: str
    strengths: Mapping[str, float]
    ignored: Mapping[str, tuple[str, ...]]
    refusal: str | None = None
    remedy: str | None = None

    @property
    def summary(self) -> str:
        """The same in one line."""
        if self.refusal:
            return f"refuses it: {self.refusal}"
        lost = sum(map(len, self.ignored.values()))
        factors = sorted(set(self.strengths.values()))
        strength = f", at {' and '.join(f'{factor:g}' for factor in factors)} x lora_B lora_A" if factors else ""
        return f"{len(self.strengths)} layers{strength}" + (f"; ignores {lost}" if lost else "")


def comfyui_compatibility(file: AdapterFile, model: Model, *, shapes: bool = True) -> Compatibility | None:
    """What ComfyUI loads, by its own rules (comfy.lora.model_lora_keys_unet); None where it has no such model.

    ComfyUI itself never warns about a layer that it ignores.
    """
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
            strengths[layer] = pair.scale
    return Compatibility("ComfyUI", strengths, {why: tuple(stems) for why, stems in ignored.items()})


def diffusers_compatibility(file: AdapterFile, model: Model, *, shapes: bool = True) -> Compatibility:
    """What `load_lora_weights` does: diffusers itself loads the file, into a transformer whose weights take no memory.

    Its tensors are replaced by ones, so what a layer then holds is the factor that is applied to lora_B @ lora_A.

    Args:
        shapes: whether the model's shapes are those of the file's base; otherwise the ones get the model's shapes.

    Raises:
        Exception: whatever diffusers raises for an adapter that is known to be right, too: then the file is not to blame.
    """
    raw = file.metadata.get("lora_adapter_metadata")
    try:
        transformer = _load(file, model, raw, shapes=shapes)
    except _Refused as refused:
        return Compatibility("diffusers", {}, {}, str(refused), refused.remedy)
    layers, live = dict(transformer.named_modules()), live_adapter(transformer, _LOADED)
    halves = {model.find(pair) for pair in file.pairs.values() if not pair.complete}
    strengths = {
        layer: scale * float(down.flatten()[0]) * float(up.flatten()[0])
        for layer, (down, up, scale) in live.items()
        # A parameter that no key has filled stays on the meta device.
        if layer not in halves and not any(part.is_meta for part in layers[layer].parameters())
    }
    ignored: dict[str, list[str]] = {}
    for stem, pair in file.pairs.items():
        layer = model.find(pair)
        if layer not in strengths:
            unfilled = _unfilled(layers[layer]) if layer in live else None
            why = _damage(pair, model, shapes=shapes) or unfilled or _why_ignored(pair, model, _accepted(model))
            ignored.setdefault(why, []).append(stem)
    return Compatibility("diffusers", strengths, {why: tuple(stems) for why, stems in ignored.items()})


class _Refused(Exception):
    """diffusers does not load a file.

    Args:
        error: the name of what it raises.
        why: the cause.
        remedy: None where other names for the keys are the remedy.
    """

    def __init__(self, error: str, why: str, remedy: str | None = None) -> None:
        super().__init__(f"{error}, {why}")
        self.remedy = remedy


def _load(file: AdapterFile, model: Model, raw: str | None, *, shapes: bool) -> nn.Module:
    """A transformer into which diffusers has loaded ones in the place of a file's tensors.

    Args:
        raw: the file's lora_adapter_metadata; None: it has none.

    Raises:
        _Refused: diffusers does not load the file.
    """
    ones = {key: _ones_like(key, file, model, shapes=shapes) for key in file.tensors}
    try:
        state = _convert(ones, model)
    except _REFUSALS as error:
        _expect_working_libraries(model)
        raise _Refused(type(error).__name__, _why_not_converted(file, model)) from error
    if not all("lora" in key for key in state):
        raise _Refused("ValueError (Invalid LoRA checkpoint)", _why_not_converted(file, model))
    try:
        settings = json.loads(raw) if raw else None
    except JSONDecodeError as error:
        raise _Refused(type(error).__name__, f"as {_NO_OBJECT}", _REWRITE_METADATA) from error
    transformer = _without_storage(model.family.empty_transformer())
    try:
        _fill(transformer, state, settings, model)
    except _REFUSALS as error:
        _expect_working_libraries(model)
        name = type(error).__name__
        if not raw and isinstance(error, IndexError):
            raise _Refused(name, "as it finds no lora_B.weight to read a rank from") from error
        if "not found in the base model" in str(error):
            first = next(iter(file.pairs.values()))
            raise _Refused(name, f"as {_why_ignored(first, model, _accepted(model))}") from error
        raise _Refused(name, _why_not_loaded(settings, error), _REWRITE_METADATA if raw else "write the file again") from error
    return transformer


def _pipeline_class(model: Model) -> Any:
    return getattr(diffusers, next(iter(model.family.spec.pipelines.values())))


def _convert(tensors: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    """The tensors of an adapter file under the names of diffusers, by diffusers itself."""
    with _quietly():
        return _pipeline_class(model).lora_state_dict(tensors)


def _fill(transformer: nn.Module, state: dict[str, Tensor], settings: Any, model: Model) -> None:
    """Let diffusers put an adapter on a transformer.

    Args:
        state: of `_convert`.
        settings: lora_adapter_metadata, parsed; None: the file has none.
    """
    with _quietly():
        _pipeline_class(model).load_lora_into_transformer(
            state, transformer=transformer, adapter_name=_LOADED, metadata=settings, low_cpu_mem_usage=True
        )


@cache
def _expect_working_libraries(model: Model) -> None:
    """Load an adapter that is known to be right, of rank 1 and as this trainer writes it, once for each model.

    What is raised here is a bug, or a library that does not fit, and no fault of a file.
    """
    family, ones = model.family, {}
    transformer = _without_storage(family.empty_transformer())
    for layer in target_modules(transformer, family.spec.lora_targets, family.spec):
        name, (out, width) = family.export_name(layer), model.layers[layer].shape
        ones |= {f"{name}.lora_A.weight": torch.ones(1, width), f"{name}.lora_B.weight": torch.ones(out, 1)}
    _fill(transformer, _convert(ones, model), None, model)


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide what diffusers and peft print while they load: the result says the same."""
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)


def _without_storage(transformer: nn.Module) -> nn.Module:
    """Move a transformer from the meta device to the CPU, with one number for each weight.

    peft moves an adapter to its layer's device, so it would end on the meta device otherwise.
    """
    for module in transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False))
    return transformer


def _ones_like(key: str, file: AdapterFile, model: Model, *, shapes: bool) -> Tensor:
    tensor, end = file.tensors[key], end_of(key)
    if end is not None and ENDS[end] == "alpha":
        return tensor.clone()  # the converter of Wan scales what it is given in place
    # In fp32 the factors are exact; a dtype that no layer can have is kept.
    dtype = torch.float32 if tensor.is_floating_point() and tensor.itemsize > 1 else tensor.dtype
    shape = tuple(tensor.shape)
    layer = None if shapes or end is None else model.find(file.pairs[key.removesuffix(end)])
    if layer and end is not None:
        weight = model.layers[layer].shape
        shape = (*shape[:1], *weight[1:]) if ENDS[end] == "down" else (*weight[:1], *shape[1:])
    return torch.ones(shape, dtype=dtype)


def _unfilled(layer: nn.Module) -> str | None:
    """What diffusers expects in a layer beside lora_A and lora_B, and no key of the file has filled."""
    unfilled = [name.replace(f".{_LOADED}", "") for name, part in layer.named_parameters() if part.is_meta]
    if not unfilled or {"lora_A.weight", "lora_B.weight"} & set(unfilled):
        return None
    return f"it asks for {unfilled[0]} in each, and the file has none"


def _damage(pair: Pair, model: Model, *, shapes: bool) -> str | None:
    if not pair.complete:
        return _HALF
    if math.isnan(pair.scale):
        return _ALPHA
    layer = model.find(pair)
    return _MISFIT if layer and shapes and shape_mismatch(pair, model.layers[layer]) else None


def _accepted(model: Model) -> tuple[str, ...]:
    """The prefixes of the keys that diffusers reads for a model."""
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
    return f"after {pair.prefix or 'no prefix'} it reads {read} names, and these are {found}"


def _why_not_converted(file: AdapterFile, model: Model) -> str:
    """The cause of an exception that a converter of diffusers raised; its own message names none."""
    pairs, translated = list(file.pairs.values()), model.family.spec.diffusers_translates_lora
    if any(pair.prefix == "lora_unet_" for pair in pairs):
        return "as it accepts lora_unet_ keys only with .alpha and for every layer of every block"
    if any(pair.prefix == "diffusion_model." and pair.name in model.layers for pair in pairs) and translated:
        return "as diffusers' own names follow diffusion_model., where the original's belong"
    if any(".default." in end for pair in pairs for end in pair.ends):
        return "as it accepts no adapter's name (default) in the keys"
    if any(not end.endswith(".weight") for pair in pairs for end in pair.ends):
        return "as it accepts no keys that end without .weight"
    scaled = _why_not_scaled(pairs, model.family.spec)
    if scaled:
        return scaled
    if not pairs:
        return "as no key is a LoRA's"
    if translated and not any(".blocks." in f".{pair.name}" for pair in pairs):
        return "as it looks for blocks, and the file has none"
    if file.other_keys:
        return f"as {file.other_keys[0]} is no part of a LoRA"
    if any(".lora." in end for pair in pairs for end in pair.ends):
        return "as it accepts .lora.down and .lora.up only after transformer."
    unknown = [stem for stem, pair in file.pairs.items() if model.find(pair) is None]
    if unknown:
        return f"as {unknown[0]} is no layer of {model.title}"
    return "because of the names of the keys"


def _why_not_scaled(pairs: Sequence[Pair], spec: FamilySpec) -> str | None:
    """Why a converter does not accept the .alpha of a file, where that may be the cause; otherwise None."""
    scaled = [pair for pair in pairs if pair.alpha is not None]
    if scaled and not spec.diffusers_translates_lora:
        return f"as it accepts no .alpha for {spec.title}"
    outside = [pair for pair in scaled if pair.prefix != "diffusion_model."]
    if outside:
        return f"as it accepts no .alpha {f'after {outside[0].prefix}' if outside[0].prefix else 'without a prefix'}"
    if any(not pair.name.startswith("blocks.") for pair in scaled):
        return "as it accepts .alpha only inside the blocks"
    return "as an alpha is not one number" if any(math.isnan(pair.scale) for pair in pairs) else None


def _why_not_loaded(settings: Any, error: Exception) -> str:
    """The cause of an exception that diffusers raised while it put the tensors in, or else its message."""
    if not isinstance(settings, (dict, type(None))):
        return f"as {_NO_OBJECT}"
    if settings is not None:
        names = {key.removeprefix("transformer.") for key in settings if key.startswith("transformer.")}
        unknown = unknown_settings(names)
        if not names:
            return "as no key of lora_adapter_metadata begins with transformer."
        if unknown:
            return f"as lora_adapter_metadata has keys that peft does not know: {', '.join(sorted(unknown))}"
        if "target_modules" not in names:
            return "as lora_adapter_metadata names no target_modules"
    copied = re.search(r"an exception occurred : \('(.+?)',\)", str(error))
    message = copied[1] if copied else str(error)
    sizes = re.search(r"size mismatch for (\S+): .*?Size\((\[.*?\])\).*?Size\((\[.*?\])\)", message)
    wanted = "where it expects" if settings is None else "and lora_adapter_metadata makes it"
    if sizes:
        return f"as {sizes[1].replace(f'.{_LOADED}.', '.')} is {sizes[2]}, {wanted} {sizes[3]}"
    return f"{'with the message' if settings is None else 'because of lora_adapter_metadata'}: {' '.join(message.split())[:200]}"


def how_to_load(file: AdapterFile, model: Model, base: str | None) -> list[str]:
    """The lines of code, or the steps, that load a file.

    Args:
        base: where the model's pipeline is; None: where the file's header says.
    """
    spec, recipe = model.family.spec, file.recipe()
    pipeline = _pipeline_name(model, recipe, of_recipe=base is None)
    released = spec.released.get(model.title, spec.first)
    recorded = recipe.get("base", {}).get("repo") or str(released.repo)
    base = base or (recorded if "/" in recorded else f"PATH TO {recorded}")  # a header holds no path of a machine
    lines = [
        "diffusers:",
        f'  pipeline = {pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")',
        f"  {load_call(file.path.parent, file.path.name, file.expert)}",
    ]
    if spec.comfyui:
        lines += ["ComfyUI:", "  put it into models/loras and load it at strength 1" + comfyui_hint(spec)]
    return lines


def _pipeline_name(model: Model, recipe: Mapping[str, Any], *, of_recipe: bool) -> str:
    """The pipeline class for an adapter: the model's, or that of its training, as not all bases differ in names and shapes."""
    spec, training = model.family.spec, recipe.get("train")
    if of_recipe and isinstance(training, dict):
        variants = [spec.variant(released.checkpoint, None) for released in spec.released.values()]
        known = [spec.pipeline_of(variant, task) for variant in variants for task in spec.pipelines]
        if training.get("prompt_template_id") in known:
            return training["prompt_template_id"]
    tasks: dict[str, Task] = {task: task for task in spec.pipelines}
    return spec.pipeline_of(model.family.variant, tasks.get(recipe.get("task", ""), model.family.task))


def load_call(folder: Path | str, name: str, expert: Expert | None) -> str:
    """The line of code that loads an adapter file of a folder or repository into a pipeline of diffusers."""
    second = ", load_into_transformer_2=True" if expert == "low" else ""
    return f'pipeline.load_lora_weights("{folder}", weight_name="{name}"{second})'


def comfyui_hint(spec: FamilySpec) -> str:
    """What else a user must know to load a family's adapters in ComfyUI."""
    return f" (ComfyUI of {spec.comfyui_since} or newer)" if spec.comfyui_since else ""
