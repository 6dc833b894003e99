"""What a run hands out: adapter files that diffusers loads, and ComfyUI too where it knows the family, or a whole transformer."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from crepatrain.adapters.adapter_file import AdapterFile, Model, read_adapter
from crepatrain.adapters.compatibility import how_to_load
from crepatrain.adapters.recipe import adapter_metadata
from crepatrain.adapters.writing import write_adapter, write_single_file, write_transformer
from crepatrain.config.sections import RunConfig
from crepatrain.errors import UserError
from crepatrain.families.base import Family
from crepatrain.outputs import expect_nothing_at
from crepatrain.placement.precision import compute_dtype
from crepatrain.records.runfolder import RunFolder, adapter_name, config_of, family_of
from crepatrain.screen import Screen
from crepatrain.training.checkpoint import EMA_FILE, TRAINED_FILE, checkpoints, read_plain, read_tensors, step_of
from crepatrain.training.lora import add_lora, live_adapter, load_trained_state, put_on_cpu, target_modules


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
