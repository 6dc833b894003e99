"""Vision transformers of transformers' format as frozen teachers."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        with torch.autocast(frames.device.type, enabled=False):  # a step's autocast is not the teacher's precision
            tokens = torch.cat([self._encode(chunk, size) for chunk in chunks])
        grid = (size[0] // self.patch, size[1] // self.patch)
        return PatchFeatures(tokens.unflatten(0, (b, n)), grid)

    def _encode(self, frames: Tensor, size: tuple[int, int]) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        pixels = F.interpolate(frames.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
        pixels = (pixels.clamp(0, 255) / 255 - self.mean) / self.std
        tokens = self.model(pixel_values=pixels.to(dtype)).last_hidden_state
        patches = (size[0] // self.patch) * (size[1] // self.patch)
        prefix = 1 + getattr(self.model.config, "num_register_tokens", 0)
        assert tokens.shape[1] == prefix + patches, (tokens.shape, prefix, patches)
        return tokens[:, prefix:]


def load_encoder(path: str, patch: int, *, frames_per_forward: int, device: torch.device, dtype: torch.dtype) -> VisionEncoder:
    """A frozen encoder from a folder or a hub id.

    Raises:
        UserError: transformers can't load it.
    """
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        where = (
            "its folder is damaged or incomplete"
            if Path(path).is_dir()
            else "it is not on this machine and could not be downloaded"
        )
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"crepa_encoder={path}: {where} ({reason})", f"run `hf download {path}` where there is a network, or give a folder"
        ) from error
    return VisionEncoder(model, patch, frames_per_forward).to(device)
