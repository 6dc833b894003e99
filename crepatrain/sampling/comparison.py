"""Videos of trained weights beside those of their base: one pipeline, in which the weights are exchanged."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from torch import nn

from crepatrain.config.fields import Quantization
from crepatrain.config.sources import BASE_KEY, fetch
from crepatrain.errors import UserError
from crepatrain.families.autoencoders import tile_vae
from crepatrain.families.base import Family
from crepatrain.families.reading import read_diffusers
from crepatrain.placement.inference import is_offloaded, place_frozen, weights_bytes
from crepatrain.placement.placing import free_memory
from crepatrain.placement.precision import encoding_dtype
from crepatrain.placement.quantizing import load_quantized
from crepatrain.sampling.pipeline import call
from crepatrain.screen import Screen
from crepatrain.specs.base import has_part
from crepatrain.training.text_encoders import TextEncoding, encode_prompts

_GIB = 1 << 30


@dataclass(frozen=True)
class Held:
    """How the parts of a model are held.

    Attributes:
        text: of the text encoder.
        vae_tiling: whether videos are decoded in tiles.
        base_quantization: of the blocks of its transformers.
        offload: whether the weights of these blocks stay in host memory; auto: where they do not fit on the device.
    """

    text: TextEncoding = field(default_factory=TextEncoding)
    vae_tiling: bool = False
    base_quantization: Quantization = "none"
    offload: bool | Literal["auto"] = "auto"


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A base, and what was trained on it.

    Attributes:
        base, revision: a pipeline folder, or a hub id with its revision.
        adapters: label -> file; empty where the whole transformer was trained.
        transformer: the folder of a whole transformer that was trained; None for adapters.
        held: how its parts are held while videos are made.
    """

    family: Family
    base: str
    revision: str | None
    adapters: Mapping[str, Path]
    transformer: Path | None
    held: Held = field(default_factory=Held)


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


def encode_texts(model: TrainedModel, prompt: str, negative: str, device: torch.device, screen: Screen) -> dict[str, Any]:
    """The arguments of the pipeline for a prompt and a negative one.

    The text encoder is given up before any other part is loaded.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    _expect_possible(model)
    return encode_prompts(model.family, _base_folder(model), device, model.held.text, prompt, negative, screen) | {
        "prompt": None,
        "negative_prompt": None,
    }


def open_pipeline(model: TrainedModel, device: torch.device, screen: Screen) -> Any:
    """The family's pipeline for encoded prompts, with the trained weights loaded.

    Where there is a GPU, its parts are moved there one at a time, and a transformer that does not fit there block by block.

    Raises:
        UserError: diffusers can't sample the base.
    """
    _expect_possible(model)
    family, folder, trained = model.family, _base_folder(model), model.family.variant.transformer
    cuda = device.type == "cuda"
    parts: dict[str, Any] = dict.fromkeys(family.variant.text_parts)
    for name in _transformers(model):
        source = model.transformer if model.transformer and name == trained else folder / name
        if (model.transformer and name == trained) or model.held.base_quantization != "none":
            parts[name] = _load_transformer(model, source, device)
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(folder, torch_dtype=encoding_dtype(device), **parts)
    pipeline.set_progress_bar_config(disable=True)
    second = {"load_into_transformer_2": True} if family.variant.expert == "low" else {}
    for label, path in model.adapters.items():
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=_adapter_name(label), **second)
    if model.held.vae_tiling:
        tile_vae(pipeline.vae)
    transformers = [getattr(pipeline, name) for name in _transformers(model)]
    largest = max(transformers, key=lambda transformer: weights_bytes([transformer]))  # one is on the device at a time
    offload = is_offloaded(model.held.offload, [largest], device)
    if offload:
        size = f"{weights_bytes([largest]) / _GIB:.1f} GiB"
        screen.say(f"the transformer's {size} stay in host memory, and each block is copied to the device ahead of its use")
        place_frozen(transformers, device, offload=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module) and part not in transformers:
                part.to(device)
    elif cuda:
        pipeline.enable_model_cpu_offload()
    _set_tiled_attention(family, getattr(pipeline, trained), compiled=cuda)
    return pipeline


def _expect_possible(model: TrainedModel) -> None:
    impossible = model.family.variant.sampling.impossible
    if impossible:
        raise UserError(f"{model.base}: {impossible}", "sample with another base")


def _transformers(model: TrainedModel) -> list[str]:
    """The names of the parts of the base's pipeline that are transformers: two where there are two experts."""
    return ["transformer", *(["transformer_2"] if has_part(model.family.checkpoint.model_index, "transformer_2") else [])]


def _load_transformer(model: TrainedModel, folder: Path, device: torch.device) -> Any:
    """A transformer of the base's kind on the CPU, quantised as it is asked.

    Args:
        folder: of its files.
    """
    family, how, dtype = model.family, model.held.base_quantization, encoding_dtype(device)
    if how == "none":
        return read_diffusers(family.transformer_class, str(folder.parent), folder.name, dtype)
    return load_quantized(family, str(folder.parent), dtype, how, device, stays=False, part=folder.name)


def _set_tiled_attention(family: Family, transformer: Any, *, compiled: bool) -> None:
    """Let attention over tiles (NABLA) skip what its mask leaves out, which it does only once it is compiled, as on every GPU."""
    if family.geometry.tile == 1:
        return
    family.set_attention(transformer)
    if compiled:
        for block in family.blocks(transformer):
            block.forward = torch.compile(block.forward)  # without the hooks of a ring, which have no place in a graph


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
        device = pipeline._execution_device
        own = _load_transformer(model, _base_folder(model) / model.family.variant.transformer, device)
        if any(parameter.is_meta for parameter in trained.parameters()):  # as its blocks' weights are in host memory
            place_frozen([own], device, offload=True)
        _set_tiled_attention(model.family, own, compiled=device.type == "cuda")
        _exchange_transformer(pipeline, model, own)
        try:
            yield
        finally:
            _exchange_transformer(pipeline, model, trained)
            del own
            free_memory()


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
