"""Adapters added into a transformer's own weights."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crepatrain.commands.export import write_transformer
from crepatrain.config.sources import fetch, read_checkpoint
from crepatrain.config.specs import FAMILIES
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.families import get_family
from crepatrain.training.adapter_file import AdapterFile, Model, Pair, misfit, read_adapter, recognise

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
    if len(strengths) != len(adapters):
        raise UserError(f"--strength: {len(strengths)} for {len(adapters)} adapters", "give one for each")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: there is something already", "give a new folder")
    files = [read_adapter(path) for path in adapters]
    recipe = files[0].recipe()
    name = recipe.get("family") or recognise(files[0])[0].family.spec.name
    checkpoint, variant = read_checkpoint(base, None, FAMILIES[name], recipe.get("expert"), online=True)
    folder = fetch("pretrained_model_name_or_path", base, None, ("model_index.json", f"{variant.transformer}/*"))
    family = get_family(name, checkpoint, expert=recipe.get("expert"))
    screen.say(f"loading the transformer of {base}")
    transformer = family.load_transformer(str(folder), torch.float32)
    model, kind = Model(family, transformer, base), getattr(torch, dtype)
    before: dict[str, Tensor] = {}
    for file, strength in zip(files, strengths, strict=True):
        _add(file, strength, model, transformer, before, kind)
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


@torch.no_grad()
def _add(
    file: AdapterFile, strength: float, model: Model, transformer: nn.Module, before: dict[str, Tensor], kind: torch.dtype
) -> None:
    """Add one adapter; `before` gets the weights that a layer had at first, as they would be cast."""
    modules: Mapping[str, Any] = dict(transformer.named_modules())
    for pair in file.pairs.values():
        layer = model.find(pair)
        if layer is None:
            raise UserError(f"{file.path}: {pair.name} is no layer of {model.title}", "give the base that it was trained on")
        reason = misfit(pair, model.layers[layer]) or ("one half of it is missing" if None in (pair.down, pair.up) else None)
        if reason:
            raise UserError(f"{file.path}: {layer}: {reason}", "give the base that it was trained on")
        weight = modules[layer].weight
        before.setdefault(layer, weight.detach().to(kind).clone())
        weight.add_(_delta(pair).view_as(weight) * strength)


def _delta(pair: Pair) -> Tensor:
    """What a pair adds at strength 1; without an alpha that is taken as the rank."""
    assert pair.down is not None
    assert pair.up is not None
    scale = 1.0 if pair.alpha is None else pair.alpha / pair.down.shape[0]
    return pair.up.float().flatten(1) @ pair.down.float().flatten(1) * scale
