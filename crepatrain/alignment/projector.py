"""From the transformer's width to the teacher's."""

import torch.nn.functional as F
from torch import Tensor, nn

# iREPA (arXiv 2512.10794): how much of the frame's mean the teacher loses before it is scaled by its deviation.
_MEAN_SHARE = 0.6
_DEVIATION_FLOOR = 1e-6
# As transformers begin; a cosine does not see the scale, and from a small one the projector finds its direction sooner.
_INITIAL_DEVIATION = 0.02


class LinearProjector(nn.Module):
    """LayerNorm(D) -> Linear(D, E), on each token by itself.

    Args:
        width: D.
        feature_dim: E.
    """

    def __init__(self, width: int, feature_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, feature_dim)
        nn.init.normal_(self.linear.weight, std=_INITIAL_DEVIATION)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        return self.linear(self.norm(tokens))


class ConvProjector(nn.Module):
    """A 3x3 convolution over each frame's token grid (iREPA, arXiv 2512.10794).

    Args:
        width: D.
        feature_dim: E.
    """

    def __init__(self, width: int, feature_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, feature_dim, kernel_size=3, padding=1)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, T, P, D] with P = rows * columns of the student's own grid -> [B, T, P, E]."""
        b, t, p, d = tokens.shape
        planes = tokens.reshape(b * t, *grid, d).permute(0, 3, 1, 2)
        return self.conv(planes).flatten(2).transpose(1, 2).reshape(b, t, p, -1)


def standardize_teacher(values: Tensor) -> Tensor:
    """The teacher [B, N, P, E] z-scored per channel over the patches of each frame, as the conv projector wants it."""
    mean = values.mean(dim=2, keepdim=True)
    deviation = values.std(dim=2, keepdim=True, unbiased=True)
    return (values - _MEAN_SHARE * mean) / (deviation + _DEVIATION_FLOOR)


def unit(values: Tensor) -> Tensor:
    """Unit length along the last dimension."""
    return F.normalize(values, dim=-1)
