"""What a run hands out: adapter files that diffusers loads, and ComfyUI too where it knows the family, or a whole transformer."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

import crepatrain
from crepatrain.commands.runfolder import ADAPTER_FILE, RunFolder
from crepatrain.config.sections import RunConfig
from crepatrain.errors import UserError
from crepatrain.families.base import Family
from crepatrain.training.build import compute_dtype
from crepatrain.training.checkpoint import replace_file
from crepatrain.training.lora import baked_adapter


def write_result(folder: RunFolder, config: RunConfig, family: Family, transformer: Any, step: int) -> None:
    """The adapter, once for this step and once as the run's last; or the whole transformer, as the run's last alone."""
    if config.model_type == "full":
        write_transformer(folder.root / family.variant.transformer, transformer, compute_dtype(config))
        return
    expert = f"_{family.variant.expert}_noise" if family.variant.expert else ""
    small = folder.adapters / f"{config.output_name}{expert}-{step:06d}.safetensors"
    write_adapter([small, folder.root / ADAPTER_FILE], family, transformer, step)


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
    if family.variant.expert:
        metadata["crepatrain.expert"] = family.variant.expert
    for path in paths:
        replace_file(path, tensors, metadata)


def write_transformer(folder: Path, transformer: Any, dtype: torch.dtype) -> None:
    """Write a transformer's folder as a diffusers pipeline has it.

    Args:
        folder: replaced when the new one is whole.
        dtype: of the weights on the disk.

    Raises:
        UserError: the disk is full or can't be written to.
    """
    aside, old = (folder.with_name(f"{folder.name}.{word}") for word in ("tmp", "old"))
    try:
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
        transformer.save_config(aside)
        state = {name: tensor.detach().to("cpu", dtype) for name, tensor in transformer.state_dict().items()}
        save_torch_state_dict(state, aside, filename_pattern="diffusion_pytorch_model{suffix}.safetensors", max_shard_size="5GB")
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder} can't be written ({error})", "free disk space; checkpoints are untouched") from error
