"""Wan 2.1 and 2.2: WanTransformer3DModel and AutoencoderKLWan of diffusers, UMT5 text, CLIP images in Wan 2.1."""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from crepatrain.families.autoencoders import TINY_WAN_VAE, decode_wan, encode_wan
from crepatrain.families.base import (
    TRAIN_TIMESTEPS,
    Family,
    PipelineParts,
    inside_blocks,
    noisy_frames,
    pad_rows,
    token_timesteps,
    with_clean_frames,
)
from crepatrain.families.reading import read_transformers
from crepatrain.specs.base import ModelShapes
from crepatrain.specs.wan import WAN
from crepatrain.tensors import Batch

# diffusers' names on the left, the original's (and ComfyUI's) on the right; matched as a whole, as `norm2` and `norm3` swap.
_ORIGINAL_NAMES = (
    (r"blocks\.(\d+)\.attn1\.to_(q|k|v)", r"blocks.\1.self_attn.\2"),
    (r"blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.self_attn.o"),
    (r"blocks\.(\d+)\.attn2\.to_(q|k|v)", r"blocks.\1.cross_attn.\2"),
    (r"blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.o"),
    (r"blocks\.(\d+)\.attn2\.add_(k|v)_proj", r"blocks.\1.cross_attn.\2_img"),
    (r"blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.0"),
    (r"blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.2"),
    (r"blocks\.(\d+)\.attn1\.norm_(q|k)", r"blocks.\1.self_attn.norm_\2"),
    (r"blocks\.(\d+)\.attn2\.norm_(q|k)", r"blocks.\1.cross_attn.norm_\2"),
    (r"blocks\.(\d+)\.attn2\.norm_added_k", r"blocks.\1.cross_attn.norm_k_img"),
    (r"blocks\.(\d+)\.norm2", r"blocks.\1.norm3"),
    (r"blocks\.(\d+)\.scale_shift_table", r"blocks.\1.modulation"),
    (r"condition_embedder\.(text|time)_embedder\.linear_1", r"\1_embedding.0"),
    (r"condition_embedder\.(text|time)_embedder\.linear_2", r"\1_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"patch_embedding", "patch_embedding"),
    (r"proj_out", "head.head"),
    (r"scale_shift_table", "head.modulation"),
)

# Tokens of one image from the released CLIP.
_IMAGE_TOKENS = 257


def _tiny(channels: int = 16, latents: int = 16, vae: Mapping[str, Any] | None = None, **more: Any) -> ModelShapes:
    image = {key: more.pop(key) for key in ("image_dim", "added_kv_proj_dim") if key in more}
    transformer = {
        "patch_size": [1, 2, 2],
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": channels,
        "out_channels": latents,
        "text_dim": 32,
        "freq_dim": 64,
        "ffn_dim": 64,
        "num_layers": 10,  # the family's default block exists in it
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 64,
        **image,
    }
    tiny_vae = {**TINY_WAN_VAE, **(vae or {})}
    scheduler = WAN.first.scheduler
    return ModelShapes(None, transformer, tiny_vae, scheduler, more)


_TWO_EXPERTS = {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
_TINY_22_VAE = {
    "decoder_base_dim": 8,
    "z_dim": 48,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "latents_mean": [0.01 * channel for channel in range(48)],
    "latents_std": [1 + 0.01 * channel for channel in range(48)],
}


class WanFamily(Family):
    """Wan 2.1 text-to-video and image-to-video, Wan 2.2 TI2V-5B and A14B."""

    spec = WAN
    transformer_class = WanTransformer3DModel
    vae_class = AutoencoderKLWan
    tiny = MappingProxyType(
        {
            "tiny": _tiny(),
            "tiny-i2v": _tiny(36, image_dim=20, added_kv_proj_dim=48),
            "tiny-ti2v": _tiny(48, 48, _TINY_22_VAE, expand_timesteps=True),
            "tiny-a14b": _tiny(**_TWO_EXPERTS),
            "tiny-i2v-a14b": _tiny(36, **_TWO_EXPERTS),
        }
    )

    def load_text_encoder(self, path: str, dtype: torch.dtype) -> Any:
        """A pipeline of the text side alone: its `encode_prompt` is the one that sampling uses."""
        tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
        encoder = read_transformers(UMT5EncoderModel, path, "text_encoder", dtype)
        nothing: dict[str, Any] = {"vae": None, "scheduler": None}
        return WanPipeline(tokenizer=tokenizer, text_encoder=encoder, **nothing)

    def load_image_encoder(self, path: str, dtype: torch.dtype) -> Any:
        """Of Wan 2.1, a pipeline of the image side alone."""
        if not self.variant.folders("image_encoder"):
            return None
        processor = CLIPImageProcessor.from_pretrained(path, subfolder="image_processor")
        encoder = read_transformers(CLIPVisionModel, path, "image_encoder", dtype)
        nothing: dict[str, Any] = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
        return WanImageToVideoPipeline(image_processor=processor, image_encoder=encoder, **nothing)

    def caption_text(self, caption: str) -> str:
        return prompt_clean(caption)

    def encode_text(self, text_encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        embeds, _ = text_encoder.encode_prompt(
            list(captions), do_classifier_free_guidance=False, max_sequence_length=self.text_length
        )
        # The pipeline has set everything after a caption's end to exact zeros; collate_text adds them again.
        lengths = embeds.ne(0).any(dim=-1).sum(dim=1).tolist()
        return [{"prompt_embeds": row[:length].clone()} for row, length in zip(embeds, lengths, strict=True)]

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.text_length, self.checkpoint.transformer["text_dim"])}

    def collate_text(self, texts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """prompt_embeds [B, 512, text width], zeros after each caption's end."""
        return {"prompt_embeds": pad_rows([text["prompt_embeds"] for text in texts], self.text_length)}

    def encode_video(self, vae: Any, pixels: Tensor) -> Tensor:
        return encode_wan(vae, pixels)

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        return decode_wan(vae, latents)

    def encode_image(self, vae: Any, image_encoder: Any, image: Tensor, frames: int) -> dict[str, Tensor]:
        """Of TI2V first_frame; else condition [B, C, T', H', W'] and, of Wan 2.1, image_embeds [B, image tokens, image width]."""
        if self._per_token:
            return super().encode_image(vae, image_encoder, image, frames)
        conditioning = {"condition": encode_wan(vae, nn.functional.pad(image, (0, 0, 0, 0, 0, frames - 1)))}
        if image_encoder is not None:
            pictures = [
                image_encoder.video_processor.numpy_to_pil(((p + 1) / 2).permute(1, 2, 3, 0).cpu().numpy())[0] for p in image
            ]
            conditioning["image_embeds"] = image_encoder.encode_image(pictures)
        return conditioning

    def image_shapes(self, latents: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        if self._per_token:
            return super().image_shapes(latents)
        width = self.checkpoint.transformer.get("image_dim")
        return {"condition": latents} | ({"image_embeds": (_IMAGE_TOKENS, width)} if width else {})

    @property
    def _per_token(self) -> bool:
        """Whether a token may have a timestep of its own, as in TI2V."""
        return bool(self.checkpoint.model_index.get("expand_timesteps"))

    def denoise(self, transformer: nn.Module, noisy: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        timestep = sigma * TRAIN_TIMESTEPS
        image_embeds = None
        if self._per_token:
            mask = noisy_frames(batch)
            # Where no frame is given all tokens have the same timestep, and as many copies of it as the pipeline makes would each
            # go through the time embedding and stay in memory: about 1 GiB of 5B's 27280 tokens.
            if mask is not None:
                noisy = with_clean_frames(noisy, mask, batch)
                timestep = token_timesteps(timestep, mask, batch.grid)
        elif self.task == "i2v":
            noisy, image_embeds = self._with_image(noisy, batch)
        return transformer(
            hidden_states=noisy,
            timestep=timestep,
            encoder_hidden_states=batch.text["prompt_embeds"].to(noisy.dtype),
            encoder_hidden_states_image=image_embeds,
            return_dict=False,
        )[0]

    def _with_image(self, noisy: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The 36 channels (noisy latents, a mask of the given frames, the image's latents), and CLIP's features of the image."""
        given = batch.conditioning["given"].view(-1, 1, 1, 1, 1).to(noisy.dtype)
        condition = batch.conditioning["condition"].to(noisy.dtype) * given
        mask = torch.zeros_like(condition[:, : self.geometry.temporal_stride])
        mask[:, :, 0] = given[:, :, 0]
        image_embeds = batch.conditioning.get("image_embeds")
        if image_embeds is not None:
            image_embeds = image_embeds.to(noisy.dtype) * given.view(-1, 1, 1)
        return torch.cat([noisy, mask, condition], dim=1), image_embeds

    def text_arguments(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": text["prompt_embeds"], "negative_prompt_embeds": negative["prompt_embeds"]}

    def export_name(self, module: str) -> str:
        return f"diffusion_model.{self.original_name(inside_blocks(module, self.spec))}"

    def original_name(self, name: str) -> str:
        stem = name.removesuffix(".weight").removesuffix(".bias")
        original = next(match.expand(known) for pattern, known in _ORIGINAL_NAMES if (match := re.fullmatch(pattern, stem)))
        return original + name[len(stem) :]

    @staticmethod
    def random_parts(shapes: ModelShapes) -> PipelineParts:
        tokenizer = ByT5Tokenizer()
        text = UMT5Config(
            vocab_size=len(tokenizer), d_model=shapes.transformer["text_dim"], d_kv=16, d_ff=64, num_layers=2, num_heads=2
        )
        transformers = ("transformer", *(("transformer_2",) if shapes.model_index.get("transformer_2") else ()))
        saved: dict[str, Any] = {
            "text_encoder": UMT5EncoderModel(text),
            "tokenizer": tokenizer,
            "scheduler": UniPCMultistepScheduler.from_config(dict(shapes.scheduler)),
        }
        width = shapes.transformer.get("image_dim")
        if width:
            vision = CLIPVisionConfig(
                hidden_size=width, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
            )
            sizes: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
            saved |= {"image_encoder": CLIPVisionModel(vision), "image_processor": CLIPImageProcessor(**sizes)}
        return PipelineParts(
            models={
                **dict.fromkeys(transformers, (WanTransformer3DModel, shapes.transformer)),
                "vae": (AutoencoderKLWan, shapes.vae),
            },
            saved=saved,
        )


FAMILY = WanFamily
