"""Merging adapters into a transformer's own weights."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from crepatrain.adapters.adapter_file import Model, read_adapter
from crepatrain.adapters.merging import add_adapters, common_target, load_all_scaled
from crepatrain.adapters.writing import write_transformer
from crepatrain.config.sources import fetch, read_checkpoint
from crepatrain.errors import UserError
from crepatrain.families import get_family
from crepatrain.outputs import expect_nothing_at, expect_writable
from crepatrain.screen import Screen
from crepatrain.specs import FAMILIES

# From this share of unchanged weights on, a note says that the merge has lost much of the adapter.
_MUCH = 0.5


def merge(
    base: str, adapters: Sequence[Path], strengths: Sequence[float], output: Path, dtype: str, screen: Screen
) -> dict[str, float]:
    """Write a base's transformer with adapters added to it, in fp32 until the final cast.

    Args:
        base: diffusers pipeline folder or hub id.
        strengths: one for each adapter.
        output: a new folder.
        dtype: of the weights on the disk.

    Returns:
        Per adapted layer the share of weights that the cast leaves as they were.

    Raises:
        UserError: an adapter is not for this base, or something can't be read or written.
    """
    _check_strengths(strengths, adapters)
    expect_nothing_at(output, "--output")
    expect_writable(output)
    files = [read_adapter(path) for path in adapters]
    name, expert = common_target(files)
    checkpoint, variant = read_checkpoint(base, None, FAMILIES[name], expert, online=True, key="base")
    family = get_family(name, checkpoint, expert=expert)
    loaded = load_all_scaled(files, Model(family, family.empty_transformer(), base))
    folder = fetch("base", base, None, ("model_index.json", f"{variant.transformer}/*"))
    screen.say(f"loading the transformer of {base}")
    transformer = family.load_transformer(str(folder), torch.float32)
    unchanged = add_adapters(transformer, loaded, strengths, getattr(torch, dtype))
    write_transformer(output / variant.transformer, transformer, getattr(torch, dtype))
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
    infinite = [strength for strength in strengths if not math.isfinite(strength)]
    if infinite:
        raise UserError(f"--strength: {infinite[0]} is not a finite number", "give numbers such as 0.8")
