"""Writing the result of a run: adapter files that every program reads, or a whole transformer."""

import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from crepatrain.adapters.checks import expect_same_adapter
from crepatrain.adapters.recipe import adapter_metadata
from crepatrain.errors import Problem, UserError
from crepatrain.families.base import Family
from crepatrain.files import share
from crepatrain.integrity import LISTED_KEY, MANIFEST_FORMAT, write_manifest
from crepatrain.placement.precision import compute_dtype
from crepatrain.records.opening import adapter_name
from crepatrain.records.runfolder import RunFolder
from crepatrain.training.checkpoint import replace_file
from crepatrain.training.lora import live_adapter
from crepatrain.training.tensor_files import write_tensors

_SHARD = "diffusion_pytorch_model{suffix}.safetensors"
_SHARD_SIZE = "5GB"


def write_result(
    folder: RunFolder,
    family: Family,
    fingerprint: Mapping[str, Any],
    transformer: Any,
    step: int,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter, once for this step and once as the run's last; or the whole transformer, only as the run's last.

    Args:
        weights: what `trained_state` gave, gathered from every process; None: what the transformer holds.

    Raises:
        UserError: the disk is full, or a program would not read the file that was written as this adapter.
    """
    config = folder.config
    if config.model.model_type == "full":
        write_transformer(
            folder.result_transformer(family.variant.transformer), transformer, compute_dtype(config.loop), weights=weights
        )
        return
    small = folder.adapter(adapter_name(config.loop, family), step)
    layers = list(live_adapter(transformer))
    metadata = adapter_metadata(
        config, family, fingerprint, step, layers=layers, day=datetime.now(UTC).date(), averaged=config.optim.use_ema
    )
    write_adapter([small, folder.result_adapter], family, transformer, metadata, weights=weights)


def write_adapter(
    paths: Sequence[Path],
    family: Family,
    transformer: nn.Module,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter with its scale baked in, so that every program applies it at strength 1.

    Args:
        paths: of equal safetensors files, each written aside and renamed; the first is read back before that.
        metadata: their header.
        dtype: of the tensors on the disk.
        weights: what `trained_state` gave, gathered from every process; None: what the transformer holds.

    Raises:
        UserError: the disk is full, or a program would not read the file that was written as this adapter.
    """
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for module, (lora_a, lora_b, scale) in live_adapter(transformer, weights=weights).items():
        name = family.export_name(module)
        tensors[f"{name}.lora_A.weight"] = lora_a
        tensors[f"{name}.lora_B.weight"] = lora_b
        scales[f"{name}.lora_B.weight"] = scale

    def bake(name: str, tensor: Tensor) -> Tensor:
        return tensor.float() * scales[name] if name in scales else tensor

    def check(aside: Path) -> None:
        try:
            expect_same_adapter(aside, family, transformer, weights)
        except UserError as error:
            fix = "report this as a bug; the file that was there before is untouched"
            raise UserError.of([*error.problems, Problem(f"{paths[-1]} was not written", fix)]) from error

    first, *others = paths
    replace_file(first, tensors, metadata, check, dtype=dtype, change=bake)
    for path in others:
        replace_file(path, tensors, metadata, dtype=dtype, change=bake)


def write_single_file(path: Path, family: Family, transformer: nn.Module, names: Mapping[str, str], dtype: torch.dtype) -> None:
    """Write a whole transformer as one file, under the original's names, without a prefix.

    Args:
        names: of diffusers -> of the original.

    Raises:
        UserError: the disk is full or can't be written to.
    """
    state = transformer.state_dict()
    tensors = {names[name]: tensor for name, tensor in state.items()}
    assert len(tensors) == len(state)

    def check(aside: Path) -> None:
        with safe_open(aside, framework="pt") as file:
            found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - it is no dict
        assert found == {key: list(tensor.shape) for key, tensor in tensors.items()}

    replace_file(path, tensors, {"format": "pt", **family.original_metadata()}, check, dtype=dtype)


def write_transformer(folder: Path, transformer: Any, dtype: torch.dtype, *, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write a transformer's folder as a diffusers pipeline has it, with a manifest of its files.

    Args:
        folder: replaced when the new one is complete.
        dtype: of the weights on the disk.
        weights: by name, gathered from every process; None: what the transformer holds.

    Raises:
        UserError: the disk is full or can't be written to.
    """
    aside, old = (folder.with_name(f"{folder.name}.{word}") for word in ("tmp", "old"))
    try:
        for left in (aside, old):
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
        transformer.save_config(aside)
        _write_shards(aside, weights or transformer.state_dict(), dtype)
        write_manifest(aside)
        for file in aside.iterdir():
            share(file)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"{folder} can't be written ({error})", "free disk space, or fix its permissions; checkpoints are untouched"
        ) from error


def _write_shards(folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write a transformer's weights in one file, or in several with an index, by the names that diffusers looks for."""
    # Only sizes matter to the split: the tensors stay where they are until each is written.
    sizes = {name: torch.empty_like(tensor, dtype=dtype, device="meta") for name, tensor in weights.items()}
    split = split_torch_state_dict_into_shards(sizes, filename_pattern=_SHARD, max_shard_size=_SHARD_SIZE)
    metadata = {"format": "pt", LISTED_KEY: str(MANIFEST_FORMAT)}
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: weights[name] for name in names}, metadata, dtype=dtype)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{_SHARD.format(suffix='')}.index.json").write_text(text, encoding="utf-8")
