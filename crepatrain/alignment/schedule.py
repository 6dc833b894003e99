"""How much CREPA weighs at a step, and when it stops."""

import math
from typing import Any, Literal


class CrepaSchedule:
    """The weight of the alignment loss over optimizer steps, counted from 0, with its cutoffs.

    `weight` and `needs_score` are queries; only `observe` changes anything.

    Args:
        weight: lambda, the weight after the warm-up.
        scheduler: how it decays after the warm-up.
        warmup_steps: steps from 0 to lambda, for every scheduler.
        decay_steps: steps of the decay, from the end of the warm-up; 0 means the rest of the run.
        lambda_end: weight at the end of the decay and after it.
        power: of polynomial.
        cutoff_step: off from that step on; 0 means never.
        similarity_threshold: off when the EMA of the score is at or above it; None means never.
        similarity_ema_decay: of the EMA, which the first score seeds.
        threshold_mode: permanent latches; recoverable comes back when the EMA falls below the threshold.
        probe_interval: of recoverable: steps between measurements while it is off.
        max_train_steps: length of the run.
    """

    def __init__(
        self,
        *,
        weight: float = 0.5,
        scheduler: Literal["constant", "linear", "cosine", "polynomial"] = "constant",
        warmup_steps: int = 0,
        decay_steps: int = 0,
        lambda_end: float = 0.0,
        power: float = 1.0,
        cutoff_step: int = 0,
        similarity_threshold: float | None = None,
        similarity_ema_decay: float = 0.99,
        threshold_mode: Literal["permanent", "recoverable"] = "permanent",
        probe_interval: int = 10,
        max_train_steps: int,
    ) -> None:
        self.peak = weight
        self.scheduler = scheduler
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps or max(max_train_steps - warmup_steps, 1)
        self.lambda_end = lambda_end
        self.power = power
        self.cutoff_step = cutoff_step
        self.similarity_threshold = similarity_threshold
        self.similarity_ema_decay = similarity_ema_decay
        self.threshold_mode = threshold_mode
        self.probe_interval = probe_interval
        self.ema: float | None = None
        self._latched = False

    @property
    def cutoff(self) -> bool:
        """Whether the similarity threshold has switched CREPA off."""
        return self._latched if self.threshold_mode == "permanent" else self._above_threshold()

    def is_off(self, step: int) -> bool:
        """Whether either cutoff holds at this step."""
        return self.cutoff or self._past_cutoff_step(step)

    def is_over(self, step: int) -> bool:
        """Whether CREPA can never again have a weight, from this step on."""
        decays = self.scheduler != "constant"
        faded = decays and self.lambda_end == 0 and step >= self.warmup_steps + self.decay_steps
        never = self.peak == 0 and not (decays and self.lambda_end > 0)
        return never or faded or self._latched or self._past_cutoff_step(step)

    def weight(self, step: int) -> float:
        """The weight of the alignment loss at an optimizer step."""
        return 0.0 if self.is_off(step) else self._scheduled(step)

    def needs_score(self, step: int) -> bool:
        """Whether the score is to be measured at this step: the weight is not 0, or a recoverable cutoff is due for a probe."""
        if self.weight(step) > 0:
            return True
        if self.threshold_mode != "recoverable" or not self.cutoff or self._past_cutoff_step(step):
            return False
        return self._scheduled(step) > 0 and step % self.probe_interval == 0

    def observe(self, alignment: float) -> None:
        """Take the score of one optimizer step, the mean over micro-batches and ranks, into the EMA."""
        decay = self.similarity_ema_decay
        self.ema = alignment if self.ema is None else decay * self.ema + (1 - decay) * alignment
        self._latched = self._latched or (self.threshold_mode == "permanent" and self._above_threshold())

    def state_dict(self) -> dict[str, Any]:
        return {"ema": self.ema, "latched": self._latched}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ema = state["ema"]
        self._latched = state["latched"]

    def _above_threshold(self) -> bool:
        return self.similarity_threshold is not None and self.ema is not None and self.ema >= self.similarity_threshold

    def _past_cutoff_step(self, step: int) -> bool:
        return 0 < self.cutoff_step <= step

    def _scheduled(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.scheduler == "constant":
            return self.peak
        progress = min((step - self.warmup_steps) / self.decay_steps, 1.0)
        end, span = self.lambda_end, self.peak - self.lambda_end
        if self.scheduler == "linear":
            return self.peak - span * progress
        if self.scheduler == "cosine":
            return end + span * (1 + math.cos(math.pi * progress)) / 2
        return end + span * (1 - progress) ** self.power
