"""The diffusion objective."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Of 1 - sigma and of sigma, in fp32: rounding alone must not reach clean latents or pure noise.
_SMALLEST = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow: x_sigma = (1 - sigma) x0 + sigma noise, and the model predicts noise - x0.

    Attributes:
        sampling: logit_normal is sigmoid(N(mean, std)); shifted is s -> k s / (1 + (k - 1) s) of a uniform s.
        shift: k.
        between: the distribution is cut to these noise levels, as an expert is asked for no others.
    """

    sampling: Literal["logit_normal", "uniform", "shifted"]
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    between: tuple[float, float] = (0.0, 1.0)

    def draw_sigma(self, generator: torch.Generator) -> Tensor:
        """The noise level of one sample, a scalar in (0, 1)."""
        if self.sampling != "logit_normal":
            sigma = self._draw_shifted(generator)
        elif self.between == (0.0, 1.0):
            sigma = torch.sigmoid(self.logit_mean + self.logit_std * torch.randn((), generator=generator))
        else:
            sigma = self._draw_cut_logit_normal(generator)
        low, high = self.between
        return sigma.clamp(max(low, _SMALLEST), high * (1 - _SMALLEST))

    def _draw_shifted(self, generator: torch.Generator) -> Tensor:
        """Of a uniform share between those that the limits have."""
        k = self.shift if self.sampling == "shifted" else 1.0
        first, last = (sigma / (k - (k - 1) * sigma) for sigma in self.between)
        share = first + (last - first) * torch.rand((), generator=generator)
        return k * share / (1 + (k - 1) * share)

    def _draw_cut_logit_normal(self, generator: torch.Generator) -> Tensor:
        """By the normal quantile of a share, in the mirrored tail where that is the one whose shares keep their digits."""
        low, high = ((_logit(sigma) - self.logit_mean) / self.logit_std for sigma in self.between)
        mirror = -1.0 if low > 0 else 1.0
        first, last = sorted(0.5 * math.erfc(-mirror * z / math.sqrt(2)) for z in (low, high))
        share = first + (last - first) * torch.rand((), generator=generator, dtype=torch.float64)
        return torch.sigmoid(self.logit_mean + self.logit_std * mirror * torch.special.ndtri(share)).float()

    def add_noise(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Latents and noise [B, ...], sigma [B] -> noisy latents [B, ...]."""
        level = sigma.view(-1, *[1] * (latents.ndim - 1))
        return (1 - level) * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor) -> Tensor:
        """What the model should predict: d x_sigma / d sigma."""
        return noise - latents

    def loss(self, prediction: Tensor, latents: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
        """The squared error of a prediction, [B], in fp32: the mean over what the mask keeps.

        Args:
            prediction, latents, noise: [B, C, T', H', W'].
            mask: [B, 1, T', 1, 1] or None.
        """
        error = (prediction.float() - self.target(latents, noise).float()).square()
        if mask is None:
            return error.flatten(1).mean(dim=1)
        kept = mask.flatten(1).sum(dim=1) * (math.prod(error.shape[1:]) // math.prod(mask.shape[1:]))
        return (error * mask).flatten(1).sum(dim=1) / kept


def _logit(sigma: float) -> float:
    return math.log(sigma / (1 - sigma)) if 0 < sigma < 1 else math.copysign(math.inf, sigma - 0.5)
