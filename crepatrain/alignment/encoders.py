"""Vision transformers of transformers' format as frozen teachers."""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from crepatrain.alignment.precision import own_precision
from crepatrain.errors import UserError
from crepatrain.files import safetensors_header
from crepatrain.tensors import PatchFeatures

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

# What transformers says of a config.json that no model can be built from, of weights of other shapes, and of a frame whose size
# is not the model's own.
_CONTENT = re.compile(r"not a multiple of the number of attention|ignore_mismatched_sizes|size mismatch for|doesn't match model")


class _NoPatchTokens(Exception):
    """A model does not give one token for every patch of a frame."""


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
        tokens = getattr(self.model(pixel_values=pixels.to(dtype), **self._options), "last_hidden_state", None)
        if tokens is None or tokens.ndim != 3:
            shape = "missing" if tokens is None else list(tokens.shape)
            raise _NoPatchTokens(f"last_hidden_state is {shape}, not [B, tokens, E]")
        patches = (size[0] // self.patch) * (size[1] // self.patch)
        prefix = tokens.shape[1] - patches  # CLS and registers stand first, where there are any
        if prefix not in {0, 1 + getattr(self.model.config, "num_register_tokens", 0)}:
            raise _NoPatchTokens(f"{tokens.shape[1]} tokens for {patches} patches")
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
    encoder = VisionEncoder(_load(folder, dtype), patch, frames_per_forward).to(device)
    try:
        _expect_pictures(encoder.model)
        encoder(torch.zeros(1, 1, 3, *size, dtype=torch.uint8, device=device), size)
    except _NoPatchTokens as error:
        raise _unfit(folder, size, error) from error
    except ValueError as error:
        if not _CONTENT.search(str(error)):
            raise
        raise _unfit(folder, size, error) from error
    return encoder


def _load(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a folder. Its files are checked first, so that our own error is never taken for a damaged file."""
    from transformers import MODEL_MAPPING, AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise _damaged(folder, error) from error
    if type(config) not in MODEL_MAPPING:
        raise _damaged(folder, f"it is a {type(config).__name__}, of which transformers has no model")
    for path in sorted(folder.glob("*.safetensors")):
        if safetensors_header(path) is None:
            raise _damaged(path, "it is damaged or cut off")
    try:
        return AutoModel.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True)
    except OSError as error:
        raise _damaged(folder, error) from error
    except (ValueError, RuntimeError) as error:
        if not _CONTENT.search(str(error)):
            raise
        raise _damaged(folder, error) from error


def _expect_pictures(model: Any) -> None:
    channels = getattr(model.config, "num_channels", 3)
    if model.main_input_name != "pixel_values" or "video" in getattr(model, "input_modalities", ()):
        raise _NoPatchTokens(f"{type(model).__name__} does not take pictures alone")
    if channels != 3:
        raise _NoPatchTokens(f"it takes pictures of {channels} channels")


def _damaged(where: Path, reason: Exception | str) -> UserError:
    first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
    return UserError(f"crepa_encoder: {where} can't be loaded ({first})", "download it again")


def _unfit(folder: Path, size: tuple[int, int], reason: Exception) -> UserError:
    return UserError(
        f"crepa_encoder: {folder} does not give a token for every patch of a {size[0]} x {size[1]} frame ({reason})",
        "use a DINOv2 or DINOv3 model, or the crepa_encoder_image_size that it was trained at",
    )
