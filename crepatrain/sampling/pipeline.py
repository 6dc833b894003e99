"""Frames from a diffusers pipeline, and the pipeline around a transformer in training."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

from crepatrain.data.clip import Unreadable
from crepatrain.data.decode import read_first
from crepatrain.errors import UserError
from crepatrain.families.base import Family


def training_pipeline(
    family: Family, folder: Path, transformer: Any, vae: Any, dropped_parts: Sequence[str], device: torch.device
) -> Any:
    """The family's pipeline around a transformer in training.

    Args:
        folder: the base's pipeline folder, from which the remaining parts are read.
        transformer: it takes the place of the one of `family.variant.transformer`.
        dropped_parts: names of parts that are left out: prompts come encoded, so no text encoder and no tokenizer is needed.
        device: to which the other parts are moved.
    """
    parts = {family.variant.transformer: transformer, family.variant.vae: vae, **dict.fromkeys(dropped_parts)}
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(folder, **parts)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and part is not transformer:
            part.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def first_frame(path: Path, size: tuple[int, int]) -> Image.Image:
    """An image, or a clip's first frame, cropped and resized as a clip of training is.

    Args:
        size: (height, width).

    Raises:
        UserError: it can't be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file", "give an image or a clip")
    try:
        frame = read_first(path, size)
    except (Unreadable, OSError) as error:
        raise UserError(f"{path}: {error}", "give an image or a clip") from error
    return Image.fromarray(frame.permute(1, 2, 0).numpy())


def call(pipeline: Any, arguments: dict[str, Any], generator: torch.Generator, advance: Callable[[], None]) -> np.ndarray:
    """Run a diffusers pipeline once.

    Args:
        arguments: beside the generator.
        advance: called after every denoising step.

    Returns:
        [F, H, W, 3] uint8.
    """

    def step_done(_pipeline: Any, _step: int, _timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        advance()
        return kept

    made = pipeline(**arguments, generator=generator, output_type="pt", callback_on_step_end=step_done).frames
    # [F, 3, H, W] in [0, 1]. Weights that have diverged give black, not the noise that a cast from NaN would be.
    video = made[0].float().nan_to_num()
    return (video.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
