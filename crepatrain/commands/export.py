"""What a run hands out: adapter files that diffusers loads, and ComfyUI too where it knows the family, or a whole transformer."""

import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from crepatrain.commands.outputs import expect_nothing_at
from crepatrain.commands.runfolder import ADAPTER_FILE, RunFolder, adapter_name, config_of, family_of
from crepatrain.config.sections import RunConfig
from crepatrain.console import Screen
from crepatrain.errors import Problem, UserError
from crepatrain.families.base import Family
from crepatrain.files import share
from crepatrain.training.adapter_file import AdapterFile, Model, read_adapter
from crepatrain.training.build import compute_dtype
from crepatrain.training.checkpoint import EMA_FILE, TRAINED_FILE, checkpoints, read_plain, read_tensors, replace_file, step_of
from crepatrain.training.lora import add_lora, baked_adapter, live_adapter, load_trained_state, put_on_cpu, target_modules
from crepatrain.training.readers import how_to_load
from crepatrain.training.recipe import adapter_metadata
from crepatrain.training.verdict import expect_same_adapter


def export(
    run: Path, step: int | None, dtype: str | None, output: Path | None, screen: Screen, *, weights: str | None = None
) -> None:
    """Write the result of one of a run's checkpoints anew.

    Args:
        run: the run's folder.
        step: None: the last one.
        dtype: of the tensors; None: of an adapter float32, of a whole transformer what the run computed in.
        weights: raw or ema; None: the average where the run kept one.
        output: a new file of an adapter, or a new folder of a whole transformer; None: in RUN/exports.

    Raises:
        UserError: there is no such run or step, its base is gone, or the disk is full.
    """
    config = config_of(run)
    family = family_of(config)
    folder = RunFolder(config.model_copy(update={"output_dir": str(run)}))
    found = {step_of(path): path for path in checkpoints(folder.checkpoints)}
    name = adapter_name(config, family)
    small = {} if config.model_type == "full" else _small_adapters(folder, name)
    steps = sorted(found.keys() | small.keys())
    chosen = step if step is not None else max(found or small, default=None)
    if chosen is None or chosen not in steps:
        what = f"{run}: it holds no checkpoint" + (f" of step {step}" if step is not None else "")
        raise UserError(what, f"use one of {', '.join(map(str, steps))}" if steps else "train first")
    if weights == "ema" and not config.use_ema:
        raise UserError(f"--weights ema: {run} kept no average", "leave it out, or train with use_ema")
    average = config.use_ema and weights != "raw"
    kind = getattr(torch, dtype) if dtype else torch.float32 if config.model_type == "lora" else compute_dtype(config)
    whose = "" if not config.use_ema else "-ema" if average else "-raw"
    default = run / "exports" / f"{name}-{chosen:06d}{whose}-{str(kind).removeprefix('torch.')}"
    if output:
        expect_nothing_at(output)
    if config.model_type == "full":
        tensors = read_tensors(found[chosen], EMA_FILE if average else TRAINED_FILE["full"])
        _export_transformer(output or default, f"{name}-{chosen:06d}", family, tensors, kind, screen)
        return
    path = output or default.with_name(f"{default.name}.safetensors")
    if path.suffix != ".safetensors":
        raise UserError(f"--output {path}: an adapter is a .safetensors file", "end its name in .safetensors")
    if chosen in found:
        tensors = read_tensors(found[chosen], EMA_FILE if average else TRAINED_FILE["lora"])
        transformer = _adapter_of_checkpoint(config, family, tensors)
        fingerprint, layers = read_plain(found[chosen], "fingerprint"), list(live_adapter(transformer))
        metadata = adapter_metadata(
            config, family, fingerprint, chosen, layers=layers, day=datetime.now(UTC).date(), averaged=average
        )
    elif config.use_ema and weights == "raw":
        raise UserError(f"--weights raw: the checkpoint of step {chosen} was rotated away", "only the average of it is left")
    else:
        screen.say(f"the checkpoint of step {chosen} was rotated away: taking {small[chosen]}")
        file = read_adapter(small[chosen])
        transformer, metadata = _adapter_of_file(family, file), file.metadata
    write_adapter([path], family, transformer, metadata, kind)
    screen.say(f"wrote {path}")
    for line in how_to_load(
        read_adapter(path), Model(family, transformer, family.variant.title), config.pretrained_model_name_or_path
    ):
        screen.say(line)


def _small_adapters(folder: RunFolder, name: str) -> dict[int, Path]:
    """The adapters that every checkpoint has left, by step."""
    found = ((path, path.stem.removeprefix(f"{name}-")) for path in folder.adapters.glob(f"{name}-*.safetensors"))
    return {int(step): path for path, step in found if step.isdigit()}


def _adapter_of_checkpoint(config: RunConfig, family: Family, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A transformer without weights, with the checkpoint's adapter on it."""
    assert config.lora_targets is not None
    assert config.lora_alpha is not None
    transformer = family.empty_transformer()
    modules = target_modules(transformer, config.lora_targets, family.spec)
    add_lora(
        transformer,
        modules,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=0.0,
        rslora=config.lora_use_rslora,
    )
    put_on_cpu(transformer)
    load_trained_state(transformer, tensors)
    return transformer


def _adapter_of_file(family: Family, file: AdapterFile) -> nn.Module:
    """A transformer without weights, with an exported adapter on it, whose scale is 1."""
    transformer = family.empty_transformer()
    model = Model(family, transformer, family.variant.title)
    layers = {layer: pair for pair in file.pairs.values() if (layer := model.find(pair))}
    rank = max(file.ranks)
    add_lora(transformer, list(layers), rank=rank, alpha=float(rank), dropout=0.0)
    put_on_cpu(transformer)
    for layer, (down, up, _) in live_adapter(transformer).items():
        pair = layers[layer]
        assert pair.down is not None
        assert pair.up is not None
        down.copy_(pair.down)
        up.copy_(pair.up)
    return transformer


def _export_transformer(
    folder: Path, name: str, family: Family, tensors: Mapping[str, Tensor], dtype: torch.dtype, screen: Screen
) -> None:
    """The transformer's folder as diffusers has it, and one file with the original's names where the family has them."""
    transformer = family.empty_transformer()
    transformer.load_state_dict(tensors, assign=True)
    write_transformer(folder / family.variant.transformer, transformer, dtype)
    screen.say(f"wrote {folder / family.variant.transformer}, for the pipeline folder of diffusers")
    path = folder / f"{name}.safetensors"
    try:
        names = {name: family.original_name(name) for name in transformer.state_dict()}
    except UserError as error:
        screen.note(f"no single file beside it: {error.problems[0].what}")
        return
    write_single_file(path, family, transformer, names, dtype)
    screen.say(f"wrote {path}, for ComfyUI's models/diffusion_models")


def write_single_file(path: Path, family: Family, transformer: nn.Module, names: Mapping[str, str], dtype: torch.dtype) -> None:
    """Write a whole transformer as one file, under the original's names, without a prefix.

    Args:
        names: of diffusers -> of the original.

    Raises:
        UserError: the disk is full or can't be written to.
    """
    state = transformer.state_dict()
    tensors = {names[name]: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    assert len(tensors) == len(state)

    def check(aside: Path) -> None:
        with safe_open(aside, framework="pt") as file:
            found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - it is no dict
        assert found == {key: list(tensor.shape) for key, tensor in tensors.items()}

    replace_file(path, tensors, {"format": "pt", **family.original_metadata()}, check)


def write_result(
    folder: RunFolder, config: RunConfig, family: Family, fingerprint: Mapping[str, Any], transformer: Any, step: int
) -> None:
    """The adapter, once for this step and once as the run's last; or the whole transformer, as the run's last alone.

    Raises:
        UserError: the disk is full, or the file that was written is not what every program would read as the adapter.
    """
    if config.model_type == "full":
        write_transformer(folder.root / family.variant.transformer, transformer, compute_dtype(config))
        return
    small = folder.adapters / f"{adapter_name(config, family)}-{step:06d}.safetensors"
    layers = list(live_adapter(transformer))
    metadata = adapter_metadata(
        config, family, fingerprint, step, layers=layers, day=datetime.now(UTC).date(), averaged=config.use_ema
    )
    write_adapter([small, folder.root / ADAPTER_FILE], family, transformer, metadata)


def write_adapter(
    paths: Sequence[Path],
    family: Family,
    transformer: nn.Module,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the adapter with its scale baked in, so that every reader takes it at strength 1.

    Args:
        paths: of the safetensors files, all the same, each written aside and renamed; the first is read back before.
        metadata: their header.
        dtype: of the tensors on the disk.

    Raises:
        UserError: the disk is full, or the file that was written is not what every program would read as the adapter.
    """
    tensors: dict[str, Tensor] = {}
    for module, (lora_a, lora_b) in baked_adapter(transformer).items():
        name = family.export_name(module)
        tensors[f"{name}.lora_A.weight"] = lora_a.to(dtype)
        tensors[f"{name}.lora_B.weight"] = lora_b.to(dtype)

    def check(aside: Path) -> None:
        try:
            expect_same_adapter(aside, family, transformer)
        except UserError as error:
            fix = "report it; what was there before is untouched"
            raise UserError.of([*error.problems, Problem(f"{paths[-1]} was not written", fix)]) from error

    first, *others = paths
    replace_file(first, tensors, metadata, check)
    for path in others:
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
        for file in aside.iterdir():
            share(file)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"{folder} can't be written ({error})", "free disk space, or mend its permissions; checkpoints are untouched"
        ) from error
