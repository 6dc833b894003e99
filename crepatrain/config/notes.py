"""What is not wrong with a config, but worth saying: keys that change nothing, or something else than written."""

from collections.abc import Callable
from pathlib import Path

from crepatrain.config.sections import CrepaConfig, LayerSyncConfig, LoraConfig, RunConfig, Section
from crepatrain.geometry import Geometry, TokenGrid


def _beside(switch: str, section: type[Section]) -> tuple[str, ...]:
    return tuple(key for key in section.model_fields if key != switch)


# Keys, when they change nothing, and why.
_Idle = tuple[tuple[str, ...], Callable[[RunConfig], bool], str]
_IDLE: tuple[_Idle, ...] = (
    (_beside("crepa_enabled", CrepaConfig), lambda c: not c.crepa_enabled, "crepa_enabled is false"),
    (_beside("layersync_enabled", LayerSyncConfig), lambda c: not c.layersync_enabled, "layersync_enabled is false"),
    (tuple(LoraConfig.model_fields), lambda c: c.model_type != "lora", "model_type is {model_type}"),
    (("revision",), lambda c: Path(c.pretrained_model_name_or_path).is_dir(), "pretrained_model_name_or_path is a folder"),
    (("i2v_dropout",), lambda c: c.task != "i2v", "task is {task}"),
    (("logit_mean", "logit_std"), lambda c: c.timestep_sampling != "logit_normal", "timestep_sampling is {timestep_sampling}"),
    (("flow_shift",), lambda c: c.timestep_sampling != "shifted", "timestep_sampling is {timestep_sampling}"),
    (("adam_beta1", "adam_beta2", "adam_epsilon"), lambda c: c.optimizer == "adafactor", "optimizer is {optimizer}"),
    (("ema_decay",), lambda c: not c.use_ema, "use_ema is false"),
    (("lr_warmup_steps",), lambda c: c.lr_scheduler == "constant", "lr_scheduler is constant; use constant_with_warmup"),
    (
        ("validation_images", "validation_steps", "validation_seed", "validation_sampling_steps"),
        lambda c: c.validation_prompts is None,
        "validation_prompts is null",
    ),
    (("validation_images",), lambda c: c.validation_prompts is not None and c.task != "i2v", "task is {task}"),
)
_IDLE_WITH_CREPA: tuple[_Idle, ...] = (
    (
        ("crepa_enabled",),
        lambda c: c.crepa_lambda == 0 and (c.crepa_scheduler == "constant" or c.crepa_lambda_end == 0),
        "crepa_lambda is 0",
    ),
    (
        ("crepa_decay_steps", "crepa_lambda_end"),
        lambda c: c.crepa_scheduler == "constant",
        "crepa_scheduler is constant; use linear, cosine or polynomial",
    ),
    (("crepa_power",), lambda c: c.crepa_scheduler != "polynomial", "crepa_scheduler is {crepa_scheduler}"),
    (
        ("crepa_cutoff_step",),
        lambda c: c.max_train_steps is not None and c.crepa_cutoff_step >= c.max_train_steps,
        "the run ends at step {max_train_steps}",
    ),
    (
        ("crepa_similarity_ema_decay", "crepa_threshold_mode", "crepa_threshold_metric", "crepa_probe_interval"),
        lambda c: c.crepa_similarity_threshold is None,
        "crepa_similarity_threshold is null, and the logged EMA decides nothing",
    ),
    (
        ("crepa_probe_interval",),
        lambda c: c.crepa_similarity_threshold is not None and c.crepa_threshold_mode != "recoverable",
        "crepa_threshold_mode is {crepa_threshold_mode}",
    ),
    (
        ("crepa_adjacent_tau", "crepa_cumulative_neighbors", "crepa_normalize_neighbour_sum"),
        lambda c: c.crepa_adjacent_distance == 0,
        "crepa_adjacent_distance is 0",
    ),
    (("crepa_cumulative_neighbors",), lambda c: c.crepa_adjacent_distance == 1, "crepa_adjacent_distance is 1"),
    (
        ("crepa_teacher_block_index",),
        lambda c: c.crepa_feature_source != "backbone",
        "crepa_feature_source is {crepa_feature_source}",
    ),
    (
        ("crepa_encoder", "crepa_encoder_image_size", "crepa_encoder_frames_batch_size"),
        lambda c: c.crepa_feature_source == "backbone",
        "crepa_feature_source is backbone",
    ),
    (("crepa_cache_dtype",), lambda c: c.crepa_feature_source != "cached", "crepa_feature_source is {crepa_feature_source}"),
    (
        ("crepa_drop_vae_encoder",),
        lambda c: c.crepa_feature_source != "latents",
        "only crepa_feature_source=latents keeps a VAE in training",
    ),
)


def warnings(config: RunConfig, said: RunConfig, geometry: Geometry, grid: TokenGrid) -> list[str]:
    """What has no effect, or another one than written.

    Args:
        config: with its defaults filled in.
        said: as it was written.
        grid: at the config's size.
    """
    told = []
    if geometry.tile > 1 and not config.compile:
        told.append("compile: without it the attention over tiles (NABLA) holds every score in memory; set it to true")
    told += _without_effect(config, said)
    if config.lr_scheduler != "constant":
        told += _endless_warmup(config, "lr_warmup_steps", "learning_rate")
    if not config.crepa_enabled:
        return told
    told += _endless_warmup(config, "crepa_warmup_steps", "crepa_lambda")
    if config.crepa_adjacent_distance > grid.t - 1:
        told.append(
            f"crepa_adjacent_distance={config.crepa_adjacent_distance} is taken as {grid.t - 1}: clips have {grid.t} token frames"
        )
    threshold = config.crepa_similarity_threshold
    if threshold is not None and threshold <= 0:
        told.append(f"crepa_similarity_threshold={threshold:g}: CREPA goes off almost at once, as the score begins near 0")
    return told


def _without_effect(config: RunConfig, said: RunConfig) -> list[str]:
    rows = _IDLE + (_IDLE_WITH_CREPA if config.crepa_enabled else ())
    wanted, values = _wanted(said), config.model_dump()
    found = [([key for key in keys if key in wanted], why) for keys, idle, why in rows if idle(config)]
    return [f"{', '.join(keys)}: without effect, as {why.format_map(values)}" for keys, why in found if keys]


def _wanted(said: RunConfig) -> set[str]:
    """The keys that were written to change something: those off their default, and CREPA's and LayerSync's wherever they stand.

    The config.json of a run says every key, but for those that were added since: there a default is nobody's wish, and neither is
    the flow_shift, which is the checkpoint's.
    """
    fields, keys = RunConfig.model_fields, said.model_fields_set
    changed = {key for key in keys if getattr(said, key) != fields[key].default}
    if 2 * len(keys) > len(fields):
        return changed - {"flow_shift"}
    return changed | (keys & {*CrepaConfig.model_fields, *LayerSyncConfig.model_fields})


def _endless_warmup(config: RunConfig, key: str, peak: str) -> list[str]:
    steps, length = getattr(config, key), config.max_train_steps
    if length is None or steps < length:
        return []
    return [f"{key}={steps}: the run ends at step {length}, before it reaches {peak}"]
