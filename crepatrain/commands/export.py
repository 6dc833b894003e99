"""Writing a run's result again: an adapter file that diffusers loads, and ComfyUI where it knows the family, or a transformer."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from crepatrain.adapters.adapter_file import Model, read_adapter
from crepatrain.adapters.compatibility import how_to_load
from crepatrain.adapters.loading import adapter_of_checkpoint, adapter_of_file, trained_transformer
from crepatrain.adapters.recipe import adapter_metadata
from crepatrain.adapters.writing import write_adapter, write_single_file, write_transformer
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.errors import UserError
from crepatrain.families.base import Family
from crepatrain.outputs import expect_nothing_at
from crepatrain.placement.precision import compute_dtype
from crepatrain.records.layout import RunLayout, checkpoints, numbered, step_of
from crepatrain.records.opening import adapter_name, config_of, family_of
from crepatrain.records.whole import expect_whole, step_option
from crepatrain.screen import Screen
from crepatrain.training.checkpoint_content import read_fingerprint
from crepatrain.training.lora import live_adapter


@dataclass(frozen=True, eq=False)
class _Source:
    """One step of a run, and what is left of it.

    Attributes:
        name: of the run's adapters.
        average: whether the weights' average is written rather than the weights.
        checkpoint: None: it was removed, as newer ones took its place.
        adapter: the small adapter file that every checkpoint leaves; None: there is none.
    """

    config: ResolvedConfig
    family: Family
    name: str
    step: int
    average: bool
    checkpoint: Path | None
    adapter: Path | None


def export(
    run: Path, step: int | None, dtype: str | None, output: Path | None, screen: Screen, *, weights: str | None = None
) -> None:
    """Write the result of one of a run's checkpoints to a new place.

    Args:
        run: the run's folder.
        step: None: the last one.
        dtype: of the tensors; None: float32 for an adapter, what the run computed in for a whole transformer.
        weights: raw or ema; None: the average where the run kept one.
        output: a new file for an adapter, or a new folder for a whole transformer; None: in RUN/exports.

    Raises:
        UserError: there is no such run or step, its checkpoint is damaged, its base is gone, or the disk is full.
    """
    source = _find(run, step, weights, screen)
    config = source.config
    kind = getattr(torch, dtype) if dtype else torch.float32 if config.model.model_type == "lora" else compute_dtype(config.loop)
    which = "" if not config.optim.use_ema else "-ema" if source.average else "-raw"
    default = RunLayout(run).exports / f"{numbered(source.name, source.step)}{which}-{str(kind).removeprefix('torch.')}"
    if output:
        expect_nothing_at(output, "--output")
    if config.model.model_type == "full":
        _export_transformer(source, output or default, kind, screen)
    else:
        _export_adapter(source, output or default.with_name(f"{default.name}.safetensors"), kind, screen)


def _find(run: Path, step: int | None, weights: str | None, screen: Screen) -> _Source:
    config, layout = config_of(run, screen), RunLayout(run)
    family = family_of(config)
    saved = {step_of(path): path for path in checkpoints(layout.checkpoints)}
    name = adapter_name(config.loop, family)
    adapters = {} if config.model.model_type == "full" else _small_adapters(layout, name)
    steps = sorted(saved.keys() | adapters.keys())
    chosen = step if step is not None else max(saved or adapters, default=None)
    if chosen is None or chosen not in steps:
        what = f"{run}: it holds no checkpoint" + (f" of step {step}" if step is not None else "")
        raise UserError(what, f"use one of {', '.join(map(str, steps))}" if steps else "train first")
    if weights == "ema" and not config.optim.use_ema:
        raise UserError(f"--weights ema: {run} kept no average", "leave it out, or train with use_ema")
    if chosen in saved:
        expect_whole(saved[chosen], step_option)
    average = config.optim.use_ema and weights != "raw"
    return _Source(config, family, name, chosen, average, saved.get(chosen), adapters.get(chosen))


def _small_adapters(layout: RunLayout, name: str) -> dict[int, Path]:
    """The small adapter files that checkpoints have left, by step."""
    return {step_of(path): path for path in layout.all_adapters() if path == layout.adapter(name, step_of(path))}


def _export_adapter(source: _Source, path: Path, dtype: torch.dtype, screen: Screen) -> None:
    config, family = source.config, source.family
    if path.suffix != ".safetensors":
        raise UserError(f"--output {path}: an adapter is a .safetensors file", "end its name in .safetensors")
    if source.checkpoint:
        transformer = adapter_of_checkpoint(config.lora, family, source.checkpoint, average=source.average)
        metadata = adapter_metadata(
            config,
            family,
            read_fingerprint(source.checkpoint),
            source.step,
            layers=list(live_adapter(transformer)),
            day=datetime.now(UTC).date(),
            averaged=source.average,
        )
    elif config.optim.use_ema and not source.average:
        raise UserError(
            f"--weights raw: the checkpoint of step {source.step} was removed, as newer ones took its place",
            "leave --weights out: only the average of it is left",
        )
    else:
        assert source.adapter is not None
        screen.say(f"the checkpoint of step {source.step} was removed, as newer ones took its place: using {source.adapter}")
        file = read_adapter(source.adapter)
        transformer, metadata = adapter_of_file(family, file), file.metadata
    write_adapter([path], family, transformer, metadata, dtype)
    screen.say(f"wrote {path}")
    model = Model(family, transformer, family.variant.title)
    for line in how_to_load(read_adapter(path), model, config.model.pretrained_model_name_or_path):
        screen.say(line)


def _export_transformer(source: _Source, folder: Path, dtype: torch.dtype, screen: Screen) -> None:
    """The transformer's folder as diffusers has it, and one file with the original's names where the family has them."""
    family = source.family
    assert source.checkpoint is not None
    transformer = trained_transformer(family, source.checkpoint, average=source.average)
    write_transformer(folder / family.variant.transformer, transformer, dtype)
    screen.say(f"wrote {folder / family.variant.transformer}, for the pipeline folder of diffusers")
    try:
        names = {name: family.original_name(name) for name in transformer.state_dict()}
    except UserError as error:
        screen.note(f"no single file beside it: {error.problems[0].what}")
        return
    path = folder / f"{numbered(source.name, source.step)}.safetensors"
    write_single_file(path, family, transformer, names, dtype)
    screen.say(f"wrote {path}, for ComfyUI's models/diffusion_models")
