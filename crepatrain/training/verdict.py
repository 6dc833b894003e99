"""What is wrong with an adapter file: as a file, as an adapter of a model, and as what a run has just written."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from crepatrain.errors import Problem, UserError
from crepatrain.families.base import Family
from crepatrain.training.adapter_file import AdapterFile, Model, misfit, read_adapter
from crepatrain.training.lora import live_adapter, unknown_settings
from crepatrain.training.readers import Reading, of_pattern, read_as_comfyui, read_as_diffusers, told_settings

# What else keys end with, and what it is.
_STRANGERS = {
    "dora_scale": "DoRA's magnitudes, which diffusers drops",
    "lora_magnitude_vector": "DoRA's magnitudes, which ComfyUI does not read under this name",
    ".diff": "a whole difference of weights, which diffusers can't read",
    ".diff_b": "a bias, which one program reads and the other does not",
    ".bias": "a bias, which one program reads and the other does not",
    "hada_": "LoHa's factors",
    "lokr_": "LoKr's factors",
    "projector": "CREPA's projector, which no sampling needs",
}
# What a dtype's rounding may change of lora_B lora_A x.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a file.

    Attributes:
        readings: of every program that knows the family.
        problems: what would be ignored, or is wrong.
        notes: what should be known though nothing is wrong.
    """

    readings: tuple[Reading, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def judge(file: AdapterFile, model: Model, *, shapes: bool = True, zero_is_wrong: bool = True) -> Verdict:
    """Everything that is wrong with a file as an adapter of a model.

    Args:
        shapes: whether the model's shapes are those of the file's base.
        zero_is_wrong: whether an adapter that does nothing is a mistake; it is none of a run that has not begun.
    """
    problems = [*_check_tensors(file), *_check_pairs(file, model, shapes=shapes), *_check_expert(file)]
    notes = []
    zeros = [stem for stem, pair in file.pairs.items() if pair.up is not None and not pair.up.any()]
    if zeros and len(zeros) == len(file.pairs) and zero_is_wrong:
        problems.append(Problem("every lora_B is zero: the adapter does nothing", "take one of a later step"))
    elif zeros:
        notes.append(f"lora_B is zero in {len(zeros)} of {len(file.pairs)} layers, such as {zeros[0]}: they do nothing")
    try:
        readings = tuple(filter(None, (read_as_diffusers(file, model), read_as_comfyui(file, model))))
        problems += _check_settings(file, model)
    except UserError as error:
        return Verdict((), (*problems, *error.problems), tuple(notes))
    for reading in readings:
        problems += _check_reading(reading, file, model)
    problems += _check_strength(file, readings)
    if "comfyui" not in {reading.program.lower() for reading in readings}:
        notes.append(f"ComfyUI has no {model.family.spec.title}: the file is for diffusers")
    return Verdict(readings, tuple(problems), tuple(notes))


def _check_tensors(file: AdapterFile) -> list[Problem]:
    problems = []
    for word, meaning in _STRANGERS.items():
        keys = [key for key in file.strangers if word in key]
        if keys:
            problems.append(Problem(f"{len(keys)} keys such as {keys[0]} are {meaning}", "export a plain LoRA, without them"))
    rest = [key for key in file.strangers if not any(word in key for word in _STRANGERS)]
    if rest:
        problems.append(Problem(f"{len(rest)} keys such as {rest[0]} are no part of a LoRA", "leave them out"))
    infinite = [key for key, tensor in file.tensors.items() if not tensor.isfinite().all()]
    if infinite:
        fix = "take one of an earlier step, or in a wider dtype"
        problems.append(Problem(f"{len(infinite)} tensors such as {infinite[0]} hold what is not finite", fix))
    return problems


def _check_pairs(file: AdapterFile, model: Model, *, shapes: bool) -> list[Problem]:
    problems = []
    halves = [stem for stem, pair in file.pairs.items() if pair.down is None or pair.up is None]
    if halves:
        missing = "lora_A" if file.pairs[halves[0]].down is None else "lora_B"
        problems.append(Problem(f"{len(halves)} layers such as {halves[0]} lack {missing}", "write the file again"))
    for stem, pair in file.pairs.items():
        if pair.down is not None and pair.up is not None and pair.down.shape[0] != pair.up.shape[1]:
            what = f"{stem}: lora_A is of rank {pair.down.shape[0]} and lora_B of rank {pair.up.shape[1]}"
            problems.append(Problem(what, "write the file again"))
    meant = Counter(layer for pair in file.pairs.values() if (layer := model.find(pair)))
    twice = [layer for layer, times in meant.items() if times > 1]
    if twice:
        problems.append(Problem(f"{len(twice)} layers such as {twice[0]} are there twice, under two names", "keep one of them"))
    if shapes:
        found = ((stem, model.find(pair), pair) for stem, pair in file.pairs.items())
        wrong = [(stem, why) for stem, layer, pair in found if layer and (why := misfit(pair, model.layers[layer]))]
        if wrong:
            stem, why = wrong[0]
            problems.append(
                Problem(
                    f"{len(wrong)} layers don't fit {model.title}, such as {stem}: {why}", "give the base that it was made for"
                )
            )
    return problems


def _check_expert(file: AdapterFile) -> list[Problem]:
    """Both experts of Wan 2.2 A14B have the same shapes, so nothing but a word tells them apart."""
    said = file.metadata.get("crepatrain.expert")
    named = next((expert for expert in ("high", "low") if f"{expert}_noise" in file.path.name), None)
    if said and named and said != named:
        what = f"{file.path.name} is named after the {named}-noise expert, and was trained for the {said}-noise one"
        return [Problem(what, "rename it: in the other transformer it loads without a word and is wrong")]
    return []


def _check_settings(file: AdapterFile, model: Model) -> list[Problem]:
    settings = file.settings
    if settings is None:
        return []
    told = told_settings(settings)
    fix = "write lora_adapter_metadata anew, or leave it out"
    strange = unknown_settings(told)
    problems = []
    if not told:
        problems.append(Problem("no key of lora_adapter_metadata begins with transformer.: diffusers raises KeyError", fix))
    elif "target_modules" not in told:
        problems.append(Problem("lora_adapter_metadata names no target_modules: diffusers raises KeyError", fix))
    if strange:
        problems.append(Problem(f"lora_adapter_metadata has keys that peft does not know: {', '.join(sorted(strange))}", fix))
    for stem, pair in file.pairs.items():
        layer = model.find(pair)
        rank = of_pattern(told.get("rank_pattern"), layer or "", told.get("r", 8))
        if layer and pair.rank is not None and pair.rank != rank:
            problems.append(Problem(f"{stem} is of rank {pair.rank}, and lora_adapter_metadata says {rank}", fix))
            break
    return problems


def _check_reading(reading: Reading, file: AdapterFile, model: Model) -> list[Problem]:
    if reading.refusal:
        return [Problem(f"{reading.program} refuses the file: {reading.refusal}", _as_exported(file, model))]
    return [
        Problem(
            f"{reading.program} ignores {len(stems)} of {len(file.pairs)} layers, such as {stems[0]}: {why}",
            _as_exported(file, model),
        )
        for why, stems in reading.ignored.items()
    ]


def _as_exported(file: AdapterFile, model: Model) -> str:
    """How the keys should be."""
    for pair in file.pairs.values():
        layer = model.find(pair)
        if layer and layer.startswith(f"{model.family.spec.blocks}."):
            return (
                f"name the keys as in {model.family.export_name(layer)}.lora_A.weight, with the scale inside lora_B and no .alpha"
            )
    return f"adapt layers inside {model.family.spec.blocks} alone"


def _check_strength(file: AdapterFile, readings: Sequence[Reading]) -> list[Problem]:
    factors = {reading.program: sorted(set(reading.strengths.values())) for reading in readings if reading.strengths}
    flat = sorted({factor for found in factors.values() for factor in found})
    if file.metadata.get("crepatrain.scale") == "baked" and any(abs(factor - 1) > 1e-6 for factor in flat):
        return [
            Problem(
                f"the scale is inside lora_B already, and would be applied again: {_in_words(factors)}",
                "leave lora_adapter_metadata and .alpha out",
            )
        ]
    shared = [set(reading.strengths) for reading in readings if reading.strengths]
    both = set.intersection(*shared) if len(shared) > 1 else set()
    if any(len({round(reading.strengths[layer], 6) for reading in readings}) > 1 for layer in both):
        return [
            Problem(
                f"the programs apply it at different strengths: {_in_words(factors)}; ComfyUI never reads lora_adapter_metadata",
                "put the scale inside lora_B",
            )
        ]
    told = file.metadata.get("ss_network_alpha"), file.metadata.get("ss_network_dim")
    try:
        alpha, rank = (float(value) for value in told if value is not None)
    except ValueError:
        return []
    scaled = any(pair.alpha is not None for pair in file.pairs.values()) or file.settings is not None
    if alpha != rank and not scaled:
        return [
            Problem(
                f"wrong strength: ss_network_alpha={alpha:g} of ss_network_dim={rank:g}, where no reader looks, and no .alpha: "
                f"it would be applied at 1 instead of {alpha / rank:g}",
                "put the scale inside lora_B",
            )
        ]
    return []


def _in_words(factors: Mapping[str, Sequence[float]]) -> str:
    return ", ".join(f"{program} at {' and '.join(f'{one:g}' for one in found)}" for program, found in factors.items())


@torch.no_grad()
def expect_same_adapter(path: Path, family: Family, transformer: nn.Module) -> None:
    """Read a file that was just written, and hold it against the adapter that it was written from.

    The products lora_B lora_A are compared by what they make of a few random vectors, which takes no time.

    Args:
        transformer: with the adapter.

    Raises:
        UserError: a program would not read all of it, or it is not that adapter.
    """
    live = live_adapter(transformer)
    file, model = read_adapter(path), Model(family, transformer, family.variant.title)
    problems = list(judge(file, model, zero_is_wrong=False).problems)
    pairs = {model.find(pair): pair for pair in file.pairs.values()}
    lost, strange = sorted(live.keys() - pairs.keys()), sorted(str(name) for name in pairs.keys() - live.keys())
    fix = "report it"
    if lost or strange:
        problems.append(Problem(f"the file lacks {lost[:3]} of the adapter, and has {strange[:3]} that it has not", fix))
    generator = torch.Generator().manual_seed(0)
    for layer, (down, up, scale) in live.items():
        pair = pairs.get(layer)
        if pair is None or pair.down is None or pair.up is None:
            continue
        x = torch.randn(down.shape[1], 3, generator=generator)
        wanted = scale * (up.float().cpu() @ (down.float().cpu() @ x))
        found = pair.up.float() @ (pair.down.float() @ x)
        if (found - wanted).norm() > _TOLERANCE[pair.up.dtype] * wanted.norm():
            name = str(pair.up.dtype).removeprefix("torch.")
            problems.append(Problem(f"{layer}: {name} does not hold what the adapter does", "use a wider dtype"))
            break
    if problems:
        raise UserError.of(problems)
