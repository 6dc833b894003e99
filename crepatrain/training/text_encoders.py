"""Text encoders, loaded for the texts of a dataset or of a video and given up behind them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from crepatrain.config.fields import TextQuantization
from crepatrain.families.base import Family
from crepatrain.placement.inference import is_offloaded, place_frozen, weights_bytes
from crepatrain.placement.placing import free_memory
from crepatrain.placement.precision import encoding_dtype
from crepatrain.placement.quantizing import quantize_text_model
from crepatrain.screen import Screen
from crepatrain.training.loading import loading

_GIB = 1 << 30


@dataclass(frozen=True)
class TextEncoding:
    """How text encoders are held.

    Attributes:
        offload: text_encoder_offload; quantization: text_encoder_quantization.
    """

    offload: bool | Literal["auto"] = "auto"
    quantization: TextQuantization = "none"


def load_text_encoder(family: Family, folder: Path, device: torch.device, how: TextEncoding, screen: Screen) -> Any:
    """Tokenizers and text encoders on the device, as `encode_text` of the family takes them.

    Args:
        folder: of the pipeline.

    Raises:
        UserError: a file of theirs is missing or damaged.
    """
    with loading(folder, family.variant.text_parts):
        encoder = family.load_text_encoder(str(folder), encoding_dtype(device))
    models = family.text_models(encoder)
    for model in models:
        quantize_text_model(model, how.quantization, device)
    offload = is_offloaded(how.offload, models, device)
    if offload:
        screen.say(
            f"text_encoder_offload: the text encoder's {weights_bytes(models) / _GIB:.1f} GiB stay in host memory, and each "
            "block is copied to the device ahead of its use"
        )
    place_frozen(models, device, offload=offload)
    return encoder


def encode_prompts(
    family: Family, folder: Path, device: torch.device, how: TextEncoding, prompt: str, negative: str, screen: Screen
) -> dict[str, Tensor]:
    """The arguments of the family's pipeline for a prompt and a negative one, on the device."""
    encoder = load_text_encoder(family, folder, device, how, screen)
    with torch.no_grad():
        texts: Sequence[dict[str, Tensor]] = [family.encode_text(encoder, [prompt])[0], family.encode_negative(encoder, negative)]
    del encoder
    free_memory()
    # Collated on the host, as the masks that it makes are there.
    text, other = (family.collate_text([{name: tensor.cpu() for name, tensor in one.items()}]) for one in texts)
    return {name: tensor.to(device) for name, tensor in family.text_arguments(text, other).items()}
