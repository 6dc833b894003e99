"""Adapter files that diffusers loads, and ComfyUI too where it knows the family."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

import crepatrain
from crepatrain.families.base import Family
from crepatrain.training.checkpoint import replace_file
from crepatrain.training.lora import baked_adapter


def write_adapter(paths: Sequence[Path], family: Family, transformer: nn.Module, step: int) -> None:
    """Write the adapter with its scale baked in, so that every reader takes it at strength 1.

    Args:
        paths: of the safetensors files, all the same; each is written aside and renamed.
        step: optimizer steps behind it.
    """
    tensors: dict[str, Tensor] = {}
    for module, (lora_a, lora_b) in baked_adapter(transformer).items():
        name = family.export_name(module)
        tensors[f"{name}.lora_A.weight"] = lora_a
        tensors[f"{name}.lora_B.weight"] = lora_b
    # No rank or alpha here: readers infer the rank and take alpha as equal to it, which is what baking means.
    metadata = {
        "format": "pt",
        "crepatrain.version": crepatrain.__version__,
        "crepatrain.step": str(step),
        "crepatrain.scale": "baked",
    }
    for path in paths:
        replace_file(path, tensors, metadata)
