"""Where the features come from that the hidden states are aligned with. No teacher ever receives a gradient."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from crepatrain.alignment.encoders import VisionEncoder
from crepatrain.alignment.precision import own_precision
from crepatrain.geometry import TokenGrid
from crepatrain.tensors import Batch, PatchFeatures


class Teacher(Protocol):
    """Makes the features of one batch.

    Attributes:
        blocks: of the transformer that it needs captured, beside the student's.
    """

    @property
    def blocks(self) -> tuple[int, ...]: ...

    def features(self, batch: Batch, tokens: Mapping[int, Tensor]) -> PatchFeatures:
        """The teacher's view of the batch.

        Args:
            tokens: [B, S, D] of every captured block.
        """
        ...


@dataclass(frozen=True)
class CachedTeacher:
    """Features that the cache stage wrote and the loader read."""

    blocks: tuple[int, ...] = ()

    def features(self, batch: Batch, tokens: Mapping[int, Tensor]) -> PatchFeatures:  # noqa: ARG002 - the protocol's
        assert batch.teacher is not None
        return batch.teacher


@dataclass(frozen=True, eq=False)
class PixelTeacher:
    """Encodes the frames of the clip itself, in every step.

    Attributes:
        size: pixels (height, width) of the encoder's input for a grid.
    """

    encoder: VisionEncoder
    size: Callable[[TokenGrid], tuple[int, int]]
    blocks: tuple[int, ...] = ()

    def features(self, batch: Batch, tokens: Mapping[int, Tensor]) -> PatchFeatures:  # noqa: ARG002 - the protocol's
        assert batch.pixels is not None
        return self.encoder(batch.pixels, self.size(batch.grid))


@dataclass(frozen=True, eq=False)
class LatentTeacher:
    """Decodes the clean latents with the VAE and encodes the frames that tokens are compared with.

    Attributes:
        decode: latents [B, C, T', H', W'] -> pixels [B, 3, F, H, W] in [-1, 1].
        size: pixels (height, width) of the encoder's input for a grid.
    """

    encoder: VisionEncoder
    size: Callable[[TokenGrid], tuple[int, int]]
    decode: Callable[[Tensor], Tensor]
    blocks: tuple[int, ...] = ()

    @torch.no_grad()
    def features(self, batch: Batch, tokens: Mapping[int, Tensor]) -> PatchFeatures:  # noqa: ARG002 - the protocol's
        with own_precision(batch.latents.device):
            video = self.decode(batch.latents)
        pixels = torch.stack([video[:, :, frame] for frame in batch.grid.teacher_frames], dim=1)
        frames = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return self.encoder(frames, self.size(batch.grid))


@dataclass(frozen=True)
class BackboneTeacher:
    """A deeper block of the same transformer, detached."""

    block: int

    @property
    def blocks(self) -> tuple[int, ...]:
        return (self.block,)

    def features(self, batch: Batch, tokens: Mapping[int, Tensor]) -> PatchFeatures:
        grid = batch.grid
        return PatchFeatures(tokens[self.block].detach().unflatten(1, (grid.t, grid.patches)), (grid.h, grid.w))
