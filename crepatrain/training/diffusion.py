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
    """

    sampling: Literal["logit_normal", "uniform", "shifted"]
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0

    def draw_sigma(self, generator: torch.Generator) -> Tensor:
        """The noise level of one sample, a scalar in (0, 1)."""
        if self.sampling == "logit_normal":
            sigma = torch.sigmoid(self.logit_mean + self.logit_std * torch.randn((), generator=generator))
        else:
            sigma = torch.rand((), generator=generator)
            if self.sampling == "shifted":
                sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        return sigma.clamp(_SMALLEST, 1 - _SMALLEST)

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
