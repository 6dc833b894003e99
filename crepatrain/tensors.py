"""What travels between the rooms, and the one legend of shapes.

B  batch                     T  token frames                       C   latent channels
F  pixel frames              h, w  rows and columns of tokens      T', H', W'  latent frames, rows, columns
N  frames seen by the teacher   P  patches of one frame            D   width of the transformer
H, W  pixel rows and columns    S  video tokens = T * h * w        E   width of the teacher
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from crepatrain.geometry import TokenGrid


@dataclass(frozen=True, eq=False)
class PatchFeatures:
    """What the teacher saw.

    Attributes:
        values: [B, N, P, E], patches in raster order, not unit-normalised.
        grid: (rows, columns) of one frame, P = rows * columns.
    """

    values: Tensor
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        assert self.values.ndim == 4, self.values.shape
        assert self.values.shape[2] == self.grid[0] * self.grid[1], (self.values.shape, self.grid)


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of clips from one bucket, with the random draws of its samples.

    Attributes:
        latents: [B, C, T', H', W'], normalised as the transformer takes them.
        noise: like latents.
        sigma: [B], in (0, 1): 0 is clean, 1 is noise.
        text: what the family's encode_text made, collated.
        grid: of the transformer's video tokens.
        fps: frames per second of the clips.
        keys: one name per sample, for messages.
        conditioning: what a family's encode_image made of the clips' first frames, and given [B]: 1 where a sample is conditioned
            on it, 0 where it is not; empty where none is.
        teacher: cached teacher features of the frames grid.teacher_frames.
        pixels: [B, N, 3, H, W] uint8, the frames grid.teacher_frames, where a teacher encodes them in the step.
    """

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    text: dict[str, Tensor]
    grid: TokenGrid
    fps: float
    keys: tuple[str, ...]
    conditioning: dict[str, Tensor] = field(default_factory=dict)
    teacher: PatchFeatures | None = None
    pixels: Tensor | None = None

    def _map(self, change) -> "Batch":  # noqa: ANN001 - Tensor -> Tensor
        return replace(
            self,
            latents=change(self.latents),
            noise=change(self.noise),
            sigma=change(self.sigma),
            text={name: change(value) for name, value in self.text.items()},
            conditioning={name: change(value) for name, value in self.conditioning.items()},
            teacher=self.teacher and PatchFeatures(change(self.teacher.values), self.teacher.grid),
            pixels=None if self.pixels is None else change(self.pixels),
        )

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; from pinned memory the copy does not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; torch's DataLoader calls this by name."""
        return self._map(lambda tensor: tensor.pin_memory())
