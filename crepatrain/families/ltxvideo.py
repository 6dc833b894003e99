"""LTX-Video 0.9: LTXVideoTransformer3DModel and AutoencoderKLLTXVideo of diffusers, T5 text."""

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, ByT5Tokenizer, T5Config, T5EncoderModel

from crepatrain.families.autoencoders import decode_ltx, encode_ltx
from crepatrain.families.base import (
    TRAIN_TIMESTEPS,
    Family,
    PipelineParts,
    inside_blocks,
    masked_text_arguments,
    noisy_frames,
    pad_rows,
    rows_mask,
    token_timesteps,
    with_clean_frames,
)
from crepatrain.specs.base import ModelShapes
from crepatrain.specs.ltxvideo import LTXVIDEO
from crepatrain.tensors import Batch

# diffusers' names on the left, the original's (and ComfyUI's) on the right.
_ORIGINAL_NAMES = (
    (r"^proj_in(?=\.|$)", "patchify_proj"),
    (r"^time_embed(?=\.)", "adaln_single"),
    (r"\.norm_(q|k)(?=\.|$)", r".\1_norm"),
)


def _tiny(**vae: Any) -> ModelShapes:
    transformer = {
        "in_channels": 8,
        "out_channels": 8,
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "cross_attention_dim": 48,
        "num_layers": 10,
        "caption_channels": 32,
    }
    tiny_vae = {
        "latent_channels": 8,
        "block_out_channels": [8, 8, 8, 8],
        "decoder_block_out_channels": [8, 8, 8, 8],
        "layers_per_block": [1, 1, 1, 1, 1],
        "decoder_layers_per_block": [1, 1, 1, 1, 1],
        "spatio_temporal_scaling": [True, True, True, False],
        "decoder_spatio_temporal_scaling": [True, True, True, False],
        "patch_size": 4,
        "patch_size_t": 1,
        **vae,
    }
    return ModelShapes(None, transformer, tiny_vae, LTXVIDEO.first.scheduler)


class LtxVideoFamily(Family):
    """LTX-Video 0.9.x, 2B and 13B, text-to-video and image-to-video."""

    spec = LTXVIDEO
    transformer_class = LTXVideoTransformer3DModel
    vae_class = AutoencoderKLLTXVideo
    tiny = MappingProxyType({"tiny": _tiny(), "tiny-timestep-vae": _tiny(timestep_conditioning=True)})

    def load_text_encoder(self, path: str, dtype: torch.dtype) -> Any:
        """A pipeline of the text side alone: its `encode_prompt` is the one that sampling uses."""
        tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
        encoder = T5EncoderModel.from_pretrained(path, subfolder="text_encoder", dtype=dtype, use_safetensors=True)
        nothing: dict[str, Any] = {"vae": None, "scheduler": None, "transformer": None}
        return LTXPipeline(tokenizer=tokenizer, text_encoder=encoder.requires_grad_(False), **nothing)

    def encode_text(self, text_encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        embeds, mask, _, _ = text_encoder.encode_prompt(
            list(captions), do_classifier_free_guidance=False, max_sequence_length=self.spec.text_length
        )
        return [{"prompt_embeds": row[:length].clone()} for row, length in zip(embeds, mask.sum(dim=1).tolist(), strict=True)]

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.spec.text_length, self.checkpoint.transformer["caption_channels"])}

    def collate_text(self, texts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """prompt_embeds [B, 128, text width] and their mask [B, 128], False after each caption's end."""
        rows = [text["prompt_embeds"] for text in texts]
        return {"prompt_embeds": pad_rows(rows, self.spec.text_length), "mask": rows_mask(rows, self.spec.text_length)}

    def encode_video(self, vae: Any, pixels: Tensor) -> Tensor:
        return encode_ltx(vae, pixels)

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        return decode_ltx(vae, latents)

    def drop_vae_encoder(self, vae: Any) -> None:
        vae.encoder = None

    def denoise(self, transformer: nn.Module, noisy: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        timestep = sigma * TRAIN_TIMESTEPS
        mask = noisy_frames(batch)
        if mask is not None:
            noisy = with_clean_frames(noisy, mask, batch)
            timestep = token_timesteps(timestep, mask, batch.grid)
        channels, frames, height, width = noisy.shape[1:]
        spatial = self.geometry.spatial_stride
        packed = transformer(
            hidden_states=noisy.flatten(2).transpose(1, 2),  # patches of 1 x 1 x 1: a token is a latent cell
            encoder_hidden_states=batch.text["prompt_embeds"].to(noisy.dtype),
            timestep=timestep,
            encoder_attention_mask=batch.text["mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.geometry.temporal_stride / batch.fps, spatial, spatial),
            return_dict=False,
        )[0]
        return packed.transpose(1, 2).reshape(-1, channels, frames, height, width)

    def pipeline_arguments(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        return super().pipeline_arguments(sample) | {"frame_rate": sample["fps"]}

    def text_arguments(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return masked_text_arguments(text, negative)

    def export_name(self, module: str) -> str:
        """Inside the blocks diffusers and the original use the same names."""
        return f"diffusion_model.{inside_blocks(module, self.spec)}"

    def original_name(self, name: str) -> str:
        for pattern, original in _ORIGINAL_NAMES:
            name = re.sub(pattern, original, name)
        return name

    def original_metadata(self) -> dict[str, str]:
        """The shapes that ComfyUI can't read from the weights; positions in time are as in training, those of diffusers."""
        needed = (
            "in_channels",
            "cross_attention_dim",
            "attention_head_dim",
            "num_attention_heads",
            "caption_channels",
            "num_layers",
        )
        config = {key: value for key, value in self.checkpoint.transformer.items() if key in needed}
        return {"config": json.dumps({"transformer": config | {"causal_temporal_positioning": False}})}

    @staticmethod
    def random_parts(shapes: ModelShapes) -> PipelineParts:
        tokenizer = ByT5Tokenizer()
        text = T5Config(
            vocab_size=len(tokenizer),
            d_model=shapes.transformer["caption_channels"],
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
        )
        return PipelineParts(
            models={
                "transformer": (LTXVideoTransformer3DModel, shapes.transformer),
                "vae": (AutoencoderKLLTXVideo, shapes.vae),
            },
            saved={
                "text_encoder": T5EncoderModel(text),
                "tokenizer": tokenizer,
                "scheduler": FlowMatchEulerDiscreteScheduler.from_config(dict(shapes.scheduler)),
            },
        )


FAMILY = LtxVideoFamily
