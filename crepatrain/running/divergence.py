"""What a step was trained on whose numbers are not finite, kept for inspection."""

import json
from collections.abc import Sequence
from dataclasses import replace

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from crepatrain.files import written_aside
from crepatrain.records.layout import RunLayout
from crepatrain.tensors import Batch

# Of the text and the conditioning of one step; without them the draws are still there, and the captions' own files.
_LARGEST_EXTRAS = 256 << 20


def draws_of(batch: Batch) -> Batch:
    """What is kept of a micro-batch until its numbers are known: all but what a teacher looks at, which is large."""
    return replace(batch, teacher=None, pixels=None)


def keep_batches(layout: RunLayout, step: int, batches: Sequence[Batch], process: int | None) -> str:
    """Write the micro-batches of an optimizer step beside status.json: `0.latents`, `0.noise`, `0.sigma`, `0.text.NAME` ...

    The header holds the step and the names of the samples of each micro-batch.

    Args:
        step: as it is named to the user, from 1.
        process: this one's number where several train together.

    Returns:
        Where they are, or why they are not, as part of a sentence.
    """
    tensors: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        own = {"latents": batch.latents, "noise": batch.noise, "sigma": batch.sigma}
        tensors |= {f"{number}.{name}": tensor for name, tensor in own.items()}
        extras |= {f"{number}.text.{name}": tensor for name, tensor in batch.text.items()}
        extras |= {f"{number}.conditioning.{name}": tensor for name, tensor in batch.conditioning.items()}
    if sum(tensor.nbytes for tensor in extras.values()) <= _LARGEST_EXTRAS:
        tensors |= extras
    header = {
        "step": str(step),
        "samples": json.dumps([batch.keys for batch in batches], ensure_ascii=False),
        "fps": json.dumps([batch.fps for batch in batches]),
    }
    path = layout.diverged(step, process)
    try:
        with written_aside(path) as aside:
            # Copies: a tensor that shares its memory with another can't be written.
            save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, aside, header)
    except (OSError, SafetensorError) as error:
        return f"its batch could not be kept ({error})"
    return f"its batch is kept in {path}"
