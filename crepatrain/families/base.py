"""What the rest of the program asks of a family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from crepatrain.config.specs import FamilySpec, ReleasedModel
from crepatrain.geometry import TokenGrid
from crepatrain.tensors import Batch


@dataclass(frozen=True, eq=False)
class PipelineParts:
    """The parts of a pipeline that is still to be written with random weights.

    Attributes:
        models: folder -> (class of diffusers, its config).
        saved: folder -> an object with `save_pretrained`: text encoder, tokenizer, scheduler.
    """

    models: Mapping[str, tuple[type[Any], Mapping[str, Any]]]
    saved: Mapping[str, Any]


class Family(Protocol):
    """One DiT family. Stateless: modules are loaded by it and handed back to it."""

    spec: FamilySpec

    def load_transformer(self, path: str, dtype: torch.dtype) -> Any:
        """The transformer of a local pipeline folder with its weights, in eval mode."""
        ...

    def empty_transformer(self, config: Mapping[str, Any]) -> Any:
        """The transformer on the meta device, for counting and planning."""
        ...

    def load_vae(self, path: str, dtype: torch.dtype) -> Any:
        """The VAE with its weights, in eval mode."""
        ...

    def load_text_encoder(self, path: str, dtype: torch.dtype) -> Any:
        """Tokenizer and text encoder, as `encode_text` wants them; it has a `.to(device)`."""
        ...

    def encode_text(self, text_encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Per caption the tensors that the transformer is conditioned on, without padding and without a batch dimension."""
        ...

    def collate_text(self, texts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """One batch of what `encode_text` made, padded as the family's pipeline pads."""
        ...

    def encode_video(self, vae: Any, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] in [-1, 1] -> latents [B, C, T', H', W'], normalised as the transformer takes them."""
        ...

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents [B, C, T', H', W'] -> pixels [B, 3, F, H, W] in about [-1, 1]."""
        ...

    def drop_vae_encoder(self, vae: Any) -> None:
        """Free what only encoding needs."""
        ...

    def denoise(self, transformer: nn.Module, noisy: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """The transformer's prediction for noisy latents, shaped like them.

        Args:
            noisy: [B, C, T', H', W'].
            sigma: [B].
        """
        ...

    def loss_mask(self, batch: Batch) -> Tensor | None:
        """[B, 1, T', 1, 1], 1 where the loss counts; None: everywhere."""
        ...

    def blocks(self, transformer: Any) -> nn.ModuleList:
        """The blocks that `crepa_block_index` counts."""
        ...

    def video_tokens(self, block_output: Any, grid: TokenGrid) -> Tensor:
        """A block's output as [B, S, D], the video tokens alone, in frame-major raster order."""
        ...

    def export_name(self, module: str) -> str:
        """The name under which an adapter file holds a module of the transformer, prefix included.

        diffusers reads it, and ComfyUI too, where it knows the family.

        Raises:
            UserError: a module that such a file can't hold.
        """
        ...

    def random_parts(self, released: ReleasedModel | None) -> PipelineParts:
        """A pipeline of a released model's shapes, or a tiny one."""
        ...
