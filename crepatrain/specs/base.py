"""The types in which specs say what is known of a family and of its checkpoints without loading them."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from crepatrain.geometry import Geometry

JSON = Mapping[str, Any]
Task = Literal["t2v", "i2v"]
Expert = Literal["high", "low"]

# What a part of a pipeline is for. A text connector stands between the text encoder and the transformer.
Role = Literal[
    "transformer",
    "vae",
    "text_encoder",
    "tokenizer",
    "text_connector",
    "image_encoder",
    "image_processor",
    "scheduler",
]

# Linear layers of an attention of diffusers, and of a block with self-attention and cross-attention.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ATTENTIONS = tuple(f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ATTENTION)


class WrongContent(Exception):
    """A JSON file of a checkpoint does not hold what is read from it: the key, and the value where there is one."""


def whole_number(config: JSON, key: str, default: int | None = None) -> int:
    """The whole number above 0 of a key.

    Args:
        default: where the key is missing; None: it has to be there.

    Raises:
        WrongContent: the key is missing, or holds something else.
    """
    value = _read(config, key, default)
    if not _is_whole(value):
        raise _wrong(key, value, "a whole number above 0")
    return value


def three_whole_numbers(config: JSON, key: str) -> tuple[int, int, int]:
    """The list of three whole numbers above 0 of a key, such as a patch's (time, height, width).

    Raises:
        WrongContent: the key is missing, or holds something else.
    """
    value = _read(config, key)
    if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(map(_is_whole, value)):
        raise _wrong(key, value, "a list of three whole numbers above 0")
    first, second, third = value
    return first, second, third


def switches(config: JSON, key: str) -> Sequence[bool]:
    """The list of true and false of a key.

    Raises:
        WrongContent: the key is missing, or holds something else.
    """
    value = _read(config, key)
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, bool) for entry in value):
        raise _wrong(key, value, "a list of true and false")
    return value


def number(config: JSON, key: str, default: float) -> float:
    """The number of a key, between -100 and 100; the default where the key is missing.

    Raises:
        WrongContent: the key holds something else.
    """
    value = _read(config, key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -100 <= value <= 100:
        raise _wrong(key, value, "a number between -100 and 100")
    return value


def has_part(model_index: JSON, part: str) -> bool:
    """Whether a pipeline has a part that some pipelines of its class lack; `[null, null]` is written for a part that is absent.

    Raises:
        WrongContent: the entry is not the library and the class of a part.
    """
    value = model_index.get(part)
    if value is not None and not isinstance(value, (list, tuple)):
        raise _wrong(part, value, "the library and the class of a part")
    return any(value or ())


def _read(config: JSON, key: str, default: Any = None) -> Any:
    if key not in config and default is None:
        raise WrongContent(f"{key} is missing")
    return config.get(key, default)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _wrong(key: str, value: Any, expected: str) -> WrongContent:
    return WrongContent(f"{key}={json.dumps(value, default=str)} is not {expected}")


def usual_parts(transformer: str = "transformer", **more: Role) -> dict[str, Role]:
    """`Variant.parts` of a pipeline with one text encoder.

    Args:
        transformer: folder of the one that is trained.
        more: role of every further folder.
    """
    return {
        transformer: "transformer",
        "vae": "vae",
        "text_encoder": "text_encoder",
        "tokenizer": "tokenizer",
        "scheduler": "scheduler",
        **more,
    }


@dataclass(frozen=True)
class Checkpoint:
    """The JSON files of a pipeline.

    Attributes:
        transformer: config of the transformer that is trained.
        origin: folder, hub, or package where the files were not asked for and the package's own table stands in for them.
    """

    model_index: JSON
    transformer: JSON
    vae: JSON
    scheduler: JSON
    origin: str

    def flow_shift(self, tokens: int) -> float:
        """The shift of the noise levels at which clips of that many tokens are sampled.

        Raises:
            WrongContent: the scheduler's config holds no such numbers.
        """
        scheduler = self.scheduler
        if not scheduler.get("use_dynamic_shifting"):
            given = [key for key in ("flow_shift", "shift") if scheduler.get(key)]
            return float(number(scheduler, given[0], 1.0)) if given else 1.0
        first, last = whole_number(scheduler, "base_image_seq_len", 256), whole_number(scheduler, "max_image_seq_len", 4096)
        low, high = number(scheduler, "base_shift", 0.5), number(scheduler, "max_shift", 1.15)
        if first >= last:
            raise WrongContent(f"base_image_seq_len={first} is not below max_image_seq_len={last}")
        return math.exp(low + (high - low) * (tokens - first) / (last - first))


@dataclass(frozen=True)
class ModelShapes:
    """The configs of one model, released or tiny.

    Attributes:
        repo: on the hub; None for a tiny model, which only exists with random weights.
        model_index: its entries beside the names of the parts.
    """

    repo: str | None
    transformer: JSON
    vae: JSON
    scheduler: JSON
    model_index: JSON = field(default_factory=dict)

    @property
    def checkpoint(self) -> Checkpoint:
        """The same as if it had been read from a pipeline's files."""
        return Checkpoint(self.model_index, self.transformer, self.vae, self.scheduler, origin="package")


@dataclass(frozen=True)
class Sampling:
    """The arguments with which a model's own pipeline is best called.

    Attributes:
        guidance: `guidance_scale`; of two experts the high-noise one's.
        guidance_2: of the low-noise expert; None where there is one transformer.
        decode: arguments of the pipeline that only its VAE needs.
        impossible: why diffusers can't sample the checkpoint; None where it can.
    """

    steps: int = 50
    guidance: float = 5.0
    guidance_2: float | None = None
    negative_prompt: str = ""
    decode: JSON = field(default_factory=dict)
    impossible: str | None = None


@dataclass(frozen=True)
class Variant:
    """What one checkpoint is among those of its family.

    Attributes:
        title: for people.
        tasks: what it can be trained for, its own first.
        parts: the folders that training reads, each with its role. One of them is the transformer, and one the VAE; text
            encoders and tokenizers may be several.
        size: (height, width, num_frames) where the config gives none.
        fps: frames per second that it was trained at.
        expert: which of two transformers is trained; None where there is one.
        sigmas: the noise levels that this transformer denoises.
        images: whether one-frame clips can train it.
        sampling: how it is sampled.
        architecture: its name in the metadata of shared adapter files.
        pipeline: the class that does every task; None: the family's of the task.
        text_length: tokens of a caption at most; None: the family's.
    """

    title: str
    tasks: tuple[Task, ...]
    parts: Mapping[str, Role]
    size: tuple[int, int, int]
    fps: float
    expert: Expert | None = None
    sigmas: tuple[float, float] = (0.0, 1.0)
    images: bool = True
    sampling: Sampling = Sampling()
    architecture: str = field(kw_only=True)
    pipeline: str | None = None
    text_length: int | None = None

    def folders(self, *roles: Role) -> tuple[str, ...]:
        """The parts of some roles, in the order of `parts`."""
        return tuple(folder for folder, role in self.parts.items() if role in roles)

    @property
    def transformer(self) -> str:
        """The part that is trained."""
        (folder,) = self.folders("transformer")
        return folder

    @property
    def vae(self) -> str:
        """The part that encodes and decodes clips."""
        (folder,) = self.folders("vae")
        return folder

    @property
    def weights(self) -> tuple[str, ...]:
        """The parts that hold safetensors."""
        return self.folders("transformer", "vae", "text_encoder", "text_connector", "image_encoder")

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The parts that decide how a caption is encoded."""
        return self.folders("text_encoder", "tokenizer", "text_connector")

    @property
    def image_parts(self) -> tuple[str, ...]:
        """The parts that decide how a clip's first frame is encoded."""
        return self.folders("vae", "image_encoder", "image_processor")


class Unsupported(Exception):
    """A checkpoint that can't be trained, with the reason."""


@dataclass(frozen=True)
class TextParameters:
    """Numbers in text encoders.

    Attributes:
        total: of all of them.
        outside: that are in no block, as the table of words.
        largest: of the largest block; of several encoders, or of one with several lists of blocks, the sum.
    """

    total: int
    outside: int
    largest: int


@dataclass(frozen=True)
class FamilySpec:
    """One DiT family. The code that handles its tensors is the module of its name in `crepatrain.families`.

    Attributes:
        title: for people.
        transformer_class: its name in diffusers.
        pipelines: the pipeline class of every task, of a variant that has none of its own.
        default_block: `crepa_block_index` where the config gives none.
        lora_targets: names of the Linear layers that LoRA adapts by default, matched at the end of a module's name.
        linears: every Linear layer that a block may have, by its name inside the block.
        blocks: attribute of the transformer that holds its blocks.
        depth_key: of the transformer's config: how many blocks it has.
        block_parts: attributes of a block that hold its self-attention, its cross-attention and its feed-forward, which
            `nested_checkpointing` computes again one by one.
        unmasked_attentions: names of the attention modules that are given no mask, at the end of a module's name; a kernel of
            `attention_backend` is set on these alone. Empty: it has none.
        text_length: tokens of a caption at most, of a variant that has no number of its own.
        text_parameters: of the released models' text encoders together, counted.
        text_is_padded: whether captions of several lengths fit into one batch.
        geometry: computes strides, patch and depth from a checkpoint's transformer and VAE config. Raises WrongContent.
        variant: decides what a checkpoint is; with two experts, for one of them. Raises Unsupported and WrongContent.
        released: released models by name.
        comfyui: prefixes that the keys of an adapter file may have for ComfyUI, before the original's names; empty: ComfyUI
            has no such model.
        comfyui_since: month of the first ComfyUI that knows the model; None where any recent one does.
        diffusers_translates_lora: whether diffusers translates the original's names of layers in an adapter file, with their
            .alpha; otherwise it accepts no .alpha.
        sees_fps: whether the transformer is told the rate of a clip, which is then one for all of a batch.
    """

    name: str
    title: str
    transformer_class: str
    pipelines: Mapping[Task, str]
    default_block: int
    lora_targets: tuple[str, ...]
    linears: tuple[str, ...]
    blocks: str
    depth_key: str
    block_parts: tuple[str, ...]
    unmasked_attentions: tuple[str, ...]
    text_length: int
    text_parameters: TextParameters
    text_is_padded: bool
    geometry: Callable[[JSON, JSON], Geometry]
    variant: Callable[[Checkpoint, Expert | None], Variant]
    released: Mapping[str, ModelShapes]
    comfyui: tuple[str, ...] = ("diffusion_model.", "lora_unet_")
    comfyui_since: str | None = None
    diffusers_translates_lora: bool = False
    sees_fps: bool = False

    def pipeline_of(self, variant: Variant, task: Task) -> str:
        """The pipeline class that samples a variant, and that training feeds the transformer like."""
        return variant.pipeline or self.pipelines[task]

    def text_length_of(self, variant: Variant) -> int:
        """Tokens of a caption at most."""
        return variant.text_length or self.text_length

    def default_variant(self) -> Variant:
        """Of the first released model."""
        return self.variant(self.first.checkpoint, None)

    @property
    def first(self) -> ModelShapes:
        """The first released model."""
        return next(iter(self.released.values()))
