"""Frames from a diffusers pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from crepatrain.data.decode import Unreadable, read_frames
from crepatrain.errors import UserError


def first_frame(path: Path, size: tuple[int, int]) -> Image.Image:
    """An image, or a clip's first frame, as a clip of training is cropped and resized to (height, width).

    Raises:
        UserError: it can't be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file", "give an image or a clip")
    try:
        frame = read_frames(path, (0,), size)[0]
    except (Unreadable, OSError) as error:
        raise UserError(f"{path}: {error}", "give an image or a clip") from error
    return Image.fromarray(frame.permute(1, 2, 0).numpy())


def call(pipeline: Any, arguments: dict[str, Any], generator: torch.Generator, advance: Callable[[], None]) -> np.ndarray:
    """One run of a diffusers pipeline.

    Returns:
        [F, H, W, 3] uint8.
    """

    def step_done(_pipeline: Any, _step: int, _timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        advance()
        return kept

    made = pipeline(**arguments, generator=generator, output_type="pt", callback_on_step_end=step_done).frames
    # [F, 3, H, W] in [0, 1]; weights that have diverged make black rather than the noise of a cast from NaN.
    video = made[0].float().nan_to_num()
    return (video.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
