"""SANA-Video: SanaVideoTransformer3DModel of diffusers, the VAE of Wan or of LTX-2, Gemma-2 text."""

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)
from torch import Tensor, nn
from transformers import AutoTokenizer, ByT5Tokenizer, Gemma2Config, Gemma2Model

from crepatrain.errors import UserError
from crepatrain.families.autoencoders import TINY_WAN_VAE, decode_ltx, decode_wan, encode_ltx, encode_wan
from crepatrain.families.base import (
    TRAIN_TIMESTEPS,
    Family,
    PipelineParts,
    inside_blocks,
    masked_text_arguments,
    noisy_frames,
    pad_rows,
    rows_mask,
    with_clean_frames,
)
from crepatrain.families.reading import read_transformers
from crepatrain.specs.base import ModelShapes
from crepatrain.specs.sanavideo import SANAVIDEO
from crepatrain.tensors import Batch

# The instruction that the pipeline puts before every prompt, but not before a negative one.
_INSTRUCTION = inspect.signature(SanaVideoPipeline.__call__).parameters["complex_human_instruction"].default


_LTX2_VAE = {
    "latent_channels": 8,
    "block_out_channels": [8, 16, 32, 64],
    "decoder_block_out_channels": [8, 16, 32],
    "layers_per_block": [1, 1, 1, 1, 1],
    "decoder_layers_per_block": [1, 1, 1, 1],
    "spatio_temporal_scaling": [True, True, True, True],
    "patch_size": 4,
    "patch_size_t": 1,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}


def _tiny(vae: Mapping[str, Any], channels: int, patch: int, sample_size: int) -> ModelShapes:
    transformer = {
        "in_channels": channels,
        "out_channels": channels,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "num_layers": 12,  # the family's default block exists in it
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 24,
        "cross_attention_dim": 48,
        "caption_channels": 32,
        "mlp_ratio": 2.5,
        "sample_size": sample_size,
        "patch_size": [1, patch, patch],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    return ModelShapes(None, transformer, vae, SANAVIDEO.first.scheduler)


class SanaVideoFamily(Family):
    """SANA-Video 2B, text-to-video and image-to-video."""

    spec = SANAVIDEO
    transformer_class = SanaVideoTransformer3DModel
    tiny = MappingProxyType({"tiny": _tiny(TINY_WAN_VAE, 16, 2, 30), "tiny-720p": _tiny(_LTX2_VAE, 8, 1, 22)})

    @property
    def _wan_vae(self) -> bool:
        return "z_dim" in self.checkpoint.vae

    @property
    def vae_class(self) -> Any:
        return AutoencoderKLWan if self._wan_vae else AutoencoderKLLTX2Video

    def load_text_encoder(self, path: str, dtype: torch.dtype) -> Any:
        """A pipeline of the text side alone: its `encode_prompt` is the one that sampling uses."""
        tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
        encoder = read_transformers(Gemma2Model, path, "text_encoder", dtype)
        nothing: dict[str, Any] = {"vae": None, "scheduler": None, "transformer": None}
        return SanaVideoPipeline(tokenizer=tokenizer, text_encoder=encoder, **nothing)

    def encode_text(self, text_encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Captions after the pipeline's instruction; the empty one without it, as sampling uses it as a negative prompt."""
        written = [caption for caption in captions if caption]
        encoded = iter(self._encode(text_encoder, written, _INSTRUCTION) if written else ())
        return [next(encoded) if caption else self.encode_negative(text_encoder, "") for caption in captions]

    def caption_text(self, caption: str) -> str:
        return "\n".join(_INSTRUCTION) + caption.lower().strip() if caption else ""

    def tokens_before(self, tokenizer: Any) -> int:
        """The instruction, but for two of its tokens, which the pipeline hands to the transformer among the caption's."""
        return len(tokenizer.encode("\n".join(_INSTRUCTION))) - 2

    def encode_negative(self, text_encoder: Any, prompt: str) -> dict[str, Tensor]:
        """Without the instruction, which is for prompts alone."""
        return self._encode(text_encoder, [prompt], None)[0]

    def _encode(self, text_encoder: Any, prompts: Sequence[str], instruction: list[str] | None) -> list[dict[str, Tensor]]:
        embeds, mask, _, _ = text_encoder.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
            complex_human_instruction=instruction,
        )
        return [{"prompt_embeds": row[:length].clone()} for row, length in zip(embeds, mask.sum(dim=1).tolist(), strict=True)]

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.text_length, self.checkpoint.transformer["caption_channels"])}

    def collate_text(self, texts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """prompt_embeds [B, 300, text width] and their mask [B, 300] of 1 and 0, 0 after each caption's end."""
        rows = [text["prompt_embeds"] for text in texts]
        mask = rows_mask(rows, self.text_length).long()
        return {"prompt_embeds": pad_rows(rows, self.text_length), "mask": mask}

    def encode_video(self, vae: Any, pixels: Tensor) -> Tensor:
        return encode_wan(vae, pixels) if self._wan_vae else encode_ltx(vae, pixels)

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        return decode_wan(vae, latents) if self._wan_vae else decode_ltx(vae, latents)

    def denoise(self, transformer: nn.Module, noisy: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        timestep = sigma * TRAIN_TIMESTEPS
        mask = noisy_frames(batch)
        if mask is not None:
            noisy = with_clean_frames(noisy, mask, batch)
            grid = batch.grid
            timestep = (timestep.view(-1, 1, 1, 1, 1) * mask).expand(-1, 1, grid.t, grid.h, grid.w)
        return transformer(
            hidden_states=noisy,
            encoder_hidden_states=batch.text["prompt_embeds"].to(noisy.dtype),
            encoder_attention_mask=batch.text["mask"],
            timestep=timestep,
            return_dict=False,
        )[0]

    def pipeline_arguments(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        arguments = super().pipeline_arguments(sample) | {"use_resolution_binning": False}
        return arguments | {"frames": arguments.pop("num_frames")}

    def text_arguments(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return masked_text_arguments(text, negative)

    def export_name(self, module: str) -> str:
        """For diffusers only: ComfyUI has no such model."""
        return f"transformer.{inside_blocks(module, self.spec)}"

    def original_name(self, name: str) -> str:
        raise UserError(
            f"{name}: the original keeps queries, keys and values in one, under no name of theirs; ComfyUI has no SANA-Video",
            "load it with diffusers",
        )

    @staticmethod
    def random_parts(shapes: ModelShapes) -> PipelineParts:
        tokenizer = ByT5Tokenizer(padding_side="right")
        text = Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=shapes.transformer["caption_channels"],
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
        )
        return PipelineParts(
            models={
                "transformer": (SanaVideoTransformer3DModel, shapes.transformer),
                "vae": (AutoencoderKLWan if "z_dim" in shapes.vae else AutoencoderKLLTX2Video, shapes.vae),
            },
            saved={
                "text_encoder": Gemma2Model(text),
                "tokenizer": tokenizer,
                "scheduler": DPMSolverMultistepScheduler.from_config(dict(shapes.scheduler)),
            },
        )


FAMILY = SanaVideoFamily
