"""From the config to CREPA's weight over the steps. Needs no torch, so that it can be drawn before a run."""

from crepatrain.alignment.schedule import CrepaSchedule
from crepatrain.config.alignment_sections import CrepaConfig


def build_schedule(config: CrepaConfig, max_train_steps: int) -> CrepaSchedule | None:
    """CREPA's weight over the run; None where CREPA is off."""
    if not config.crepa_enabled:
        return None
    return CrepaSchedule(
        weight=config.crepa_lambda,
        scheduler=config.crepa_scheduler,
        warmup_steps=config.crepa_warmup_steps,
        decay_steps=config.crepa_decay_steps,
        lambda_end=config.crepa_lambda_end,
        power=config.crepa_power,
        cutoff_step=config.crepa_cutoff_step,
        similarity_threshold=config.crepa_similarity_threshold,
        similarity_ema_decay=config.crepa_similarity_ema_decay,
        threshold_mode=config.crepa_threshold_mode,
        probe_interval=config.crepa_probe_interval,
        max_train_steps=max_train_steps,
    )
