"""Complete pipeline folders with random weights, in the very format of a released checkpoint."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from crepatrain.families.base import Family
from crepatrain.specs.base import ModelShapes

_SHARD_BYTES = 2 << 30


def write_random_pipeline(
    family: type[Family],
    folder: Path,
    shapes: ModelShapes,
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Write a diffusers pipeline folder and `encoder/`, a tiny DINOv2 in transformers' format, beside its parts.

    Args:
        shapes: of a released model, then in bf16, or of a tiny one, then in fp32. Written shard by shard, so that a model larger
            than the memory can be made.
        seed: of the weights.
        progress: called with the name of each part before it is written.
    """
    parts = family.random_parts(shapes)
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if shapes.repo is None else torch.bfloat16
    for name, (kind, config) in parts.models.items():
        progress(name)
        _write_model(kind, config, folder / name, generator, torch.float32 if name == "vae" else dtype)
    for name, part in parts.saved.items():
        progress(name)
        _randomize(part, generator)
        part.save_pretrained(folder / name)
    variant = family.spec.variant(shapes.checkpoint, None)
    pipeline = family.spec.pipeline_of(variant, variant.tasks[0])
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **shapes.model_index}
    index |= {name: ["diffusers", kind.__name__] for name, (kind, _) in parts.models.items()}
    index |= {name: [_library(part), type(part).__name__] for name, part in parts.saved.items()}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    progress("encoder")
    write_random_encoder(folder / "encoder", generator)


def write_random_encoder(folder: Path, generator: torch.Generator) -> None:
    """A tiny DINOv2 with patches of 14 pixels and E = 48."""
    model: Any = Dinov2Model(
        Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14)
    )
    _randomize(model, generator)
    with torch.no_grad():  # the patches of a trained encoder share a component, which is the first thing that a projector learns
        model.layernorm.bias.normal_(generator=generator)
    model.save_pretrained(folder)


def _library(part: Any) -> str:
    return type(part).__module__.split(".", maxsplit=1)[0]


def _write_model(
    kind: type[Any], config: Mapping[str, Any], folder: Path, generator: torch.Generator, dtype: torch.dtype
) -> None:
    with torch.device("meta"):
        model = kind.from_config(dict(config))
    model.save_config(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        bytes_here = math.prod(shape) * dtype.itemsize
        if size + bytes_here > _SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += bytes_here
    stem, total = "diffusion_pytorch_model", len(shards)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}.safetensors" if total == 1 else f"{stem}-{number:05d}-of-{total:05d}.safetensors"
        tensors = {name: _random_tensor(name, shapes[name], generator).to(dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if total > 1:
        size = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _randomize(part: Any, generator: torch.Generator) -> None:
    if not isinstance(part, torch.nn.Module):
        return
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            parameter.copy_(_random_tensor(name, parameter.shape, generator))


def _random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Matrices keep the variance of what they multiply; norms start at 1, biases near 0; none is zero and so dead."""
    leaf = name.rsplit(".", maxsplit=1)[-1]
    if leaf == "bias":
        return torch.randn(shape, generator=generator) * 0.02
    if len(shape) >= 2 and leaf == "weight":
        fan_in = math.prod(shape[1:])
        return torch.randn(shape, generator=generator) * fan_in**-0.5
    if leaf in {"weight", "gamma", "lambda1", "latents_std"}:
        return torch.ones(shape)
    return torch.randn(shape, generator=generator) * 0.02
