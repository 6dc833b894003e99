"""A plan in words."""

from collections.abc import Sequence

from crepatrain.config.alignment_sections import CrepaConfig
from crepatrain.config.checks import maximum_score
from crepatrain.config.plan import Plan
from crepatrain.config.resolved import ResolvedConfig, ResolvedData
from crepatrain.config.sections import LoopConfig, OptimConfig

_CHECKPOINTING = {True: "on", "selective": "on, self-attention kept", False: "off"}


def summarize(plan: Plan) -> list[tuple[str, str]]:
    """What will happen, as (topic, words)."""
    config, grid, geometry = plan.config, plan.grid, plan.geometry
    frames, height, width = plan.size
    known = " (not on this machine yet; checked against its known shapes)" if plan.checkpoint.origin == "package" else ""
    rows = [
        ("model", f"{_model(plan)}, {config.model.pretrained_model_name_or_path}{known}"),
        ("task", _task(plan)),
        ("trained", _trained(config)),
        ("clips", f"{_sources(plan)}: {frames} frames of {height} x {width} at {_rate(config.data)}"),
        ("tokens", f"{grid} = {grid.tokens} a clip, in {geometry.depth} blocks of width {geometry.width}"),
        ("steps", _steps(config.loop)),
        ("optimizer", _optimizer(config.optim)),
        ("precision", _precision(config) + _checkpointing(plan)),
    ]
    if plan.open_keys:
        rows.append(("memory", f"{', '.join(sorted(plan.open_keys))} as the GPU at hand needs"))
    if offloaded := _offloaded(plan):
        rows.append(("host memory", "; ".join(offloaded)))
    if held := _encoders(config):
        rows.append(("encoders", held))
    if config.crepa.crepa_enabled:
        rows += _crepa(plan)
    else:
        rows.append(("CREPA", "off; set crepa_enabled to true"))
    if config.layersync.layersync_enabled:
        sync = config.layersync
        words = f"block {sync.student_block} follows block {sync.teacher_block}, weight {sync.layersync_lambda:g}"
        rows.append(("LayerSync", words))
    return [*rows, ("output", config.loop.output_dir)]


def _sources(plan: Plan) -> str:
    if isinstance(plan.config.data.train_data, str) and len(plan.datasets) == 1:
        return plan.config.data.train_data
    return ", ".join(
        f"{each.path}" + (f" x {each.config.repeats:g}" if each.config.repeats != 1 else "") for each in plan.datasets
    )


def _rate(data: ResolvedData) -> str:
    return "their own rate" if data.fps == "keep" else f"{data.fps:g} fps"


def _offloaded(plan: Plan) -> list[str]:
    loop, found = plan.config.loop, []
    if loop.block_offload and "block_offload" not in plan.open_keys:
        depth = plan.geometry.depth
        found.append(f"the frozen weights of {loop.block_offload} of {depth} blocks, copied to the GPU ahead of their use")
    if loop.checkpoint_offload:
        found.append("the blocks' inputs from forward to backward")
    return found


def _encoders(config: ResolvedConfig) -> str:
    """What is not as it is by default."""
    words = []
    if config.loop.text_encoder_quantization != "none":
        words.append(f"the text encoder's blocks in {config.loop.text_encoder_quantization}")
    if config.loop.text_encoder_offload is True:
        words.append("the text encoder's blocks in host memory")
    if config.diffusion.vae_tiling:
        words.append("the VAE in tiles")
    return ", ".join(words)


def _model(plan: Plan) -> str:
    expert = plan.variant.expert
    low, high = plan.variant.sigmas
    return plan.variant.title + (f", the {expert}-noise expert (noise levels {low:g} to {high:g})" if expert else "")


def _task(plan: Plan) -> str:
    if plan.task == "t2v":
        return "text-to-video"
    dropped = plan.config.data.i2v_dropout
    return "image-to-video from each clip's first frame" + (f", {dropped:.0%} of the samples without it" if dropped else "")


def _trained(config: ResolvedConfig) -> str:
    if config.model.model_type == "full":
        return "every weight of the transformer"
    scale = "sqrt(rank)" if config.lora.lora_use_rslora else "rank"
    lora = config.lora
    return f"LoRA rank {lora.lora_rank}, scaled by alpha {lora.alpha:g} / {scale}, on {_targets(lora.targets)}"


def _precision(config: ResolvedConfig) -> str:
    how = config.loop.base_quantization
    quantized = "" if how == "none" else f", frozen blocks in {how}"
    if config.loop.mixed_precision == "no":
        return f"fp32{quantized}"
    if config.model.model_type == "full":
        return "bf16 arithmetic, fp32 weights"
    return f"bf16, adapter and projector fp32{quantized}"


def _checkpointing(plan: Plan) -> str:
    loop = plan.config.loop
    if "gradient_checkpointing" in plan.open_keys:
        return ""
    nested = ", and in each part of a block" if loop.nested_checkpointing else ""
    return f"; gradient checkpointing {_CHECKPOINTING[loop.gradient_checkpointing]}{nested}"


def _crepa(plan: Plan) -> list[tuple[str, str]]:
    crepa = plan.config.crepa
    last = plan.geometry.depth - 1
    return [
        ("CREPA", f"block {crepa.block} of 0 to {last} learns from {_teacher(plan)}, {_meeting(plan)}"),
        ("neighbours", _neighbours(plan)),
        ("weight", _schedule(crepa) + _over_frames(plan)),
        ("cutoff", _cutoff(plan)),
    ]


def _teacher(plan: Plan) -> str:
    if plan.encoder is None:
        return f"block {plan.config.crepa.teacher_block} of the same transformer"
    size = "x".join(map(str, plan.encoder_size(plan.grid)))
    rows, columns = plan.teacher_grid(plan.grid)
    source = plan.config.crepa.crepa_feature_source
    return f"{plan.config.crepa.crepa_encoder} at {size} ({source}): {rows} x {columns} patches a frame"


def _meeting(plan: Plan) -> str:
    rows, columns = plan.teacher_grid(plan.grid)
    if not plan.config.crepa.crepa_spatial_align:
        return "frame means only"
    if (rows, columns) == (plan.grid.h, plan.grid.w):
        return "patch on patch"
    finer, coarser = ("teacher", "student") if rows * columns >= plan.grid.patches else ("student", "teacher")
    return f"the {finer}'s grid resampled onto the {coarser}'s"


def _neighbours(plan: Plan) -> str:
    crepa = plan.config.crepa
    distance = min(crepa.crepa_adjacent_distance, plan.grid.t - 1)
    if distance == 0:
        return "none: each frame with its own features"
    several = crepa.crepa_cumulative_neighbors and distance > 1
    which = f"the frames 1 to {distance} away" if several else f"the two frames {distance} away"
    return f"{which}, weighted by exp(-distance / {crepa.crepa_adjacent_tau:g})"


def _cutoff(plan: Plan) -> str:
    crepa = plan.config.crepa
    maximum = maximum_score(crepa, plan.grid.t)
    threshold = crepa.crepa_similarity_threshold
    parts = [f"off from step {crepa.crepa_cutoff_step}"] if crepa.crepa_cutoff_step else []
    if threshold is not None:
        of_self = crepa.crepa_threshold_metric == "self"
        parts.append(
            f"off ({crepa.crepa_threshold_mode}) when the EMA of the {'self-similarity' if of_self else 'alignment score'} "
            f"reaches {threshold:g}"
        )
        if not of_self:
            parts[-1] += f", a mean cosine of about {threshold / maximum:.2f}"
    return f"{'; '.join(parts) or 'none'} (the score's maximum here is {maximum:.3f})"


def _targets(targets: Sequence[str] | str) -> str:
    if isinstance(targets, str):
        return "every Linear of the blocks" if targets == "all-linear" else f"every layer that {targets} matches"
    return ", ".join(targets)


def _steps(config: LoopConfig) -> str:
    length = f"{config.max_train_steps} optimizer steps" if config.max_train_steps else f"{config.num_train_epochs} epoch(s)"
    clips = f"{config.train_batch_size} clip{'s' * (config.train_batch_size > 1)}"
    if config.gradient_accumulation_steps > 1:
        clips += f" x {config.gradient_accumulation_steps} forwards"
    return f"{length} of {clips} on each device, a checkpoint every {config.checkpointing_steps}"


def _optimizer(config: OptimConfig) -> str:
    warmup = f" after {config.lr_warmup_steps} warm-up steps" if config.lr_warmup_steps else ""
    return f"{config.optimizer}, learning rate {config.learning_rate:g}, {config.lr_scheduler}{warmup}"


def _schedule(config: CrepaConfig) -> str:
    start, end = config.crepa_lambda, config.crepa_lambda_end
    warmup = config.crepa_warmup_steps
    text = f"{start:g}" if not warmup else f"0 to {start:g} in {warmup} steps"
    if config.crepa_scheduler == "constant":
        return text
    power = f" of power {config.crepa_power:g}" if config.crepa_scheduler == "polynomial" else ""
    until = "by the end of the run"
    if config.crepa_decay_steps:
        until = f"in {config.crepa_decay_steps} steps (step {warmup + config.crepa_decay_steps})"
    return f"{text}, then {config.crepa_scheduler}{power} to {end:g} {until}"


def _over_frames(plan: Plan) -> str:
    if plan.config.crepa.crepa_normalize_by_frames:
        return ""
    return f", on the sum over the token frames ({plan.grid.t} at this size), which grows with a clip's length"
