"""LTX-Video 0.9: LTXVideoTransformer3DModel and AutoencoderKLLTXVideo of diffusers, T5 text."""

import json
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
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
from crepatrain.families.reading import read_transformers
from crepatrain.specs.base import ModelShapes
from crepatrain.specs.ltxvideo import CONDITION_PIPELINE, LTXVIDEO
from crepatrain.tensors import Batch

# diffusers' names on the left, the original's (and ComfyUI's) on the right.
_ORIGINAL_NAMES = (
    (r"^proj_in(?=\.|$)", "patchify_proj"),
    (r"^time_embed(?=\.)", "adaln_single"),
    (r"\.norm_(q|k)(?=\.|$)", r".\1_norm"),
)


def _tiny(like: ModelShapes = LTXVIDEO.first, **vae: Any) -> ModelShapes:
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
    return ModelShapes(None, transformer, tiny_vae, like.scheduler, like.model_index)


class LtxVideoFamily(Family):
    """LTX-Video 0.9.x, 2B and 13B, text-to-video and image-to-video."""

    spec = LTXVIDEO
    transformer_class = LTXVideoTransformer3DModel
    vae_class = AutoencoderKLLTXVideo
    tiny = MappingProxyType(
        {
            "tiny": _tiny(),
            "tiny-timestep-vae": _tiny(timestep_conditioning=True),
            "tiny-0.9.5": _tiny(LTXVIDEO.released["ltx-2b-0.9.5"], timestep_conditioning=True),
        }
    )

    @property
    def conditions(self) -> bool:
        """Whether it is 0.9.5 or later, whose positions in time are causal and whose text encoder sees no padding."""
        return self.pipeline == CONDITION_PIPELINE

    def load_text_encoder(self, path: str, dtype: torch.dtype) -> Any:
        """A pipeline of the text side alone: its `encode_prompt` is the one that sampling uses."""
        tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
        encoder = read_transformers(T5EncoderModel, path, "text_encoder", dtype)
        nothing: dict[str, Any] = {"vae": None, "scheduler": None, "transformer": None}
        kind = LTXConditionPipeline if self.conditions else LTXPipeline
        return kind(tokenizer=tokenizer, text_encoder=encoder, **nothing)

    def encode_text(self, text_encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        embeds, mask, _, _ = text_encoder.encode_prompt(
            list(captions), do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        return [{"prompt_embeds": row[:length].clone()} for row, length in zip(embeds, mask.sum(dim=1).tolist(), strict=True)]

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.text_length, self.checkpoint.transformer["caption_channels"])}

    def collate_text(self, texts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """prompt_embeds [B, L, text width] and their mask [B, L], L of `text_length`, False after each caption's end."""
        rows = [text["prompt_embeds"] for text in texts]
        return {"prompt_embeds": pad_rows(rows, self.text_length), "mask": rows_mask(rows, self.text_length)}

    def encode_video(self, vae: Any, pixels: Tensor) -> Tensor:
        return encode_ltx(vae, pixels)

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        return decode_ltx(vae, latents)

    def drop_vae_encoder(self, vae: Any) -> None:
        vae.encoder = None

    def denoise(self, transformer: nn.Module, noisy: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        timestep = sigma * TRAIN_TIMESTEPS
        if self.conditions:
            timestep = timestep.unsqueeze(1)
        mask = noisy_frames(batch)
        if mask is not None:
            noisy = with_clean_frames(noisy, mask, batch)
            timestep = token_timesteps(timestep, mask, batch.grid)
        channels, frames, height, width = noisy.shape[1:]
        packed = transformer(
            hidden_states=noisy.flatten(2).transpose(1, 2),  # patches of 1 x 1 x 1: a token is a latent cell
            encoder_hidden_states=batch.text["prompt_embeds"].to(noisy.dtype),
            timestep=timestep,
            encoder_attention_mask=batch.text["mask"],
            **self._positions(noisy, batch.fps),
            return_dict=False,
        )[0]
        return packed.transpose(1, 2).reshape(-1, channels, frames, height, width)

    def _positions(self, noisy: Tensor, fps: float) -> dict[str, Any]:
        """Where the tokens of latents [B, C, T', H', W'] are, in seconds and pixels, as arguments of the transformer.

        A token frame of 0.9.5 and later is where the first pixel frame is that it encodes: 0, 1, 9 ... / fps seconds. In 0.9.0
        and 0.9.1 it is where that frame would be if the VAE encoded none alone: 0, 8, 16 ... / fps seconds.
        """
        stride, spatial = self.geometry.temporal_stride, self.geometry.spatial_stride
        batch, _, frames, height, width = noisy.shape
        if not self.conditions:
            scale = (stride / fps, spatial, spatial)
            return {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": scale}
        cells = [torch.arange(count, device=noisy.device) for count in (frames, height, width)]
        seconds = (cells[0] * stride + 1 - stride).clamp(min=0) * (1.0 / fps)
        axes = (seconds, *((rows * spatial).to(seconds.dtype) for rows in cells[1:]))
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        return {"video_coords": coordinates.expand(batch, -1, -1)}

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
        """The shapes and the positions in time that ComfyUI can't read from the weights."""
        needed = (
            "in_channels",
            "cross_attention_dim",
            "attention_head_dim",
            "num_attention_heads",
            "caption_channels",
            "num_layers",
        )
        config = {key: value for key, value in self.checkpoint.transformer.items() if key in needed}
        return {"config": json.dumps({"transformer": config | {"causal_temporal_positioning": self.conditions}})}

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
