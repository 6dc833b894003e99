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
        low, high = self.between
        if self.sampling == "logit_normal" and self.between == (0.0, 1.0):
            sigma = torch.sigmoid(self.logit_mean + self.logit_std * torch.randn((), generator=generator))
        else:
            share = torch.rand((), generator=generator)
            sigma = self._quantile(self._share_below(low) + (self._share_below(high) - self._share_below(low)) * share)
        return sigma.clamp(max(low, _SMALLEST), high * (1 - _SMALLEST))

    def _share_below(self, sigma: float) -> float:
        """The distribution function."""
        if self.sampling == "uniform" or sigma in {0.0, 1.0}:
            return sigma
        if self.sampling == "shifted":
            return sigma / (self.shift - (self.shift - 1) * sigma)
        return 0.5 * math.erfc((self.logit_mean - math.log(sigma / (1 - sigma))) / (self.logit_std * math.sqrt(2)))

    def _quantile(self, share: Tensor) -> Tensor:
        """The inverse of the distribution function."""
        if self.sampling == "uniform":
            return share
        if self.sampling == "shifted":
            return self.shift * share / (1 + (self.shift - 1) * share)
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(share))

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
