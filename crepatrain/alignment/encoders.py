"""Vision transformers of transformers' format as frozen teachers."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crepatrain.alignment.precision import own_precision
from crepatrain.errors import UserError
from crepatrain.tensors import PatchFeatures

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class VisionEncoder(nn.Module):
    """A frozen vision transformer that turns frames into patch features.

    Args:
        model: of transformers, with `last_hidden_state` after its final LayerNorm.
        patch: pixels of one patch.
        frames_per_forward: at most that many frames are encoded at once.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, patch: int, frames_per_forward: int) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.patch = patch
        self.frames_per_forward = frames_per_forward
        takes = inspect.signature(model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, frames: Tensor, size: tuple[int, int]) -> PatchFeatures:
        """Patch tokens after the final LayerNorm, as they come; CLS and register tokens are dropped.

        Args:
            frames: [B, N, 3, H, W] uint8.
            size: pixels (height, width) at which the encoder sees a frame, multiples of its patch.

        Returns:
            values [B, N, P, E] in the encoder's dtype.
        """
        b, n = frames.shape[:2]
        chunks = frames.flatten(0, 1).split(self.frames_per_forward)
        with own_precision(frames.device):
            tokens = torch.cat([self._encode(chunk, size) for chunk in chunks])
        grid = (size[0] // self.patch, size[1] // self.patch)
        return PatchFeatures(tokens.unflatten(0, (b, n)), grid)

    def _encode(self, frames: Tensor, size: tuple[int, int]) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        pixels = F.interpolate(frames.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
        pixels = (pixels.clamp(0, 255) / 255 - self.mean) / self.std
        tokens = self.model(pixel_values=pixels.to(dtype), **self._options).last_hidden_state
        patches = (size[0] // self.patch) * (size[1] // self.patch)
        prefix = tokens.shape[1] - patches  # CLS and registers stand first, where there are any
        if prefix not in {0, 1 + getattr(self.model.config, "num_register_tokens", 0)}:
            raise ValueError(f"{tokens.shape[1]} tokens for {patches} patches")
        return tokens[:, prefix:]


def empty_encoder(shapes: Mapping[str, Any], patch: int, *, frames_per_forward: int, dtype: torch.dtype) -> VisionEncoder:
    """An encoder on the meta device, for planning.

    Args:
        shapes: its config.json.
    """
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**shapes)
    with torch.device("meta"):
        return VisionEncoder(AutoModel.from_config(config, dtype=dtype), patch, frames_per_forward)


def load_encoder(
    folder: Path, patch: int, size: tuple[int, int], *, frames_per_forward: int, device: torch.device, dtype: torch.dtype
) -> VisionEncoder:
    """A frozen encoder from a local folder, tried on one frame.

    Args:
        size: pixels (height, width) at which it will see frames.

    Raises:
        UserError: transformers can't load it, or it does not give a token for every patch.
    """
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"crepa_encoder: {folder} can't be loaded ({reason})", "download it again") from error
    encoder = VisionEncoder(model, patch, frames_per_forward).to(device)
    try:
        encoder(torch.zeros(1, 1, 3, *size, dtype=torch.uint8, device=device), size)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"crepa_encoder: {folder} does not give a token for every patch of a {size[0]} x {size[1]} frame ({error})",
            "use a DINOv2 or DINOv3 model, or the crepa_encoder_image_size that it was trained at",
        ) from error
    return encoder
