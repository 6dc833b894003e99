"""The loss and the alignment on clips that are not trained on, at fixed noise levels and with fixed noise."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from crepatrain.data.buckets import Window
from crepatrain.data.loader import Draw, TrainingSet, keyed_generator
from crepatrain.data.readers import batches_ahead
from crepatrain.errors import DivergedError
from crepatrain.placement.precision import autocast
from crepatrain.preparing.precompute import Caches
from crepatrain.running.session import Run, build_training_set
from crepatrain.tensors import Batch
from crepatrain.training import build
from crepatrain.training.step import training_loss

# Of the range of noise levels that the transformer is for.
_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(eq=False)
class Evaluation:
    """Measures the held-out clips of a run.

    Attributes:
        windows: of these clips.
        samples: reads them; every caption and first frame is given. The teacher is asked as long as training asks it.
    """

    run: Run
    windows: Sequence[Window]
    samples: TrainingSet

    @classmethod
    def of(cls, run: Run, held: Caches) -> "Evaluation":
        """For the caches of the held-out clips."""

        def asks(_step: int) -> bool:
            return run.teacher is not None

        samples = build_training_set(run.context.plan, run.family, held, asks, drops=False)
        return cls(run, held.dataset.clips.windows, samples)

    def evaluate(self) -> None:
        """Log eval_loss, eval_alignment and the loss at each noise level, and mark the checkpoint where the loss is smallest.

        Every process measures the same with the bare module, and the first one writes. No random number of the training is
        touched.

        Raises:
            DivergedError: a loss or score is not finite.
        """
        run, module = self.run, self.run.transformer.module
        with run.apart_from_training():
            module.eval()
            try:
                losses, scores = self._measure()
            finally:
                module.train()
        loss = losses.mean().item()
        if not math.isfinite(loss) or not scores.isfinite().all():
            alignment = f", alignment {scores.mean():g}" if len(scores) else ""
            raise DivergedError(
                f"step {run.state.step}: loss {loss:g}{alignment} on the held-out clips",
                f"this step was not saved; {run.last_good()}. Lower learning_rate, or check those clips",
            )
        run.log(
            {
                "step": run.state.step,
                "eval_loss": loss,
                "eval_alignment": scores.mean().item() if len(scores) else None,
                "eval_sigma_loss": {
                    f"{sigma:.3g}": value for sigma, value in zip(self._sigmas, losses.mean(dim=0).tolist(), strict=True)
                },
            }
        )
        run.folder.mark_best()

    @property
    def _sigmas(self) -> list[float]:
        low, high = self.run.process.between
        return [low + (high - low) * share for share in _SHARES]

    @torch.no_grad()
    def _measure(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [windows, noise levels], and alignment scores of as many, or none without CREPA."""
        run, config, device = self.run, self.run.config, self.run.context.device
        crepa = None
        if run.projector is not None and run.teacher is not None:
            crepa = build.crepa_term(config.crepa, run.projector, run.teacher, 0.0)
        losses, scores = [], []
        for read in batches_ahead(self._batches(), pin_memory=device.type == "cuda"):
            window = read.to(device)
            for sigma in self._sigmas:
                batch = replace(window, sigma=torch.full_like(window.sigma, sigma))
                with autocast(config.loop, device):
                    found = training_loss(run.family, run.process, run.transformer.module, run.blocks, batch, crepa)
                losses.append(found.diffusion)
                run.folder.beat(run.state.step)
                if found.crepa:
                    scores.append(found.crepa.alignment)
        table = torch.cat(losses).float().cpu().unflatten(0, (-1, len(_SHARES)))
        return table, torch.cat(scores).float().cpu() if scores else torch.empty(0)

    def _batches(self) -> Iterator[Batch]:
        """Each window, always with the same noise, which is that of all noise levels.

        The noise depends on eval_seed and on what the window shows alone: not on the seed or the noise levels of the training,
        nor on what else is held out.
        """
        seed = self.run.config.validation.eval_seed
        for index, window in enumerate(self.windows):
            batch = self.samples.read([Draw(index, step=0, slot=index)])
            generator = keyed_generator("held out", seed, window.clip.digest, *window.frames)
            yield replace(batch, noise=torch.randn(batch.latents.shape, generator=generator))
