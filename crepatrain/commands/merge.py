"""Adapters added into a transformer's own weights."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crepatrain.adapters.adapter_file import AdapterFile, Model, read_adapter, recognise
from crepatrain.adapters.checks import check_expert, take_in
from crepatrain.adapters.writing import write_transformer
from crepatrain.config.sources import fetch, read_checkpoint
from crepatrain.errors import Problem, UserError
from crepatrain.families import get_family
from crepatrain.outputs import expect_nothing_at, expect_writable
from crepatrain.screen import Screen
from crepatrain.specs import FAMILIES, Expert

# From this share of unchanged weights on, a merge has lost something that is worth a word.
_MUCH = 0.5


def merge(
    base: str, adapters: Sequence[Path], strengths: Sequence[float], output: Path, dtype: str, screen: Screen
) -> dict[str, float]:
    """Write a base's transformer with adapters added to it, in fp32 until the last cast.

    Args:
        base: diffusers pipeline folder or hub id.
        strengths: of each adapter.
        output: a new folder.
        dtype: of the weights on the disk.

    Returns:
        Per adapted layer the share of weights that the cast leaves as they were.

    Raises:
        UserError: an adapter is not of this base, or something can't be read or written.
    """
    _check_strengths(strengths, adapters)
    expect_nothing_at(output)
    expect_writable(output)
    files = [read_adapter(path) for path in adapters]
    name, expert = _meant_for(files)
    checkpoint, variant = read_checkpoint(base, None, FAMILIES[name], expert, online=True, key="base")
    family = get_family(name, checkpoint, expert=expert)
    taken = _take_in_all(files, Model(family, family.empty_transformer(), base))
    folder = fetch("base", base, None, ("model_index.json", f"{variant.transformer}/*"))
    screen.say(f"loading the transformer of {base}")
    transformer, kind = family.load_transformer(str(folder), torch.float32), getattr(torch, dtype)
    before: dict[str, Tensor] = {}
    for adapter, strength in zip(taken, strengths, strict=True):
        _add(adapter, strength, transformer, before, kind)
    modules = dict(transformer.named_modules())
    unchanged = {layer: (modules[layer].weight.to(kind) == old).float().mean().item() for layer, old in before.items()}
    write_transformer(output / variant.transformer, transformer, kind)
    merged = [
        {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "strength": strength}
        for path, strength in zip(adapters, strengths, strict=True)
    ]
    (output / "merged_from.json").write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")
    share = sum(unchanged.values()) / len(unchanged)
    screen.rows(
        "merged",
        [
            ("transformer", str(output / variant.transformer)),
            ("layers", str(len(unchanged))),
            (f"weights that {dtype} leaves as they were", f"{share:.1%}"),
        ],
    )
    if share > _MUCH:
        screen.note(f"much of the adapter is lost in {dtype}: load it beside the base, or merge with --dtype float32")
    return unchanged


def _check_strengths(strengths: Sequence[float], adapters: Sequence[Path]) -> None:
    if len(strengths) != len(adapters):
        raise UserError(f"--strength: {len(strengths)} for {len(adapters)} adapters", "give one for each")
    endless = [strength for strength in strengths if not math.isfinite(strength)]
    if endless:
        raise UserError(f"--strength: {endless[0]} is no finite number", "give numbers such as 0.8")


def _meant_for(files: Sequence[AdapterFile]) -> tuple[str, Expert | None]:
    """The family and the expert that all files are for.

    Raises:
        UserError: they are not for the same, or a file is of no family.
    """
    families: dict[str, Path] = {file.recipe().get("family") or recognise(file)[0].family.spec.name: file.path for file in files}
    if len(families) > 1:
        what = " and ".join(f"{path} of {FAMILIES[name].title}" for name, path in families.items())
        raise UserError(f"the adapters are of several models: {what}", "merge those of one model")
    experts: dict[Expert, Path] = {file.expert: file.path for file in files if file.expert}
    if len(experts) > 1:
        what = " and ".join(f"{path} for the {expert}-noise expert" for expert, path in experts.items())
        raise UserError(f"the adapters are for both experts: {what}", "merge those of each expert by themselves")
    return next(iter(families)), next(iter(experts), None)


def _take_in_all(files: Sequence[AdapterFile], model: Model) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Every file by layers, where all of them are whole and of this base.

    Raises:
        UserError: with everything for which one of them is not.
    """
    taken, problems = [], []
    for file in files:
        problems += [Problem(f"{file.path}: {problem.what}", problem.fix) for problem in check_expert(file, model)]
        if model.family.variant.expert and not file.expert:
            what = f"{file.path}: nothing says for which of the two experts of {model.title} it is"
            problems.append(Problem(what, "end its name in high_noise or low_noise"))
        try:
            taken.append(take_in(file, model, str(file.path)))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError.of(problems)
    return taken


@torch.no_grad()
def _add(
    adapter: Mapping[str, tuple[Tensor, Tensor]],
    strength: float,
    transformer: nn.Module,
    before: dict[str, Tensor],
    kind: torch.dtype,
) -> None:
    """Add one adapter; `before` gets the weights that a layer had at first, as they would be cast."""
    modules: Mapping[str, Any] = dict(transformer.named_modules())
    for layer, (down, up) in adapter.items():
        weight = modules[layer].weight
        before.setdefault(layer, weight.detach().to(kind).clone())
        weight.add_((up.flatten(1) @ down.flatten(1)).view_as(weight) * strength)
