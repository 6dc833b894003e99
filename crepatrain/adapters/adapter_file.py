"""An adapter file of any program: what its keys mean, and which model it is for."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from crepatrain.errors import UserError
from crepatrain.families import family_class, get_family
from crepatrain.families.base import Family
from crepatrain.integrity import DIGEST_KEY, Damaged, sealed_metadata
from crepatrain.specs import FAMILIES, Checkpoint, Expert, Unsupported, WrongContent

# How the keys of a pair end, as different programs write them; the most common first.
ENDS: Mapping[str, Literal["down", "up", "alpha"]] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".alpha": "alpha",
}
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer_2.",
    "transformer.",
    "lora_unet_",
    "lycoris_",
    "pipe.dit.",
    "unet.",
)
KOHYA = ("lora_unet_", "lycoris_")


@dataclass(eq=False)
class Pair:
    """What a file holds for one layer, under one name.

    Attributes:
        prefix, name: its keys begin with the prefix, then the name.
        down, up: lora_A [r, in] and lora_B [out, r], or those of a convolution; None: it is missing.
        ends: how the two keys end.
    """

    prefix: str
    name: str
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    ends: tuple[str, ...] = ()

    @property
    def rank(self) -> int | None:
        return self.down.shape[0] if self.down is not None and self.down.ndim else None

    @property
    def scale(self) -> float:
        """alpha / rank; 1 without an alpha, which then equals the rank."""
        return 1.0 if self.alpha is None or not self.rank else self.alpha / self.rank

    @property
    def complete(self) -> bool:
        return self.down is not None and self.up is not None


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """A safetensors file, read.

    Attributes:
        pairs: by what their keys begin with.
        other_keys: keys that belong to no pair.
        sealed: whether its header has a digest, which is right; False of the files of other programs and earlier versions.
    """

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    pairs: Mapping[str, Pair]
    other_keys: tuple[str, ...]
    sealed: bool = False

    @property
    def ranks(self) -> Counter[int]:
        return Counter(pair.rank for pair in self.pairs.values() if pair.rank is not None)

    def recipe(self) -> dict[str, Any]:
        """What this trainer has written about the run; empty for the files of other programs and of unknown families."""
        try:
            found = json.loads(self.metadata.get("crepatrain.recipe", "{}"))
        except ValueError:
            return {}
        return found if isinstance(found, dict) and found.get("family") in list(FAMILIES) else {}

    @property
    def experts(self) -> dict[str, Expert]:
        """Which of two experts the file is for, by its header and by its name; without those that name none."""
        header = self.metadata.get("crepatrain.expert") or self.recipe().get("expert")
        found: dict[str, Expert] = {}
        for expert in get_args(Expert):
            if header == expert:
                found["header"] = expert
            if f"{expert}_noise" in self.path.name:
                found["name"] = expert
        return found

    @property
    def expert(self) -> Expert | None:
        return next((self.experts[where] for where in ("header", "name") if where in self.experts), None)


def end_of(key: str) -> str | None:
    """How a key of a pair ends; None of other keys."""
    return next((end for end in ENDS if key.endswith(end)), None)


def read_adapter(path: Path) -> AdapterFile:
    """Read a file onto the CPU.

    Raises:
        UserError: it can't be read, is not a safetensors file, or is not what its digest was made of.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)  # in the order in which diffusers sees them: it decides by the first key
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} can't be read ({error})", "give a complete .safetensors file") from error
    try:
        sealed = sealed_metadata(path) is not None
    except Damaged as damage:
        fix = f"copy or export it again; if a program changed it on purpose, save it without {DIGEST_KEY}"
        raise UserError(f"{path} is damaged: {damage}", fix) from damage
    pairs: dict[str, Pair] = {}
    other_keys = []
    for key, tensor in tensors.items():
        end = end_of(key)
        if end is None:
            other_keys.append(key)
            continue
        stem = key.removesuffix(end)
        prefix = next((prefix for prefix in _PREFIXES if stem.startswith(prefix)), "")
        pair = pairs.setdefault(stem, Pair(prefix, stem.removeprefix(prefix)))
        if ENDS[end] == "alpha":
            pair.alpha = float(tensor) if tensor.numel() == 1 else float("nan")
        else:
            setattr(pair, ENDS[end], tensor)
            pair.ends += (end,)
    return AdapterFile(path, metadata, tensors, pairs, tuple(other_keys), sealed)


@dataclass(frozen=True)
class Layer:
    """A layer that an adapter may sit on: the shape of its weight, and whether it is a convolution of several groups."""

    shape: tuple[int, ...]
    grouped: bool


class Model:
    """One transformer of a family, by the names and shapes of its layers.

    Args:
        transformer: live, with or without an adapter, or on the meta device.
        title: for people.
    """

    def __init__(self, family: Family, transformer: nn.Module, title: str) -> None:
        self.family = family
        self.title = title
        self.layers: dict[str, Layer] = {}
        for name, module in transformer.named_modules():
            if ".lora_" not in name and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                groups = getattr(module, "groups", 1)
                linear = isinstance(module, nn.Linear)  # whose weight may be packed
                shape = (module.out_features, module.in_features) if linear else tuple(module.weight.shape)
                self.layers[name.removesuffix(".base_layer")] = Layer(shape, groups > 1)
        named_alike = {layer: layer for layer in self.layers}
        self.original = {family.original_name(layer): layer for layer in self.layers} if family.spec.comfyui else named_alike
        self.kohya = {name.replace(".", "_"): layer for name, layer in self.original.items()}

    def find(self, pair: Pair) -> str | None:
        """The layer that a pair is meant for, whichever program can read it."""
        if pair.prefix in KOHYA:
            return self.kohya.get(pair.name)
        if pair.name in self.layers:
            return pair.name
        return self.original.get(pair.name)

    def fits(self, pair: Pair) -> bool:
        """Whether the pair's tensors fit the layer that it is meant for."""
        layer = self.find(pair)
        return layer is not None and shape_mismatch(pair, self.layers[layer]) is None


def shape_mismatch(pair: Pair, layer: Layer) -> str | None:
    """Why the shapes of a pair can't be those of an adapter of a layer; None where they can."""
    if pair.down is None or pair.up is None:
        return None
    down, up = tuple(pair.down.shape), tuple(pair.up.shape)
    found = f"lora_A {list(down)}, lora_B {list(up)} on a weight {list(layer.shape)}"
    if layer.grouped:
        return f"{found}, a convolution of several groups"
    if down[1:] != layer.shape[1:] or up[:1] != layer.shape[:1] or not down:
        return found
    if up[2:] != (1,) * (len(layer.shape) - 2) or len(up) != len(layer.shape):
        return f"{found}, where lora_B must be {[layer.shape[0], 'rank', *(1,) * (len(layer.shape) - 2)]}"
    return None


@cache
def released_models(family: str) -> tuple[Model, ...]:
    """Every model of a family that the package knows, released ones first; built once, as it takes seconds."""
    kind = family_class(family)
    found = {name: get_family(family, shapes.checkpoint) for name, shapes in {**kind.spec.released, **kind.tiny}.items()}
    return tuple(Model(one, one.empty_transformer(), name) for name, one in found.items())


def recognise(file: AdapterFile) -> tuple[Model, bool]:
    """The model that a file is for, by the names of its layers, then by their shapes; and whether most of the shapes fit.

    Raises:
        UserError: no family has layers of these names, or several have and the shapes don't decide which.
    """
    recorded = file.recipe().get("family")
    found: list[tuple[tuple[int, int], Model]] = []
    for family in FAMILIES:
        if recorded in (None, family):
            for model in released_models(family):
                known = sum(model.find(pair) is not None for pair in file.pairs.values())
                fitting = sum(model.fits(pair) for pair in file.pairs.values())
                found.append(((known, fitting), model))
    best = max(score for score, _ in found) if found else (0, 0)
    if best[0] == 0:
        first = next(iter(file.pairs), next(iter(file.tensors), "none"))
        raise UserError(
            f"{file.path}: no layer of {', '.join(FAMILIES)} has a name as in its keys (the first key: {first})",
            "give an adapter of one of these families",
        )
    models = [model for score, model in found if score == best]
    families = sorted({model.family.spec.name for model in models})
    if len(families) > 1:
        raise UserError(f"{file.path}: its keys could be those of {' or '.join(families)}", "give the base with --base")
    return models[0], 2 * best[1] > best[0]


def model_of_folder(base: Path, expert: Expert | None) -> Model:
    """The model of a pipeline folder, or of a transformer's own folder; only its JSON files are read.

    Args:
        expert: for which the adapter is, where the folder has two.

    Raises:
        UserError: the folder holds no model of a known family.
    """
    second = expert == "low" and (base / "transformer_2").is_dir()
    folder = next((base / name for name in ("transformer_2",) * second + ("transformer",) if (base / name).is_dir()), base)
    config = _read_json(folder / "config.json")
    spec = next((spec for spec in FAMILIES.values() if spec.transformer_class == config.get("_class_name")), None)
    if spec is None:
        known = ", ".join(spec.transformer_class for spec in FAMILIES.values())
        raise UserError(f"--base {base}: its transformer is a {config.get('_class_name')}", f"give one of: {known}")
    model_index, vae, scheduler = (
        _read_json(path) if path.is_file() else {}
        for path in (base / "model_index.json", base / "vae" / "config.json", base / "scheduler" / "scheduler_config.json")
    )
    first = spec.first
    checkpoint = Checkpoint(model_index or first.model_index, config, vae or first.vae, scheduler, origin="folder")
    try:
        variant = spec.variant(checkpoint, "low" if second else None)
        family: Family = family_class(spec.name)(checkpoint, variant, variant.tasks[0])
    except Unsupported as error:
        raise UserError(f"--base {base}: {error}", f"give a {spec.title} pipeline") from error
    except WrongContent as error:
        raise UserError(f"--base {base}: a config of its parts is wrong ({error})", f"give a {spec.title} pipeline") from error
    return Model(family, family.empty_transformer(), base.name or str(base))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error})", "give a diffusers pipeline folder") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}", "give a diffusers pipeline folder")
    return values
