"""What is wrong with an adapter file: in itself, as an adapter of a model, and beside the adapter that it was written from."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from crepatrain.adapters.adapter_file import AdapterFile, Model, read_adapter, shape_mismatch
from crepatrain.adapters.compatibility import DAMAGE, Compatibility, comfyui_compatibility, diffusers_compatibility
from crepatrain.errors import Problem, UserError
from crepatrain.families.base import Family
from crepatrain.specs import FAMILIES
from crepatrain.training.lora import live_adapter

# Keys that are no part of a LoRA: what they hold, or end with where it begins with a dot, and what that is.
_OTHER_KEYS = {
    "dora_scale": "DoRA's magnitudes, which diffusers drops",
    "lora_magnitude_vector": "DoRA's magnitudes, which ComfyUI does not read under this name",
    ".diff": "a full difference of weights, which diffusers can't read",
    ".diff_b": "a bias, which one program reads and the other does not",
    ".bias": "a bias, which one program reads and the other does not",
    "hada_": "LoHa's factors",
    "lokr_": "LoKr's factors",
    "projector": "CREPA's projector, which no sampling needs",
}
# By how much, relatively, the rounding of a dtype may change lora_B lora_A x.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class CheckResult:
    """What a check of a file has found.

    Attributes:
        programs: what each program that knows the family does with the file.
        problems: what is wrong, or would be ignored.
        notes: what a user should know though nothing is wrong.
    """

    programs: tuple[Compatibility, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def check_adapter(file: AdapterFile, model: Model, *, shapes: bool = True, zero_is_wrong: bool = True) -> CheckResult:
    """Find everything that is wrong with a file as an adapter of a model.

    Args:
        shapes: whether the model's shapes are those of the file's base.
        zero_is_wrong: whether an adapter that does nothing is a mistake; before the first step of a run it is not.
    """
    problems = check_content(file, model, shapes=shapes)
    notes = []
    zeros = [stem for stem, pair in file.pairs.items() if pair.up is not None and pair.up.numel() and not pair.up.float().any()]
    if zeros and len(zeros) == len(file.pairs) and zero_is_wrong:
        problems.append(Problem("every lora_B is zero: the adapter does nothing", "use the adapter of a later step"))
    elif zeros:
        notes.append(f"lora_B is zero in {len(zeros)} of {len(file.pairs)} layers, such as {zeros[0]}: they do nothing")
    programs = [diffusers_compatibility(file, model, shapes=shapes)]
    comfyui = comfyui_compatibility(file, model, shapes=shapes)
    if comfyui:
        programs.append(comfyui)
    else:
        notes.append(f"ComfyUI has no {model.family.spec.title}: the file is for diffusers")
    for program in programs:
        problems += _check_program(program, file, model)
    problems += _check_strength(file, programs)
    return CheckResult(tuple(programs), tuple(problems), tuple(notes))


def check_layers(file: AdapterFile, model: Model) -> list[Problem]:
    """What is wrong with the layers of a file: every one must be a layer of the model."""
    family = file.recipe().get("family", model.family.spec.name)
    unknown = [stem for stem, pair in file.pairs.items() if model.find(pair) is None]
    if family != model.family.spec.name or len(unknown) == len(file.pairs):
        made = FAMILIES[family].title if family != model.family.spec.name else "another model"
        return [Problem(f"it is not an adapter of {model.title}, but of {made}", "give an adapter of this model")]
    if unknown:
        what = f"{len(unknown)} of {len(file.pairs)} layers, such as {unknown[0]}, are not in {model.title}"
        return [Problem(what, "give an adapter of this model")]
    return []


def check_content(file: AdapterFile, model: Model, *, shapes: bool) -> list[Problem]:
    """What is wrong with a file, whichever program reads it."""
    return [*_check_tensors(file), *_check_pairs(file, model, shapes=shapes), *_check_expert_names(file)]


def _check_tensors(file: AdapterFile) -> list[Problem]:
    problems = [] if file.pairs else [Problem("it holds no layer of a LoRA", "give an adapter file")]
    meanings = {key: next((word for word in _OTHER_KEYS if _holds(key, word)), "") for key in file.other_keys}
    for word in dict.fromkeys(meanings.values()):
        keys = [key for key, found in meanings.items() if found == word]
        what = f"{len(keys)} keys such as {keys[0]} are {_OTHER_KEYS.get(word, 'no part of a LoRA')}"
        problems.append(Problem(what, "export a plain LoRA, without them"))
    infinite = [key for key, tensor in file.tensors.items() if not tensor.float().isfinite().all()]
    if infinite:
        fix = "use the adapter of an earlier step, or one in a wider dtype"
        problems.append(Problem(f"{len(infinite)} tensors such as {infinite[0]} hold numbers that are not finite", fix))
    integers = [key for key, tensor in file.tensors.items() if not key.endswith(".alpha") and not tensor.is_floating_point()]
    if integers:
        dtype = str(file.tensors[integers[0]].dtype).removeprefix("torch.")
        what = f"{len(integers)} tensors such as {integers[0]} are {dtype}, and a LoRA holds floating-point numbers"
        problems.append(Problem(what, "save it in bfloat16"))
    return problems


def _holds(key: str, word: str) -> bool:
    return key.endswith(word) if word.startswith(".") else word in key


def _check_pairs(file: AdapterFile, model: Model, *, shapes: bool) -> list[Problem]:
    problems = []
    halves = [stem for stem, pair in file.pairs.items() if not pair.complete]
    if halves:
        missing = "lora_A" if file.pairs[halves[0]].down is None else "lora_B"
        problems.append(Problem(f"{len(halves)} layers such as {halves[0]} lack {missing}", "write the file again"))
    for stem, pair in file.pairs.items():
        if pair.alpha is not None and math.isnan(pair.alpha):
            problems.append(Problem(f"the alpha of {stem} is not one finite number", "write the file again"))
        if pair.down is None or pair.up is None:
            continue
        if pair.down.shape[:1] != pair.up.shape[1:2]:
            down, up = (f"rank {size[0]}" if size else "no rank" for size in (pair.down.shape[:1], pair.up.shape[1:2]))
            problems.append(Problem(f"{stem}: lora_A has {down} and lora_B {up}", "write the file again"))
        elif not pair.rank:
            problems.append(Problem(f"{stem} has rank 0", "leave the layer out"))
    counts = Counter(layer for pair in file.pairs.values() if (layer := model.find(pair)))
    twice = [layer for layer, count in counts.items() if count > 1]
    if twice:
        problems.append(Problem(f"{len(twice)} layers such as {twice[0]} appear twice, under two names", "keep one of them"))
    if shapes:
        found = ((stem, model.find(pair), pair) for stem, pair in file.pairs.items())
        wrong = [(stem, why) for stem, layer, pair in found if layer and (why := shape_mismatch(pair, model.layers[layer]))]
        if wrong:
            what = f"{len(wrong)} layers don't fit {model.title}, such as {wrong[0][0]}: {wrong[0][1]}"
            problems.append(Problem(what, "give the base that it was trained on"))
    return problems


def check_expert(file: AdapterFile, base: Model) -> list[Problem]:
    """What is wrong where a file is for one of two experts: its base must have two."""
    if file.expert and base.family.variant.expert is None:
        what = f"it is for the {file.expert}-noise expert of two, and {base.title} has one transformer"
        return [Problem(what, "give the base that it was trained on")]
    return []


def _check_expert_names(file: AdapterFile) -> list[Problem]:
    """What is wrong where name and header differ: both experts of Wan 2.2 A14B have the same shapes, so nothing else shows it."""
    experts = file.experts
    if len(set(experts.values())) > 1:
        name, header = experts["name"], experts["header"]
        what = f"{file.path.name} is named after the {name}-noise expert, and was trained for the {header}-noise one"
        return [Problem(what, "rename it: the other transformer loads it without a warning, and the videos are wrong")]
    return []


def _check_program(found: Compatibility, file: AdapterFile, model: Model) -> list[Problem]:
    if found.refusal:
        return [Problem(f"{found.program} refuses the file: {found.refusal}", found.remedy or _as_exported(file, model))]
    return [
        Problem(
            f"{found.program} ignores {len(stems)} of {len(file.pairs)} layers, such as {stems[0]}: {why}",
            _as_exported(file, model),
        )
        for why, stems in found.ignored.items()
        if why not in DAMAGE  # which check_content reports
    ]


def _as_exported(file: AdapterFile, model: Model) -> str:
    """The remedy: how the keys should be named."""
    for pair in file.pairs.values():
        layer = model.find(pair)
        if layer and layer.startswith(f"{model.family.spec.blocks}."):
            return (
                f"name the keys as in {model.family.export_name(layer)}.lora_A.weight, with the scale inside lora_B and no .alpha"
            )
    return f"adapt only layers inside {model.family.spec.blocks}"


def _check_strength(file: AdapterFile, programs: Sequence[Compatibility]) -> list[Problem]:
    loading = [program for program in programs if program.strengths]
    factors = {program.program: sorted(set(program.strengths.values())) for program in loading}
    rescaled = any(abs(factor - 1) > 1e-6 for found in factors.values() for factor in found)
    if file.metadata.get("crepatrain.scale") == "baked" and rescaled:
        return [
            Problem(
                f"the scale is inside lora_B already, and would be applied again: {_in_words(factors)}",
                "leave lora_adapter_metadata and .alpha out",
            )
        ]
    shared = set.intersection(*(set(program.strengths) for program in loading)) if len(loading) > 1 else set()
    if any(len({round(program.strengths[layer], 6) for program in loading}) > 1 for layer in shared):
        return [
            Problem(
                f"the programs apply it at different strengths: {_in_words(factors)}; ComfyUI never reads lora_adapter_metadata",
                "put the scale inside lora_B",
            )
        ]
    stated = file.metadata.get("ss_network_alpha"), file.metadata.get("ss_network_dim")
    try:
        alpha, rank = (float(value) for value in stated if value is not None)
    except ValueError:
        return []
    scaled = any(pair.alpha is not None for pair in file.pairs.values()) or "lora_adapter_metadata" in file.metadata
    if alpha != rank and not scaled:
        return [
            Problem(
                f"wrong strength: ss_network_alpha={alpha:g} of ss_network_dim={rank:g}, which no program reads, and no .alpha: "
                f"it would be applied at 1 instead of {alpha / rank:g}",
                "put the scale inside lora_B",
            )
        ]
    return []


def _in_words(factors: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(f"{program} at {' and '.join(f'{one:g}' for one in found)}" for program, found in factors.items())


@torch.no_grad()
def expect_same_adapter(path: Path, family: Family, transformer: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
    """Read a file that was just written, and compare it with the adapter that it was written from.

    The products lora_B lora_A are compared by their effect on a few random vectors, which takes no time.

    Args:
        transformer: with the adapter.
        weights: of the adapter, as every process has gathered them; None: those that the transformer holds.

    Raises:
        UserError: a program would not read all of it, or it is not that adapter.
    """
    live = live_adapter(transformer, weights=weights)
    file, model = read_adapter(path), Model(family, transformer, family.variant.title)
    problems = list(check_adapter(file, model, zero_is_wrong=False).problems)
    pairs = {model.find(pair): pair for pair in file.pairs.values()}
    missing, unexpected = sorted(live.keys() - pairs.keys()), sorted(str(name) for name in pairs.keys() - live.keys())
    if missing or unexpected:
        what = f"the file lacks {missing[:3]} of the adapter, and has {unexpected[:3]}, which the adapter does not have"
        problems.append(Problem(what, "report this as a bug"))
    generator = torch.Generator().manual_seed(0)
    for layer, (down, up, scale) in live.items():
        pair = pairs.get(layer)
        if pair is None or pair.down is None or pair.up is None:
            continue
        x = torch.randn(down.shape[1], 3, generator=generator)
        expected = scale * (up.cpu().float() @ (down.cpu().float() @ x))
        found = pair.up.float() @ (pair.down.float() @ x)
        if (found - expected).norm() > _TOLERANCE[pair.up.dtype] * expected.norm():
            name = str(pair.up.dtype).removeprefix("torch.")
            problems.append(Problem(f"{layer}: in {name} the file does not have the effect of the adapter", "use a wider dtype"))
            break
    if problems:
        raise UserError.of(problems)
