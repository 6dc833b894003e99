"""What is not wrong with a config, but should be known: keys that have no effect, or another one than their value says."""

from collections.abc import Callable
from pathlib import Path

from crepatrain.config.alignment_sections import CrepaConfig, LayerSyncConfig
from crepatrain.config.fields import Section
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.config.run_config import KEYS, RunConfig
from crepatrain.config.sections import LoraConfig
from crepatrain.geometry import TokenGrid
from crepatrain.specs import Checkpoint, FamilySpec, Task, Variant


def _beside(switch: str, section: type[Section]) -> tuple[str, ...]:
    return tuple(key for key in section.model_fields if key != switch)


# Keys, when they have no effect, and why.
_Idle = tuple[tuple[str, ...], Callable[[ResolvedConfig], bool], str]
_IDLE: tuple[_Idle, ...] = (
    (_beside("crepa_enabled", CrepaConfig), lambda c: not c.crepa.crepa_enabled, "crepa_enabled is false"),
    (_beside("layersync_enabled", LayerSyncConfig), lambda c: not c.layersync.layersync_enabled, "layersync_enabled is false"),
    (tuple(LoraConfig.model_fields), lambda c: c.model.model_type != "lora", "model_type is {model_type}"),
    (("revision",), lambda c: Path(c.model.pretrained_model_name_or_path).is_dir(), "pretrained_model_name_or_path is a folder"),
    (("i2v_dropout",), lambda c: c.model.task != "i2v", "task is {task}"),
    (
        ("logit_mean", "logit_std"),
        lambda c: c.diffusion.timestep_sampling != "logit_normal",
        "timestep_sampling is {timestep_sampling}",
    ),
    (("flow_shift",), lambda c: c.diffusion.timestep_sampling != "shifted", "timestep_sampling is {timestep_sampling}"),
    (("adam_beta1", "adam_beta2", "adam_epsilon"), lambda c: c.optim.optimizer == "adafactor", "optimizer is {optimizer}"),
    (("ema_decay",), lambda c: not c.optim.use_ema, "use_ema is false"),
    (("lr_warmup_steps",), lambda c: c.optim.lr_scheduler == "constant", "lr_scheduler is constant; use constant_with_warmup"),
    (
        ("validation_images", "validation_steps", "validation_seed", "validation_sampling_steps"),
        lambda c: c.validation.validation_prompts is None,
        "validation_prompts is null",
    ),
    (
        ("eval_seed",),
        lambda c: c.validation.eval_data is None and not c.validation.eval_share,
        "eval_data is null and eval_share is 0",
    ),
    (("validation_images",), lambda c: c.validation.validation_prompts is not None and c.model.task != "i2v", "task is {task}"),
)
_IDLE_WITH_CREPA: tuple[_Idle, ...] = (
    (
        ("crepa_enabled",),
        lambda c: c.crepa.crepa_lambda == 0 and (c.crepa.crepa_scheduler == "constant" or c.crepa.crepa_lambda_end == 0),
        "crepa_lambda is 0",
    ),
    (
        ("crepa_decay_steps", "crepa_lambda_end"),
        lambda c: c.crepa.crepa_scheduler == "constant",
        "crepa_scheduler is constant; use linear, cosine or polynomial",
    ),
    (("crepa_power",), lambda c: c.crepa.crepa_scheduler != "polynomial", "crepa_scheduler is {crepa_scheduler}"),
    (
        ("crepa_cutoff_step",),
        lambda c: c.loop.max_train_steps is not None and c.crepa.crepa_cutoff_step >= c.loop.max_train_steps,
        "the run ends at step {max_train_steps}",
    ),
    (
        ("crepa_similarity_ema_decay", "crepa_threshold_mode", "crepa_threshold_metric", "crepa_probe_interval"),
        lambda c: c.crepa.crepa_similarity_threshold is None,
        "crepa_similarity_threshold is null, and the logged EMA decides nothing",
    ),
    (
        ("crepa_probe_interval",),
        lambda c: c.crepa.crepa_similarity_threshold is not None and c.crepa.crepa_threshold_mode != "recoverable",
        "crepa_threshold_mode is {crepa_threshold_mode}",
    ),
    (
        ("crepa_adjacent_tau", "crepa_cumulative_neighbors", "crepa_normalize_neighbour_sum"),
        lambda c: c.crepa.crepa_adjacent_distance == 0,
        "crepa_adjacent_distance is 0",
    ),
    (("crepa_cumulative_neighbors",), lambda c: c.crepa.crepa_adjacent_distance == 1, "crepa_adjacent_distance is 1"),
    (
        ("crepa_teacher_block_index",),
        lambda c: c.crepa.crepa_feature_source != "backbone",
        "crepa_feature_source is {crepa_feature_source}",
    ),
    (
        ("crepa_encoder", "crepa_encoder_image_size", "crepa_encoder_frames_batch_size"),
        lambda c: c.crepa.crepa_feature_source == "backbone",
        "crepa_feature_source is backbone",
    ),
    (
        ("crepa_cache_dtype",),
        lambda c: c.crepa.crepa_feature_source != "cached",
        "crepa_feature_source is {crepa_feature_source}",
    ),
    (
        ("crepa_drop_vae_encoder",),
        lambda c: c.crepa.crepa_feature_source != "latents",
        "only crepa_feature_source=latents keeps a VAE in training",
    ),
)


def pipeline_notes(spec: FamilySpec, checkpoint: Checkpoint, variant: Variant, task: Task) -> list[str]:
    """A checkpoint that names a pipeline class which may feed its transformer otherwise than training does."""
    named, ours = checkpoint.model_index.get("_class_name"), spec.pipeline_of(variant, task)
    if named in (None, ours, *spec.pipelines.values()):
        return []
    return [f"the checkpoint's model_index.json names {named}, which is unknown here: it is trained on what {ours} feeds it"]


def warnings(config: ResolvedConfig, written: RunConfig, grid: TokenGrid) -> list[str]:
    """What has no effect, or another one than written.

    Args:
        written: the config as it was written.
        grid: at the config's size.
    """
    messages = []
    messages += _without_effect(config, written)
    messages += _joined_words(config)
    messages += _idle_ring(config)
    if config.optim.lr_scheduler != "constant":
        messages += _endless_warmup(config, "lr_warmup_steps", "learning_rate")
    if not config.crepa.crepa_enabled:
        return messages
    messages += _endless_warmup(config, "crepa_warmup_steps", "crepa_lambda")
    distance, largest = config.crepa.crepa_adjacent_distance, grid.t - 1
    if distance > largest:
        messages.append(f"crepa_adjacent_distance={distance} is taken as {largest}: clips have {grid.t} token frames")
    threshold = config.crepa.crepa_similarity_threshold
    if threshold is not None and threshold <= 0:
        messages.append(
            f"crepa_similarity_threshold={threshold:g}: CREPA is turned off almost at once, as the score begins near 0"
        )
    return messages


def _without_effect(config: ResolvedConfig, written: RunConfig) -> list[str]:
    rows = _IDLE + (_IDLE_WITH_CREPA if config.crepa.crepa_enabled else ())
    intended, values = _intended(written), config.model_dump()
    found = [([key for key in keys if key in intended], why) for keys, idle, why in rows if idle(config)]
    return [f"{', '.join(keys)}: without effect, as {why.format_map(values)}" for keys, why in found if keys]


def _intended(written: RunConfig) -> frozenset[str]:
    """The keys that were written to have an effect: those off their default, and CREPA's and LayerSync's wherever they are set.

    The config.json of a run sets every key, but for those that are newer than it: there nobody has chosen a default, nor the
    flow_shift, which is the checkpoint's.
    """
    explicitly_set = written.explicitly_set
    changed = frozenset(key for key in explicitly_set if written.value(key) != KEYS[key].field.default)
    if 2 * len(explicitly_set) > len(KEYS):
        return changed - {"flow_shift"}
    return changed | explicitly_set & (CrepaConfig.model_fields.keys() | LayerSyncConfig.model_fields.keys())


def _idle_ring(config: ResolvedConfig) -> list[str]:
    offload = config.loop.block_offload
    if offload not in (1, 2):
        return []
    return [
        f"block_offload={offload}: it saves no memory, as the weights of two blocks are on the GPU at any time; use 3 or more"
    ]


def _joined_words(config: ResolvedConfig) -> list[str]:
    prefix, suffix = config.data.caption_prefix, config.data.caption_suffix
    messages = []
    if prefix and prefix[-1].isalnum():
        messages.append(f"caption_prefix={prefix!r} is one word with the caption's first; end it in a space")
    if suffix and suffix[0].isalnum():
        messages.append(f"caption_suffix={suffix!r} is one word with the caption's last; begin it with a space")
    return messages


def _endless_warmup(config: ResolvedConfig, key: str, peak: str) -> list[str]:
    steps, length = config.value(key), config.loop.max_train_steps
    if length is None or steps < length:
        return []
    return [f"{key}={steps}: the run ends at step {length}, before it reaches {peak}"]
