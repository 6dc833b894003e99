"""Videos of trained weights beside those of their base: one pipeline, in which the weights are exchanged."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from crepatrain.config.sources import BASE_KEY, fetch
from crepatrain.errors import UserError
from crepatrain.families.base import Family
from crepatrain.sampling.pipeline import call


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A base, and what was trained on it.

    Attributes:
        base, revision: a pipeline folder, or a hub id with its revision.
        adapters: label -> file; empty where the whole transformer was trained.
        transformer: the folder of a whole transformer that was trained; None for adapters.
    """

    family: Family
    base: str
    revision: str | None
    adapters: Mapping[str, Path]
    transformer: Path | None


@dataclass(frozen=True)
class Candidate:
    """One of the videos that are compared: of an adapter, or of a whole transformer, at a strength; of the base at 0.

    Attributes:
        adapter: a label among the model's adapters; None for the base and for a whole transformer.
    """

    label: str
    adapter: str | None
    strength: float

    def __str__(self) -> str:
        return self.label if self.strength in {0.0, 1.0} else f"{self.label} x {self.strength:g}"


def candidates(model: TrainedModel, strengths: Sequence[float]) -> list[Candidate]:
    """The base, then every adapter at every strength, or the whole transformer."""
    trained = [(label, label) for label in model.adapters] or [("trained", None)]
    return [
        Candidate("base", None, 0.0),
        *(Candidate(label, adapter, strength) for label, adapter in trained for strength in strengths),
    ]


def open_pipeline(model: TrainedModel, device: torch.device) -> Any:
    """The family's pipeline with the trained weights loaded; where there is a GPU, its parts are moved there one at a time.

    Raises:
        UserError: diffusers can't sample the base.
    """
    family = model.family
    if family.variant.sampling.impossible:
        raise UserError(f"{model.base}: {family.variant.sampling.impossible}", "sample with another base")
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    parts = {}
    if model.transformer:
        parts[family.variant.transformer] = family.load_transformer(str(model.transformer.parent), dtype)
    kind = getattr(diffusers, family.pipeline)
    pipeline = kind.from_pretrained(_base_folder(model), torch_dtype=dtype, **parts)
    pipeline.set_progress_bar_config(disable=True)
    _set_tiled_attention(family, getattr(pipeline, family.variant.transformer), compiled=cuda)
    second = {"load_into_transformer_2": True} if family.variant.expert == "low" else {}
    for label, path in model.adapters.items():
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=_adapter_name(label), **second)
    if cuda:
        pipeline.enable_model_cpu_offload()
    return pipeline


def _set_tiled_attention(family: Family, transformer: Any, *, compiled: bool) -> None:
    """Let attention over tiles (NABLA) skip what its mask leaves out, which it does only once it is compiled, as on every GPU."""
    if family.geometry.tile == 1:
        return
    family.set_attention(transformer)
    if compiled:
        for block in family.blocks(transformer):
            block.compile()


def sample_candidate(
    pipeline: Any,
    model: TrainedModel,
    candidate: Candidate,
    arguments: Mapping[str, Any],
    seed: int,
    advance: Callable[[], None],
) -> np.ndarray:
    """One video [F, H, W, 3] uint8.

    Args:
        pipeline: of `open_pipeline`.
        arguments: of the pipeline, beside the generator.
        advance: called after every denoising step.
    """
    generator = torch.Generator().manual_seed(seed)
    with _weights_of(pipeline, model, candidate):
        return call(pipeline, dict(arguments), generator, advance)


@contextmanager
def _weights_of(pipeline: Any, model: TrainedModel, candidate: Candidate) -> Iterator[None]:
    """The pipeline with the weights of a candidate."""
    trained = getattr(pipeline, model.family.variant.transformer)
    if model.adapters:
        if candidate.adapter is None:
            trained.disable_adapters()
        else:
            trained.enable_adapters()
            trained.set_adapters([_adapter_name(candidate.adapter)], [candidate.strength])
        yield
    elif candidate.strength:
        yield
    else:
        own = model.family.load_transformer(str(_base_folder(model)), trained.dtype)
        _set_tiled_attention(model.family, own, compiled=_is_offloaded(pipeline))
        _exchange_transformer(pipeline, model, own)
        try:
            yield
        finally:
            _exchange_transformer(pipeline, model, trained)


def _exchange_transformer(pipeline: Any, model: TrainedModel, transformer: Any) -> None:
    """Put another transformer into the pipeline, and under its offloading."""
    offloaded = _is_offloaded(pipeline)
    if offloaded:
        pipeline.remove_all_hooks()
    setattr(pipeline, model.family.variant.transformer, transformer)
    if offloaded:
        pipeline.enable_model_cpu_offload()


def _is_offloaded(pipeline: Any) -> bool:
    return bool(getattr(pipeline, "_all_hooks", ()))


def _base_folder(model: TrainedModel) -> Path:
    """The base's local folder, with all parts of its pipeline; some repositories hold much more than these."""
    parts = [name for name, kind in model.family.checkpoint.model_index.items() if isinstance(kind, list) and any(kind)]
    patterns = ("model_index.json", *(f"{part}/*" for part in parts or model.family.variant.parts))
    return fetch(BASE_KEY, model.base, model.revision, patterns)


def _adapter_name(label: str) -> str:
    """The name under which peft keeps an adapter, without spaces."""
    return label.replace(" ", "-")
