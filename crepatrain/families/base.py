"""The interface of a family, and what all families do alike."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from crepatrain.errors import UserError
from crepatrain.families.attention import set_backends
from crepatrain.families.reading import read_diffusers
from crepatrain.geometry import TokenGrid
from crepatrain.specs.base import Checkpoint, FamilySpec, ModelShapes, Task, Variant
from crepatrain.tensors import Batch

# Of a flow-matching scheduler: sigma 1 is timestep 1000.
TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True, eq=False)
class PipelineParts:
    """The parts of a pipeline that will be written with random weights.

    Attributes:
        models: folder -> (class of diffusers, its config).
        saved: folder -> an object with `save_pretrained`: text encoder, tokenizer, scheduler.
    """

    models: Mapping[str, tuple[type[Any], Mapping[str, Any]]]
    saved: Mapping[str, Any]


@dataclass(frozen=True)
class CutCaption:
    """A caption that is longer than the text encoder reads.

    Attributes:
        tokens: of all of it, with the tokenizer's own.
        read: how many of them are read.
        ending: the last words that are read.
    """

    tokens: int
    read: int
    ending: str


def last_words(text: str, words: int = 6, characters: int = 60) -> str:
    """The end of a text, for a message."""
    return " ".join(text.split()[-words:])[-characters:]


class Family(ABC):
    """One DiT family, as one of its checkpoints is. It loads modules and takes them as arguments, and keeps none.

    Attributes:
        transformer_class, vae_class: of diffusers.
        tiny: small models by name, the plainest first: one of every variant, with random weights, for tests and demos.
    """

    spec: ClassVar[FamilySpec]
    transformer_class: ClassVar[Any]
    vae_class: Any
    tiny: ClassVar[Mapping[str, ModelShapes]]

    def __init__(self, checkpoint: Checkpoint, variant: Variant, task: Task) -> None:
        self.checkpoint = checkpoint
        self.variant = variant
        self.task: Task = task
        self.geometry = self.spec.geometry(checkpoint.transformer, checkpoint.vae)

    @property
    def pipeline(self) -> str:
        """The class of diffusers that samples the checkpoint, and that training feeds the transformer like."""
        return self.spec.pipeline_of(self.variant, self.task)

    @property
    def text_length(self) -> int:
        """Tokens of a caption at most."""
        return self.spec.text_length_of(self.variant)

    def untrainable(self, device: torch.device) -> str | None:  # noqa: ARG002 - most train everywhere
        """Why the checkpoint can't be trained on a device; None where it can."""
        return None

    def load_transformer(self, path: str, dtype: torch.dtype) -> Any:
        """The transformer of a local pipeline folder with its weights, in eval mode."""
        return read_diffusers(self.transformer_class, path, self.variant.transformer, dtype)

    def empty_transformer(self) -> Any:
        """The transformer on the meta device, for counting and planning."""
        with torch.device("meta"):
            return self.transformer_class.from_config(dict(self.checkpoint.transformer))

    def shallow_transformer(self, device: torch.device) -> Any:
        """The transformer with random weights and one block, as wide as it is, for trying that block."""
        with device:
            return self.transformer_class.from_config({**self.checkpoint.transformer, self.spec.depth_key: 1})

    def set_attention(self, transformer: Any, backend: str | None = None) -> None:
        """Set a backend of diffusers on the attentions that are given no mask, and torch's own on the others.

        No other module of the process is touched, and no default of the process reaches this transformer.

        Raises:
            ValueError, RuntimeError: a backend that diffusers does not have, or whose package is not installed.
        """
        set_backends(transformer, lambda name: self.backend_of(name, backend))

    def backend_of(self, attention: str, backend: str | None) -> str:
        """What computes one attention of the transformer.

        Args:
            attention: the module's name.
            backend: the chosen one; None: torch's own.
        """
        unmasked = attention.rpartition(".")[2] in self.spec.unmasked_attentions
        return backend if backend and unmasked else "native"

    def load_vae(self, path: str, dtype: torch.dtype) -> Any:
        """The VAE with its weights, frozen, in eval mode."""
        return read_diffusers(self.vae_class, path, self.variant.vae, dtype).requires_grad_(False)

    def empty_vae(self) -> Any:
        """The VAE on the meta device."""
        with torch.device("meta"):
            return self.vae_class.from_config(dict(self.checkpoint.vae)).requires_grad_(False)

    @abstractmethod
    def load_text_encoder(self, path: str, dtype: torch.dtype) -> Any:
        """Tokenizers and text encoders, as `encode_text` takes them: a pipeline of diffusers without its other parts."""

    @staticmethod
    def text_models(text_encoder: Any) -> list[nn.Module]:
        """The models in what `load_text_encoder` returned."""
        return [part for part in text_encoder.components.values() if isinstance(part, nn.Module)]

    def load_image_encoder(self, path: str, dtype: torch.dtype) -> Any:  # noqa: ARG002 - few have one
        """The model that encodes the first frame beside the VAE; None where there is none."""
        return None

    def count_tokens(self, path: str, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, for a family whose batches only hold captions of one length."""
        raise NotImplementedError

    def cut_captions(self, path: str, captions: Sequence[str]) -> list[CutCaption | None]:
        """What is lost of each caption that is longer than the text encoder reads; None of one that is read to its end.

        Args:
            path: of a pipeline's folder, whose tokenizers are loaded.
        """
        tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
        texts, limit = [self.caption_text(caption) for caption in captions], self.text_length
        before = self.tokens_before(tokenizer)
        lengths = [len(ids) - before for ids in tokenizer(texts, verbose=False).input_ids] if texts else []
        cut: list[CutCaption | None] = []
        for text, tokens in zip(texts, lengths, strict=True):
            if tokens <= limit:
                cut.append(None)
                continue
            ids = tokenizer(text, truncation=True, max_length=before + limit, verbose=False).input_ids
            cut.append(CutCaption(tokens, limit, last_words(tokenizer.decode(ids[before:], skip_special_tokens=True))))
        return cut

    def caption_text(self, caption: str) -> str:
        """The text that the pipeline gives to the tokenizer for a caption."""
        return caption

    def tokens_before(self, tokenizer: Any) -> int:  # noqa: ARG002 - few have an instruction
        """Tokens of the text for a caption that its limit does not count."""
        return 0

    @abstractmethod
    def encode_text(self, text_encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Per caption the tensors that the transformer is conditioned on, without padding and without a batch dimension."""

    def encode_negative(self, text_encoder: Any, prompt: str) -> dict[str, Tensor]:
        """A negative prompt, encoded as the pipeline does."""
        return self.encode_text(text_encoder, [prompt])[0]

    @abstractmethod
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what `encode_text` returns for the longest caption."""

    @abstractmethod
    def collate_text(self, texts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """One batch of what `encode_text` returned, padded as the family's pipeline pads."""

    @abstractmethod
    def encode_video(self, vae: Any, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] in [-1, 1] -> latents [B, C, T', H', W'], normalised as the transformer takes them."""

    def encode_image(self, vae: Any, image_encoder: Any, image: Tensor, frames: int) -> dict[str, Tensor]:  # noqa: ARG002
        """What a clip's first frame adds to the conditioning of its batch; by default its latents, first_frame [B, C, 1, H', W'].

        Args:
            image_encoder: what `load_image_encoder` returned.
            image: [B, 3, 1, H, W] in [-1, 1].
            frames: pixel frames of the clip.
        """
        return {"first_frame": self.encode_video(vae, image)}

    def image_shapes(self, latents: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of what `encode_image` returns for a clip, without a batch dimension.

        Args:
            latents: (C, T', H', W') of the clip.
        """
        channels, _, height, width = latents
        return {"first_frame": (channels, 1, height, width)}

    @abstractmethod
    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents [B, C, T', H', W'] -> pixels [B, 3, F, H, W] in about [-1, 1]."""

    def drop_vae_encoder(self, vae: Any) -> None:
        """Free what only encoding needs."""
        vae.encoder = None
        vae.quant_conv = None

    @abstractmethod
    def denoise(self, transformer: nn.Module, noisy: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """The transformer's prediction for noisy latents, shaped like them.

        Args:
            noisy: [B, C, T', H', W'].
            sigma: [B].
        """

    def sample_defaults(self, frames: int, height: int, width: int, fps: float) -> dict[str, Any]:
        """The settings with which a video is sampled where the user gives none; a recipe's `sample`."""
        sampling = self.variant.sampling
        return {
            "frames": frames,
            "height": height,
            "width": width,
            **self.sampler_facts(frames, height, width),
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "guidance_2": sampling.guidance_2,
            "negative_prompt": sampling.negative_prompt,
            "fps": fps,
            "decode": dict(sampling.decode),
        }

    def sampler_facts(self, frames: int, height: int, width: int) -> dict[str, Any]:
        """The settings among `sample_defaults` that the checkpoint decides, and that nobody can choose."""
        files = self.checkpoint
        return {
            "scheduler_class": files.scheduler.get("_class_name"),
            "shift": files.flow_shift(self.geometry.token_grid(frames, height, width).tokens),
            "boundary_ratio": files.model_index.get("boundary_ratio"),
        }

    def pipeline_arguments(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the family's pipeline, except prompt and image, for the settings of `sample_defaults`."""
        arguments = {
            "height": sample["height"],
            "width": sample["width"],
            "num_frames": sample["frames"],
            "num_inference_steps": sample["steps"],
            "guidance_scale": sample["guidance"],
            **sample["decode"],
        }
        if sample["guidance_2"] is not None:
            arguments["guidance_scale_2"] = sample["guidance_2"]
        return arguments

    @abstractmethod
    def text_arguments(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arguments of the pipeline for a prompt and a negative prompt that are encoded already.

        Args:
            text, negative: what `collate_text` returned, with B = 1.
        """

    def loss_mask(self, batch: Batch) -> Tensor | None:
        """[B, 1, T', 1, 1], 1 where the loss counts; None: everywhere."""
        return noisy_frames(batch)

    def blocks(self, transformer: Any) -> nn.ModuleList:
        """The blocks that `crepa_block_index` counts."""
        return getattr(transformer, self.spec.blocks)

    def video_tokens(self, block_output: Any, grid: TokenGrid) -> Tensor:
        """A block's output as [B, S, D], the video tokens alone, in frame-major raster order."""
        assert block_output.shape[1] == grid.tokens, (block_output.shape, grid)
        return block_output

    @abstractmethod
    def export_name(self, module: str) -> str:
        """The name of a module of the transformer in an adapter file, prefix included.

        diffusers reads it, and ComfyUI too, if it knows the family.

        Raises:
            UserError: a module that such a file can't hold.
        """

    def original_name(self, name: str) -> str:
        """The name of a module or a weight of the transformer in the original's files and in ComfyUI; by default the same.

        Raises:
            UserError: a family whose original keeps several modules in one.
        """
        return name

    def original_metadata(self) -> dict[str, str]:
        """The metadata that ComfyUI needs in a file with a whole transformer."""
        return {}

    @staticmethod
    @abstractmethod
    def random_parts(shapes: ModelShapes) -> PipelineParts:
        """A whole pipeline of some shapes. Its text encoders are tiny, and as wide as the transformer expects."""


def noisy_frames(batch: Batch) -> Tensor | None:
    """[B, 1, T', 1, 1]: 0 on the first frame of samples that are conditioned on it, 1 elsewhere; None where none is."""
    if "first_frame" not in batch.conditioning:
        return None
    given = batch.conditioning["given"]
    mask = given.new_ones(given.shape[0], 1, batch.latents.shape[2], 1, 1)
    mask[:, :, 0] = 1 - given.view(-1, 1, 1, 1)
    return mask


def with_clean_frames(noisy: Tensor, mask: Tensor, batch: Batch) -> Tensor:
    """Noisy latents [B, C, T', H', W'] with the first frame of the batch's conditioning where `noisy_frames` has 0."""
    first, keep = batch.conditioning["first_frame"].to(noisy.dtype), mask[:, :, :1].to(noisy.dtype)
    return torch.cat([keep * noisy[:, :, :1] + (1 - keep) * first, noisy[:, :, 1:]], dim=2)


def token_timesteps(timestep: Tensor, mask: Tensor, grid: TokenGrid) -> Tensor:
    """A timestep [B] for every token, [B, S]: 0 where `noisy_frames` has 0."""
    return (timestep.view(-1, 1, 1) * mask[:, 0, :, 0]).expand(-1, grid.t, grid.patches).flatten(1)


def masked_text_arguments(text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`text_arguments` of a pipeline that takes attention masks."""
    return {
        "prompt_embeds": text["prompt_embeds"],
        "prompt_attention_mask": text["mask"],
        "negative_prompt_embeds": negative["prompt_embeds"],
        "negative_prompt_attention_mask": negative["mask"],
    }


def pad_rows(rows: Sequence[Tensor], length: int) -> Tensor:
    """Rows [L, E] of several lengths -> [B, length, E], zeros behind each end."""
    return torch.stack([nn.functional.pad(row, (0, 0, 0, length - row.shape[0])) for row in rows])


def rows_mask(rows: Sequence[Tensor], length: int) -> Tensor:
    """[B, length] bool, True on what `pad_rows` did not pad."""
    lengths = torch.tensor([row.shape[0] for row in rows])
    return torch.arange(length) < lengths.unsqueeze(1)


def inside_blocks(module: str, spec: FamilySpec) -> str:
    """The module's name.

    Raises:
        UserError: it is outside of the blocks, where other programs use other names.
    """
    if module.startswith(f"{spec.blocks}."):
        return module
    raise UserError(
        f"lora_targets: {module} is outside of what an adapter file of {spec.title} can hold",
        f"use names inside {spec.blocks}, or all-linear",
    )
