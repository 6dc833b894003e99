"""From a config and a checkpoint's own JSON files to what will happen, or to every reason why it can't. No torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from crepatrain.config.load import parse, read_values
from crepatrain.config.sections import CrepaConfig, LayerSyncConfig, RunConfig
from crepatrain.config.sources import Checkpoint, read_checkpoint, read_encoder
from crepatrain.config.specs import FAMILIES, EncoderSpec, FamilySpec
from crepatrain.errors import Problem, UserError
from crepatrain.geometry import Geometry, TokenGrid
from crepatrain.neighbours import reachable_maximum

_OPTIMIZER_PACKAGES = {"adamw8bit": ("bitsandbytes", "8bit"), "prodigy": ("prodigyopt", "prodigy")}


@dataclass(frozen=True)
class Plan:
    """A run that can start.

    Attributes:
        config: with every default filled in.
        grid: token grid at the config's size.
        encoder: of the teacher; None where no vision encoder is used.
        warnings: what the user should know though nothing is wrong.
    """

    config: RunConfig
    spec: FamilySpec
    checkpoint: Checkpoint
    geometry: Geometry
    grid: TokenGrid
    encoder: EncoderSpec | None
    warnings: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int, int]:
        """(frames, height, width) of the config."""
        return _size(self.config)

    def encoder_size(self, grid: TokenGrid) -> tuple[int, int]:
        """Pixels (height, width) at which the vision encoder sees a frame of this grid."""
        assert self.encoder is not None
        size = self.config.crepa_encoder_image_size
        if size == "grid":
            return self.encoder.patch * grid.h, self.encoder.patch * grid.w
        return int(size), int(size)

    def teacher_grid(self, grid: TokenGrid) -> tuple[int, int]:
        """(rows, columns) of the teacher's patches for a frame of this grid."""
        if self.encoder is None:
            return grid.h, grid.w
        height, width = self.encoder_size(grid)
        return height // self.encoder.patch, width // self.encoder.patch

    def summary(self) -> list[tuple[str, str]]:
        """What will happen, as (topic, words)."""
        config = self.config
        frames, height, width = self.size
        rows = [
            ("model", f"{self.spec.title}, {config.pretrained_model_name_or_path}{_origin(self.checkpoint)}"),
            ("adapter", f"LoRA rank {config.lora_rank}, alpha {config.lora_alpha:g}, on {_targets(config)}"),
            ("clips", f"{config.train_data}: {frames} frames of {height} x {width} at {config.fps:g} fps"),
            (
                "tokens",
                f"{self.grid} = {self.grid.tokens} a clip, in {self.geometry.depth} blocks of width {self.geometry.width}",
            ),
            ("steps", _steps(config)),
            ("optimizer", _optimizer(config)),
            ("precision", f"{config.mixed_precision}, gradient checkpointing {'on' if config.gradient_checkpointing else 'off'}"),
        ]
        if config.crepa_enabled:
            rows += self._crepa_summary()
        else:
            rows.append(("CREPA", "off; set crepa_enabled to true"))
        if config.layersync_enabled:
            student, teacher = config.layersync_student_block, config.layersync_teacher_block
            rows.append(("LayerSync", f"block {student} follows block {teacher}, weight {config.layersync_lambda:g}"))
        return [*rows, ("output", config.output_dir)]

    def _crepa_summary(self) -> list[tuple[str, str]]:
        config = self.config
        distance = min(config.crepa_adjacent_distance, self.grid.t - 1)
        if distance == 0:
            neighbours = "none: each frame with its own features"
        else:
            which = f"the frames 1 to {distance} away" if config.crepa_cumulative_neighbors else f"the two frames {distance} away"
            neighbours = f"{which}, weighing exp(-distance / {config.crepa_adjacent_tau:g})"
        rows, columns = self.teacher_grid(self.grid)
        if self.encoder is None:
            teacher = f"block {config.crepa_teacher_block_index} of the same transformer"
        else:
            size = "x".join(map(str, self.encoder_size(self.grid)))
            teacher = f"{config.crepa_encoder} at {size} ({config.crepa_feature_source}): {rows} x {columns} patches a frame"
        if not config.crepa_spatial_align:
            meeting = "frame means only"
        elif (rows, columns) == (self.grid.h, self.grid.w):
            meeting = "patch on patch"
        else:
            finer, coarser = ("teacher", "student") if rows * columns >= self.grid.patches else ("student", "teacher")
            meeting = f"the {finer}'s grid resampled onto the {coarser}'s"
        return [
            ("CREPA", f"block {config.crepa_block_index} of 0 to {self.geometry.depth - 1} learns from {teacher}, {meeting}"),
            ("neighbours", neighbours),
            ("weight", _schedule(config)),
            ("cutoff", self._cutoff()),
        ]

    def _cutoff(self) -> str:
        config = self.config
        maximum = maximum_score(config, self.grid.t)
        parts = []
        if config.crepa_cutoff_step:
            parts.append(f"off from step {config.crepa_cutoff_step}")
        if config.crepa_similarity_threshold is not None:
            cosine = config.crepa_similarity_threshold / maximum
            name = "self-similarity" if config.crepa_threshold_metric == "self" else "alignment score"
            parts.append(
                f"off ({config.crepa_threshold_mode}) when the EMA of the {name} reaches {config.crepa_similarity_threshold:g}: "
                f"a mean cosine of about {cosine:.2f}, as the score's maximum here is {maximum:.3f}"
            )
        return "; ".join(parts) or f"none (the score's maximum here is {maximum:.3f})"


def _size(config: RunConfig) -> tuple[int, int, int]:
    assert config.num_frames is not None
    assert config.height is not None
    assert config.width is not None
    return config.num_frames, config.height, config.width


def maximum_score(config: CrepaConfig, token_frames: int) -> float:
    """The largest value that the score of `crepa_threshold_metric` can reach on clips of this many token frames."""
    if config.crepa_threshold_metric == "self":
        return 1.0
    return reachable_maximum(
        token_frames,
        distance=config.crepa_adjacent_distance,
        tau=config.crepa_adjacent_tau,
        cumulative=config.crepa_cumulative_neighbors,
        normalize_neighbour_sum=config.crepa_normalize_neighbour_sum,
    )


def read_plan(path: Path, options: Sequence[str] = (), *, online: bool = True) -> Plan:
    """The plan of a config file with `--key value` options.

    Raises:
        UserError: with every problem of the file, of the options, and of the config against its checkpoint.
    """
    problems: list[Problem] = []
    values = read_values(path, options, problems)
    config, wrong = parse(values, problems)
    if config is None:
        raise UserError.of(problems)
    try:
        plan = make_plan(config, online=online)
    except UserError as error:
        # What follows from a value that is wrong already would only be noise.
        raise UserError.of(problems + [p for p in error.problems if not any(key in p.what for key in wrong)]) from None
    if problems:
        raise UserError.of(problems)
    return plan


def make_plan(config: RunConfig, *, online: bool = True) -> Plan:
    """Check a config against the checkpoint that it names, and fill in every default.

    Args:
        online: whether the hub may be asked for a released model's small JSON files.

    Raises:
        UserError: with every problem that was found.
    """
    spec = FAMILIES[config.model_family]
    problems: list[Problem] = []
    checkpoint = _attempt(
        problems,
        lambda: read_checkpoint(config.pretrained_model_name_or_path, config.revision, spec, online=online),
    )
    resolved = _resolve(config, spec, checkpoint)
    problems += _check_paths(resolved)
    problems += _check_steps(resolved)
    problems += _check_source(config)
    encoder = None
    if resolved.crepa_enabled and resolved.crepa_feature_source != "backbone":
        encoder = _attempt(problems, lambda: read_encoder(resolved.crepa_encoder))
        if encoder is not None:
            problems += _check_encoder_size(resolved, encoder)
    geometry = spec.geometry(checkpoint.transformer, checkpoint.vae) if checkpoint else None
    grid = None
    if geometry is not None:
        problems += _check_size(resolved, geometry)
        problems += _check_blocks(resolved, geometry.depth)
        if not problems or geometry.legal_frames(_size(resolved)[0]):
            grid = _attempt([], lambda: geometry.token_grid(*_size(resolved)))
        if grid is not None:
            problems += _check_threshold(resolved, grid.t)
    if problems:
        raise UserError.of(problems)
    assert checkpoint is not None
    assert geometry is not None
    assert grid is not None
    return Plan(resolved, spec, checkpoint, geometry, grid, encoder, tuple(_warnings(resolved, config, grid)))


def _attempt(problems: list[Problem], action):  # noqa: ANN001, ANN202 - () -> T
    try:
        return action()
    except UserError as error:
        problems += error.problems
        return None


def _resolve(config: RunConfig, spec: FamilySpec, checkpoint: Checkpoint | None) -> RunConfig:
    height, width, frames = spec.default_size
    scheduler = checkpoint.scheduler if checkpoint else {}
    backbone = config.crepa_use_backbone_features or config.crepa_feature_source == "backbone"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crepatrain"
    filled = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "fps": spec.fps,
        "lora_alpha": float(config.lora_rank),
        "lora_targets": list(spec.lora_targets),
        "crepa_block_index": spec.default_block,
        "flow_shift": float(scheduler.get("flow_shift") or scheduler.get("shift") or 1.0),
        "cache_dir": str(cache),
        "crepa_projector_lr": config.learning_rate,
    }
    update = {key: value for key, value in filled.items() if getattr(config, key) is None}
    update |= {"crepa_use_backbone_features": backbone}
    if backbone:
        update["crepa_feature_source"] = "backbone"
    return config.model_copy(update=update)


def _check_paths(config: RunConfig) -> list[Problem]:
    problems = []
    train_data = Path(config.train_data)
    if not train_data.exists():
        problems.append(
            Problem(f"train_data={train_data}: it does not exist", "give a folder of clips, or a .jsonl or .csv list")
        )
    elif train_data.is_dir() and not any(train_data.iterdir()):
        problems.append(Problem(f"train_data={train_data}: the folder is empty", "put video files and NAME.txt captions into it"))
    elif train_data.is_file() and train_data.suffix.lower() not in {".jsonl", ".csv"}:
        problems.append(
            Problem(f"train_data={train_data}: neither a folder nor a .jsonl or .csv list", "give the folder of the clips")
        )
    for key in ("output_dir", "cache_dir"):
        path = Path(getattr(config, key))
        if path.exists() and not path.is_dir():
            problems.append(Problem(f"{key}={path}: it is a file", "give a folder"))
            continue
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            problems.append(
                Problem(f"{key}={path}: {existing} can't be written to", "give another folder, or mend its permissions")
            )
    return problems


def _check_steps(config: RunConfig) -> list[Problem]:
    problems = []
    if (config.max_train_steps is None) == (config.num_train_epochs is None):
        which = "both are set" if config.max_train_steps else "neither is set"
        problems.append(Problem(f"max_train_steps, num_train_epochs: {which}", "set one of them"))
    package, extra = _OPTIMIZER_PACKAGES.get(config.optimizer, ("", ""))
    if package and find_spec(package) is None:
        problems.append(
            Problem(f"optimizer={config.optimizer}: {package} is not installed", f'run pip install "crepatrain[{extra}]"')
        )
    return problems


def _check_source(config: RunConfig) -> list[Problem]:
    """Of the config as it was written: the two spellings of the backbone source must not disagree."""
    said = config.model_fields_set
    backbone = config.crepa_feature_source == "backbone"
    if {"crepa_feature_source", "crepa_use_backbone_features"} <= said and backbone != config.crepa_use_backbone_features:
        flag = str(config.crepa_use_backbone_features).lower()
        return [
            Problem(
                f"crepa_feature_source={config.crepa_feature_source}, crepa_use_backbone_features={flag}: they disagree",
                "keep crepa_feature_source alone",
            )
        ]
    return []


def _check_size(config: RunConfig, geometry: Geometry) -> list[Problem]:
    """Each of the three numbers by itself, so that all that are wrong are told."""
    frames, height, width = _size(config)
    multiple_h, multiple_w = geometry.size_multiple
    legal_frames = frames if geometry.legal_frames(frames) else geometry.nearest_frames(frames)[-1]
    problems: list[Problem] = []
    _attempt(problems, lambda: geometry.latent_shape(frames, multiple_h, multiple_w))
    _attempt(problems, lambda: geometry.latent_shape(legal_frames, height, multiple_w))
    _attempt(problems, lambda: geometry.latent_shape(legal_frames, multiple_h, width))
    return problems


def _check_encoder_size(config: RunConfig, encoder: EncoderSpec) -> list[Problem]:
    size = config.crepa_encoder_image_size
    if size == "grid" or size % encoder.patch == 0:
        return []
    below = size // encoder.patch * encoder.patch
    legal = [str(n) for n in (below, below + encoder.patch) if n]
    return [
        Problem(
            f"crepa_encoder_image_size={size}: {config.crepa_encoder} takes multiples of {encoder.patch}",
            f"use {' or '.join(legal)}, or grid",
        )
    ]


def _check_blocks(config: RunConfig, depth: int) -> list[Problem]:
    problems = []
    pairs = []
    if config.crepa_enabled:
        deeper = config.crepa_feature_source == "backbone"
        pairs.append(("crepa_block_index", "crepa_teacher_block_index" if deeper else None))
        if config.crepa_projector == "conv" and not config.crepa_spatial_align:
            problems.append(
                Problem(
                    "crepa_projector=conv, crepa_spatial_align=false: a convolution needs the patches",
                    "set one of them otherwise",
                )
            )
    if config.layersync_enabled:
        pairs.append(("layersync_student_block", "layersync_teacher_block"))
    for student_key, teacher_key in pairs:
        student: int | None = getattr(config, student_key)
        problems += _check_block(student_key, student, depth)
        if teacher_key is None:
            continue
        teacher: int | None = getattr(config, teacher_key)
        problems += _check_block(teacher_key, teacher, depth)
        if student is not None and teacher is not None and student < depth and teacher <= student:
            legal = f"use {student + 1} to {depth - 1}" if student + 1 < depth else f"lower {student_key}"
            problems.append(Problem(f"{teacher_key}={teacher} is not deeper than {student_key}={student}", legal))
    return problems


def _check_block(key: str, block: int | None, depth: int) -> list[Problem]:
    if block is None:
        return [Problem(f"{key} is missing", f"set it to a block from 0 to {depth - 1}")]
    if block >= depth:
        return [Problem(f"{key}={block}: the transformer has {depth} blocks, counted from 0", f"use 0 to {depth - 1}")]
    return []


def _check_threshold(config: RunConfig, token_frames: int) -> list[Problem]:
    threshold = config.crepa_similarity_threshold
    maximum = maximum_score(config, token_frames)
    if not config.crepa_enabled or threshold is None or threshold <= maximum:
        return []
    return [
        Problem(
            f"crepa_similarity_threshold={threshold:g}: the score can't exceed {maximum:.3f} "
            f"(distance {config.crepa_adjacent_distance}, tau {config.crepa_adjacent_tau:g}, {token_frames} token frames)",
            f"use less than {maximum:.3f}",
        )
    ]


def _warnings(config: RunConfig, said: RunConfig, grid: TokenGrid) -> list[str]:
    """What has no effect, or another one than written.

    Args:
        said: the config as it was written, before defaults were filled in.
    """
    told = []
    for section, switch in ((CrepaConfig, "crepa_enabled"), (LayerSyncConfig, "layersync_enabled")):
        fields = section.model_fields
        changed = [key for key in fields if key in said.model_fields_set and getattr(said, key) != fields[key].default]
        if changed and not getattr(config, switch):
            told.append(f"{', '.join(changed)}: without effect, as {switch} is false")
    if config.crepa_enabled and config.crepa_adjacent_distance > grid.t - 1:
        told.append(
            f"crepa_adjacent_distance={config.crepa_adjacent_distance} is taken as {grid.t - 1}: clips have {grid.t} token frames"
        )
    if config.crepa_enabled and config.crepa_drop_vae_encoder and config.crepa_feature_source != "latents":
        told.append("crepa_drop_vae_encoder: without effect, as only crepa_feature_source=latents keeps a VAE in training")
    if config.lr_scheduler == "constant" and config.lr_warmup_steps:
        told.append("lr_warmup_steps: without effect with lr_scheduler=constant; use constant_with_warmup")
    return told


def _origin(checkpoint: Checkpoint) -> str:
    return " (not on this machine yet; checked against its known shapes)" if checkpoint.origin == "package" else ""


def _targets(config: RunConfig) -> str:
    assert config.lora_targets is not None
    return "every Linear of the blocks" if config.lora_targets == "all-linear" else ", ".join(config.lora_targets)


def _steps(config: RunConfig) -> str:
    length = f"{config.max_train_steps} optimizer steps" if config.max_train_steps else f"{config.num_train_epochs} epochs"
    clips = f"{config.train_batch_size} x {config.gradient_accumulation_steps} clips"
    return f"{length} of {clips}, a checkpoint every {config.checkpointing_steps}"


def _optimizer(config: RunConfig) -> str:
    warmup = f" after {config.lr_warmup_steps} warm-up steps" if config.lr_warmup_steps else ""
    return f"{config.optimizer}, learning rate {config.learning_rate:g}, {config.lr_scheduler}{warmup}"


def _schedule(config: RunConfig) -> str:
    start, end = config.crepa_lambda, config.crepa_lambda_end
    warmup = config.crepa_warmup_steps
    text = f"{start:g}" if not warmup else f"0 to {start:g} in {warmup} steps"
    if config.crepa_scheduler != "constant":
        until = f"in {config.crepa_decay_steps} steps" if config.crepa_decay_steps else "by the end of the run"
        power = f" of power {config.crepa_power:g}" if config.crepa_scheduler == "polynomial" else ""
        text += f", then {config.crepa_scheduler}{power} to {end:g} {until}"
        if config.crepa_decay_steps:
            text += f" (step {warmup + config.crepa_decay_steps})"
    return text
