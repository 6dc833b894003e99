"""From a config and a checkpoint's own JSON files to a run that can start, or to every reason why it can't. Needs no torch."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from crepatrain.config import checks, data_checks, memory_checks
from crepatrain.config.datasets import NamedDataset, read_datasets
from crepatrain.config.load import parse, read_values
from crepatrain.config.notes import pipeline_notes, warnings
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.config.run_config import RunConfig
from crepatrain.config.sources import BASE_KEY, read_checkpoint, read_encoder, readable
from crepatrain.errors import Problem, UserError
from crepatrain.geometry import Geometry, TokenGrid
from crepatrain.specs import FAMILIES, Checkpoint, EncoderSpec, FamilySpec, Task, Variant

_T = TypeVar("_T")


@dataclass(frozen=True)
class Plan:
    """A run that can start.

    Attributes:
        config: with every default filled in.
        grid: token grid at the config's size.
        encoder: of the teacher; None where no vision encoder is used.
        datasets: that train_data names.
        warnings: what the user should know though nothing is wrong.
        open_keys: whose values are still to be chosen for the GPU at hand.
    """

    config: ResolvedConfig
    spec: FamilySpec
    checkpoint: Checkpoint
    variant: Variant
    geometry: Geometry
    grid: TokenGrid
    encoder: EncoderSpec | None
    datasets: tuple[NamedDataset, ...]
    warnings: tuple[str, ...]
    open_keys: frozenset[str]

    @property
    def size(self) -> tuple[int, int, int]:
        """(frames, height, width) of the config."""
        return self.config.data.size

    @property
    def fps(self) -> float:
        """The rate of the run's videos: its clips', or where these keep their own the model's."""
        return self.variant.fps if self.config.data.fps == "keep" else self.config.data.fps

    @property
    def largest(self) -> tuple[int, int, int]:
        """(frames, height, width) of the largest window that a clip may be cut into."""
        data = self.config.data
        shapes = data.aspect_buckets if isinstance(data.aspect_buckets, list) else [[data.height, data.width]]
        sizes = [(data.num_frames, height, width) for height, width in shapes]
        sizes += [self.size_of(dataset) for dataset in self.datasets]
        return max(sizes, key=lambda size: size[0] * size[1] * size[2])

    def size_of(self, dataset: NamedDataset) -> tuple[int, int, int]:
        """(frames, height, width) of a dataset's windows."""
        own, (frames, height, width) = dataset.config, self.size
        return own.num_frames or frames, own.height or height, own.width or width

    @property
    def task(self) -> Task:
        """What the run trains for."""
        return self.config.model.task

    def encoder_size(self, grid: TokenGrid) -> tuple[int, int]:
        """Pixels (height, width) at which the vision encoder sees a frame of this grid."""
        assert self.encoder is not None
        size = self.config.crepa.crepa_encoder_image_size
        if size == "grid":
            return self.encoder.patch * grid.h, self.encoder.patch * grid.w
        return int(size), int(size)

    def teacher_grid(self, grid: TokenGrid) -> tuple[int, int]:
        """(rows, columns) of the teacher's patches for a frame of this grid."""
        if self.encoder is None:
            return grid.h, grid.w
        height, width = self.encoder_size(grid)
        return height // self.encoder.patch, width // self.encoder.patch


def read_plan(path: Path, options: Sequence[str] = (), *, online: bool = True) -> Plan:
    """The plan of a config file with `--key value` options.

    Raises:
        UserError: with every problem of the file, of the options, and of the config against its checkpoint.
    """
    problems: list[Problem] = []
    plan = plan_of(read_values(path, options, problems), problems, online=online)
    if problems or plan is None:
        raise UserError.of(problems)
    return plan


def plan_of(values: Mapping[str, Any], problems: list[Problem], *, online: bool = True) -> Plan | None:
    """The plan of plain values; None where they have a problem.

    Args:
        problems: everything that is wrong with the values is added to it.
    """
    config, wrong = parse(values, problems)
    try:
        return make_plan(config, online=online, without=wrong)
    except UserError as error:
        # What follows from a value that is wrong already would only be noise.
        problems += [problem for problem in error.problems if wrong.isdisjoint(problem.keys)]
        return None


def make_plan(config: RunConfig, *, online: bool = True, without: frozenset[str] = frozenset()) -> Plan:
    """Check a config against the checkpoint that it names, and fill in every default.

    Args:
        online: whether the hub may be asked for a released model's small JSON files.
        without: keys whose values only stand in for wrong or missing ones.

    Raises:
        UserError: with every problem that was found.
    """
    spec = FAMILIES[config.model.model_family]
    problems: list[Problem] = []
    found = geometry = encoder = None
    if not without & {"model_family", "pretrained_model_name_or_path"}:
        found = _attempt(
            problems,
            lambda: read_checkpoint(
                config.model.pretrained_model_name_or_path, config.model.revision, spec, config.model.wan_expert, online=online
            ),
        )
    if found:
        geometry = _attempt(problems, lambda: _geometry(config, spec, found[0]))
    checkpoint, variant = found or (None, spec.default_variant())
    resolved = _resolve(config, spec, variant, checkpoint, geometry)
    datasets = None if "train_data" in without else _attempt(problems, lambda: read_datasets(resolved.data.train_data))
    problems += data_checks.check_datasets(datasets or (), resolved.loop.output_dir)
    problems += checks.check_paths(resolved)
    problems += checks.check_length(resolved.loop)
    problems += checks.check_allowed(resolved.loop)
    problems += memory_checks.check_checkpointing(resolved.loop)
    problems += memory_checks.check_quantization(resolved)
    problems += memory_checks.check_text_encoder(resolved.loop)
    problems += checks.check_eval(resolved.validation)
    problems += checks.check_init_adapter(resolved)
    problems += checks.check_optimizer(resolved)
    problems += checks.check_attention(resolved, spec, geometry)
    problems += checks.check_trackers(resolved.loop)
    disagreeing = checks.check_source(config)
    problems += disagreeing
    if checkpoint:
        problems += checks.check_variant(resolved.model, variant)
        problems += checks.check_validation(resolved, variant)
    if resolved.crepa.crepa_enabled and resolved.crepa.crepa_feature_source != "backbone":
        encoder = _attempt(problems, lambda: read_encoder(resolved.crepa.crepa_encoder))
    if encoder:
        problems += checks.check_encoder_size(resolved.crepa, encoder)
    if geometry:
        problems += data_checks.check_windows(resolved.data, datasets or (), geometry)
        problems += memory_checks.check_offload(resolved, geometry.depth)
        problems += checks.check_tiles(resolved.loop, geometry)
        problems += checks.check_images(resolved.data, variant, geometry)
        problems += checks.check_blocks(resolved, geometry.depth, source_known=not disagreeing)
        problems += checks.check_targets(resolved, spec, geometry.depth)
        problems += checks.check_threshold(resolved, geometry)
    if problems or checkpoint is None or geometry is None or datasets is None:
        keys = tuple(sorted(without))
        raise UserError.of(problems or [Problem(f"{', '.join(keys)}: not usable", "correct it", keys)])
    grid = geometry.token_grid(*resolved.data.size)
    messages = (*pipeline_notes(spec, checkpoint, variant, resolved.model.task), *warnings(resolved, config, grid))
    open_keys = memory_checks.open_keys(config.loop)
    return Plan(resolved, spec, checkpoint, variant, geometry, grid, encoder, datasets, messages, open_keys)


def _attempt(problems: list[Problem], action: Callable[[], _T]) -> _T | None:
    try:
        return action()
    except UserError as error:
        problems += error.problems
        return None


def _geometry(config: RunConfig, spec: FamilySpec, checkpoint: Checkpoint) -> Geometry:
    with readable(BASE_KEY, config.model.pretrained_model_name_or_path, spec):
        return spec.geometry(checkpoint.transformer, checkpoint.vae)


def _resolve(
    config: RunConfig, spec: FamilySpec, variant: Variant, checkpoint: Checkpoint | None, geometry: Geometry | None
) -> ResolvedConfig:
    """The config with every default filled in that depends on the family or the checkpoint."""
    height, width, frames = variant.size
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crepatrain"
    defaults: dict[str, Any] = {
        "task": variant.tasks[0],
        "height": height,
        "width": width,
        "num_frames": frames,
        "fps": variant.fps,
        "flow_shift": 1.0,
        "cache_dir": str(cache),
    }
    if config.model.model_type == "lora":
        defaults |= {"lora_alpha": float(config.lora.lora_rank), "lora_targets": list(spec.lora_targets)}
    if config.crepa.crepa_enabled:
        defaults |= {"crepa_block_index": spec.default_block, "crepa_projector_lr": config.optim.learning_rate}
    update = {key: value for key, value in defaults.items() if config.value(key) is None}
    if config.crepa.crepa_use_backbone_features or config.crepa.crepa_feature_source == "backbone":
        update |= {"crepa_use_backbone_features": True, "crepa_feature_source": "backbone"}
    resolved = ResolvedConfig.model_validate(config.model_dump() | update)
    legal = geometry is not None and not data_checks.check_windows(resolved.data, (), geometry)
    if config.diffusion.flow_shift is None and checkpoint and geometry and legal:
        resolved = resolved.changed(flow_shift=checkpoint.flow_shift(geometry.token_grid(*resolved.data.size).tokens))
    return resolved
