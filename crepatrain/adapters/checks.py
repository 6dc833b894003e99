"""What is wrong with an adapter file: as a file, as an adapter of a model, and as what a run has just written."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from crepatrain.adapters.adapter_file import AdapterFile, Model, misfit, read_adapter
from crepatrain.adapters.compatibility import DAMAGE, Reading, read_as_comfyui, read_as_diffusers
from crepatrain.errors import Problem, UserError
from crepatrain.families.base import Family
from crepatrain.specs import FAMILIES
from crepatrain.training.lora import live_adapter

# What else keys hold, or after a dot end with, and what it is.
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
    problems = _check_damage(file, model, shapes=shapes)
    notes = []
    zeros = [stem for stem, pair in file.pairs.items() if pair.up is not None and pair.up.numel() and not pair.up.float().any()]
    if zeros and len(zeros) == len(file.pairs) and zero_is_wrong:
        problems.append(Problem("every lora_B is zero: the adapter does nothing", "take one of a later step"))
    elif zeros:
        notes.append(f"lora_B is zero in {len(zeros)} of {len(file.pairs)} layers, such as {zeros[0]}: they do nothing")
    readings = [read_as_diffusers(file, model, shapes=shapes)]
    comfyui = read_as_comfyui(file, model, shapes=shapes)
    if comfyui:
        readings.append(comfyui)
    else:
        notes.append(f"ComfyUI has no {model.family.spec.title}: the file is for diffusers")
    for reading in readings:
        problems += _check_reading(reading, file, model)
    problems += _check_strength(file, readings)
    return Verdict(tuple(readings), tuple(problems), tuple(notes))


def take_in(file: AdapterFile, model: Model, said: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Per layer lora_A [r, in] and lora_B [out, r], or of a convolution, in fp32; what diffusers scales them by inside lora_B.

    A file that diffusers does not read is taken at the scale of its .alpha, as ComfyUI takes it.

    Args:
        said: what messages call the file.

    Raises:
        UserError: with everything for which it can't be taken whole.
    """
    problems = [*_check_layers(file, model), *_check_damage(file, model, shapes=True)]
    reading = read_as_diffusers(file, model)
    if "lora_adapter_metadata" in file.metadata and (reading.refusal or reading.ignored) and not problems:
        what = f"its strength can't be told, as lora_adapter_metadata is there and diffusers {reading.in_words}"
        problems.append(Problem(what, "put the scale inside lora_B, and leave lora_adapter_metadata out"))
    if problems:
        raise UserError.of([Problem(f"{said}: {problem.what}", problem.fix) for problem in problems])
    taken: dict[str, tuple[Tensor, Tensor]] = {}
    for pair in file.pairs.values():
        layer = model.find(pair)
        assert layer is not None
        assert pair.down is not None
        assert pair.up is not None
        taken[layer] = pair.down.float(), pair.up.float() * reading.strengths.get(layer, pair.told_scale)
    return taken


def adapter_to_begin_with(path: Path, family: Family, transformer: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """What `take_in` gives of init_adapter, for a run's own fresh adapter.

    Args:
        transformer: with the fresh adapter, on whatever device.

    Raises:
        UserError: the file can't be taken whole, or its layers or ranks are not those of the run.
    """
    said = f"init_adapter={path}"
    taken, live = take_in(read_adapter(path), Model(family, transformer, family.variant.title), said), live_adapter(transformer)
    strange, missing = sorted(taken.keys() - live.keys()), sorted(live.keys() - taken.keys())
    for names, what in ((strange, "is not in this run's lora_targets"), (missing, "is not in the file")):
        if names:
            raise UserError(f"{said}: {names[0]} {what} ({len(names)} in all)", "set lora_targets as it was")
    for layer, (down, _, _) in live.items():
        rank = taken[layer][0].shape[0]
        if rank != down.shape[0]:
            raise UserError(f"{said}: {layer} is of rank {rank}, and this run's of {down.shape[0]}", f"set lora_rank to {rank}")
    return taken


def _check_layers(file: AdapterFile, model: Model) -> list[Problem]:
    """Every layer of the file is one of the model."""
    family = file.recipe().get("family", model.family.spec.name)
    unknown = [stem for stem, pair in file.pairs.items() if model.find(pair) is None]
    if family != model.family.spec.name or len(unknown) == len(file.pairs):
        made = FAMILIES[family].title if family != model.family.spec.name else "another model"
        return [Problem(f"it is no adapter of {model.title}, but of {made}", "give one of this model")]
    if unknown:
        what = f"{len(unknown)} of {len(file.pairs)} layers, such as {unknown[0]}, are none of {model.title}"
        return [Problem(what, "give one of this model")]
    return []


def _check_damage(file: AdapterFile, model: Model, *, shapes: bool) -> list[Problem]:
    """What is wrong with a file whoever reads it."""
    return [*_check_tensors(file), *_check_pairs(file, model, shapes=shapes), *_check_expert_words(file)]


def _check_tensors(file: AdapterFile) -> list[Problem]:
    problems = [] if file.pairs else [Problem("it holds no layer of a LoRA", "give the file of an adapter")]
    meanings = {key: next((word for word in _STRANGERS if _holds(key, word)), "") for key in file.strangers}
    for word in dict.fromkeys(meanings.values()):
        keys = [key for key, found in meanings.items() if found == word]
        what = f"{len(keys)} keys such as {keys[0]} are {_STRANGERS.get(word, 'no part of a LoRA')}"
        problems.append(Problem(what, "export a plain LoRA, without them"))
    infinite = [key for key, tensor in file.tensors.items() if not tensor.float().isfinite().all()]
    if infinite:
        fix = "take one of an earlier step, or in a wider dtype"
        problems.append(Problem(f"{len(infinite)} tensors such as {infinite[0]} hold what is not finite", fix))
    whole = [key for key, tensor in file.tensors.items() if not key.endswith(".alpha") and not tensor.is_floating_point()]
    if whole:
        dtype = str(file.tensors[whole[0]].dtype).removeprefix("torch.")
        what = f"{len(whole)} tensors such as {whole[0]} are {dtype}, and a LoRA is of floating-point numbers"
        problems.append(Problem(what, "save it in bfloat16"))
    return problems


def _holds(key: str, word: str) -> bool:
    return key.endswith(word) if word.startswith(".") else word in key


def _check_pairs(file: AdapterFile, model: Model, *, shapes: bool) -> list[Problem]:
    problems = []
    halves = [stem for stem, pair in file.pairs.items() if not pair.whole]
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
            problems.append(Problem(f"{stem}: lora_A is of {down} and lora_B of {up}", "write the file again"))
        elif not pair.rank:
            problems.append(Problem(f"{stem} is of rank 0", "leave the layer out"))
    meant = Counter(layer for pair in file.pairs.values() if (layer := model.find(pair)))
    twice = [layer for layer, times in meant.items() if times > 1]
    if twice:
        problems.append(Problem(f"{len(twice)} layers such as {twice[0]} are there twice, under two names", "keep one of them"))
    if shapes:
        found = ((stem, model.find(pair), pair) for stem, pair in file.pairs.items())
        wrong = [(stem, why) for stem, layer, pair in found if layer and (why := misfit(pair, model.layers[layer]))]
        if wrong:
            what = f"{len(wrong)} layers don't fit {model.title}, such as {wrong[0][0]}: {wrong[0][1]}"
            problems.append(Problem(what, "give the base that it was made for"))
    return problems


def check_expert(file: AdapterFile, base: Model) -> list[Problem]:
    """An adapter of one of two experts is for a base that has two."""
    if file.expert and base.family.variant.expert is None:
        what = f"it is for the {file.expert}-noise expert of two, and {base.title} has one transformer"
        return [Problem(what, "give its own base")]
    return []


def _check_expert_words(file: AdapterFile) -> list[Problem]:
    """Both experts of Wan 2.2 A14B have the same shapes, so nothing but a word tells them apart."""
    told = file.experts
    if len(set(told.values())) > 1:
        name, header = told["name"], told["header"]
        what = f"{file.path.name} is named after the {name}-noise expert, and was trained for the {header}-noise one"
        return [Problem(what, "rename it: in the other transformer it loads without a word and is wrong")]
    return []


def _check_reading(reading: Reading, file: AdapterFile, model: Model) -> list[Problem]:
    if reading.refusal:
        return [Problem(f"{reading.program} refuses the file: {reading.refusal}", reading.remedy or _as_exported(file, model))]
    return [
        Problem(
            f"{reading.program} ignores {len(stems)} of {len(file.pairs)} layers, such as {stems[0]}: {why}",
            _as_exported(file, model),
        )
        for why, stems in reading.ignored.items()
        if why not in DAMAGE  # told of the file
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
    scaled = any(pair.alpha is not None for pair in file.pairs.values()) or "lora_adapter_metadata" in file.metadata
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
