"""Wan 2.1 text-to-video: WanTransformer3DModel and AutoencoderKLWan of diffusers, UMT5 text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import AutoTokenizer, ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from crepatrain.config.specs import WAN, ReleasedModel
from crepatrain.errors import UserError
from crepatrain.families.base import PipelineParts
from crepatrain.geometry import TokenGrid
from crepatrain.tensors import Batch

_TRAIN_TIMESTEPS = 1000

# diffusers' names on the left, the original's (and ComfyUI's) on the right; matched as a whole, as `norm2` and `norm3` swap.
_ORIGINAL_NAMES = (
    (r"blocks\.(\d+)\.attn1\.to_(q|k|v)", r"blocks.\1.self_attn.\2"),
    (r"blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.self_attn.o"),
    (r"blocks\.(\d+)\.attn2\.to_(q|k|v)", r"blocks.\1.cross_attn.\2"),
    (r"blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.o"),
    (r"blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.0"),
    (r"blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.2"),
)

_TINY_TRANSFORMER = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 64,
    "num_layers": 10,  # the family's default block exists in it
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 64,
}
_TINY_VAE = {
    "base_dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}


class WanFamily:
    """Wan 2.1 text-to-video, 1.3B and 14B."""

    spec = WAN

    def load_transformer(self, path: str, dtype: torch.dtype) -> Any:
        return WanTransformer3DModel.from_pretrained(path, subfolder="transformer", torch_dtype=dtype, use_safetensors=True)

    def empty_transformer(self, config: Mapping[str, Any]) -> Any:
        with torch.device("meta"):
            return WanTransformer3DModel.from_config(dict(config))

    def load_vae(self, path: str, dtype: torch.dtype) -> Any:
        vae = AutoencoderKLWan.from_pretrained(path, subfolder="vae", torch_dtype=dtype, use_safetensors=True)
        return vae.requires_grad_(False)

    def load_text_encoder(self, path: str, dtype: torch.dtype) -> Any:
        """A pipeline of the text side alone: its `encode_prompt` is the one that sampling uses."""
        tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
        encoder = UMT5EncoderModel.from_pretrained(path, subfolder="text_encoder", dtype=dtype, use_safetensors=True)
        parts: dict[str, Any] = {
            "tokenizer": tokenizer,
            "text_encoder": encoder.requires_grad_(False),
            "vae": None,
            "scheduler": None,
        }
        return WanPipeline(**parts)

    def encode_text(self, text_encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        embeds, _ = text_encoder.encode_prompt(
            list(captions), do_classifier_free_guidance=False, max_sequence_length=self.spec.text_length
        )
        # The pipeline has set what lies behind each caption's end to exact zeros; collate_text puts them back.
        lengths = embeds.ne(0).any(dim=-1).sum(dim=1).tolist()
        return [{"prompt_embeds": row[:length].clone()} for row, length in zip(embeds, lengths, strict=True)]

    def collate_text(self, texts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """prompt_embeds [B, 512, text width], zeros behind each caption's end."""
        rows = [text["prompt_embeds"] for text in texts]
        padded = [nn.functional.pad(row, (0, 0, 0, self.spec.text_length - row.shape[0])) for row in rows]
        return {"prompt_embeds": torch.stack(padded)}

    def encode_video(self, vae: Any, pixels: Tensor) -> Tensor:
        mean, std = _latent_statistics(vae, pixels.device)
        return (vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float() - mean) / std

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = _latent_statistics(vae, latents.device)
        return vae.decode((latents.float() * std + mean).to(vae.dtype), return_dict=False)[0]

    def drop_vae_encoder(self, vae: Any) -> None:
        vae.encoder = None
        vae.quant_conv = None

    def denoise(self, transformer: nn.Module, noisy: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        return transformer(
            hidden_states=noisy,
            timestep=sigma * _TRAIN_TIMESTEPS,
            encoder_hidden_states=batch.text["prompt_embeds"].to(noisy.dtype),
            return_dict=False,
        )[0]

    def loss_mask(self, batch: Batch) -> Tensor | None:  # noqa: ARG002 - text-to-video has no clean frame
        return None

    def blocks(self, transformer: WanTransformer3DModel) -> nn.ModuleList:
        return transformer.blocks

    def video_tokens(self, block_output: Tensor, grid: TokenGrid) -> Tensor:
        assert block_output.shape[1] == grid.tokens, (block_output.shape, grid)
        return block_output

    def export_name(self, module: str) -> str:
        for pattern, original in _ORIGINAL_NAMES:
            match = re.fullmatch(pattern, module)
            if match:
                return f"diffusion_model.{match.expand(original)}"
        raise UserError(
            f"lora_targets: {module} is outside of what a Wan adapter file can hold for both diffusers and ComfyUI",
            'use names inside the blocks, such as "to_q", or "all-linear"',
        )

    def random_parts(self, released: ReleasedModel | None) -> PipelineParts:
        """UMT5 is tiny in both; beside a released model it keeps the width that the transformer expects."""
        tokenizer = ByT5Tokenizer()
        width = released.text_width if released else _TINY_TRANSFORMER["text_dim"]
        text = UMT5Config(vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        return PipelineParts(
            models={
                "transformer": (WanTransformer3DModel, released.transformer if released else _TINY_TRANSFORMER),
                "vae": (AutoencoderKLWan, released.vae if released else _TINY_VAE),
            },
            saved={
                "text_encoder": UMT5EncoderModel(text),
                "tokenizer": tokenizer,
                "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            },
        )


def _latent_statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents, [1, C, 1, 1, 1] each, fp32."""
    mean, std = torch.tensor([vae.config["latents_mean"], vae.config["latents_std"]]).to(device, non_blocking=True)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
