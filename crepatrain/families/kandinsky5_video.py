"""Kandinsky 5 Video: Kandinsky5Transformer3DModel and AutoencoderKLHunyuanVideo of diffusers, Qwen2.5-VL and CLIP text."""

from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from diffusers.pipelines.kandinsky5.pipeline_kandinsky import prompt_clean
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from crepatrain.families.base import (
    TRAIN_TIMESTEPS,
    CutCaption,
    Family,
    PipelineParts,
    inside_blocks,
    last_words,
    noisy_frames,
    with_clean_frames,
)
from crepatrain.families.reading import read_transformers
from crepatrain.geometry import TokenGrid
from crepatrain.specs.attention import FLEX
from crepatrain.specs.base import ModelShapes
from crepatrain.specs.kandinsky5_video import KANDINSKY5_VIDEO
from crepatrain.tensors import Batch

_QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")


def _pipeline(**parts: Any) -> Kandinsky5T2VPipeline:
    """The pipeline without its other parts."""
    return Kandinsky5T2VPipeline(**{**dict.fromkeys(_PARTS), **parts})


@cache
def _bare_pipeline() -> Kandinsky5T2VPipeline:
    """For the pipeline's own methods; every training step calls one."""
    return _pipeline()


def _tiny(**more: Any) -> ModelShapes:
    transformer = {
        "in_visual_dim": 16,
        "in_text_dim": 32,
        "in_text_dim2": 24,
        "time_dim": 32,
        "out_visual_dim": 16,
        "patch_size": [1, 2, 2],
        "model_dim": 48,
        "ff_dim": 96,
        "num_text_blocks": 1,
        "num_visual_blocks": 10,
        "axes_dims": [8, 8, 8],
        "visual_cond": True,
        "attention_type": "regular",
        **more,
    }
    vae = {
        "latent_channels": 16,
        "block_out_channels": [8, 8, 8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "scaling_factor": 0.476986,
    }
    return ModelShapes(None, transformer, vae, KANDINSKY5_VIDEO.first.scheduler)


class Kandinsky5VideoFamily(Family):
    """Kandinsky 5 Lite and Pro, text-to-video and image-to-video, with dense and with NABLA attention."""

    spec = KANDINSKY5_VIDEO
    transformer_class = Kandinsky5Transformer3DModel
    vae_class = AutoencoderKLHunyuanVideo
    tiny = MappingProxyType(
        {
            "tiny": _tiny(),
            "tiny-nabla": _tiny(
                attention_type="nabla",
                attention_P=0.9,
                attention_wT=3,
                attention_wW=3,
                attention_wH=3,
                attention_add_sta=True,
                attention_method="topcdf",
                axes_dims=[8, 4, 4],
            ),
        }
    )

    @property
    def _nabla(self) -> bool:
        return self.geometry.tile > 1

    def untrainable(self, device: torch.device) -> str | None:
        if self._nabla and device.type == "cpu":
            return "its NABLA attention runs through flex attention, which has no backward on a CPU"
        return None

    def load_transformer(self, path: str, dtype: torch.dtype) -> Any:
        transformer = super().load_transformer(path, dtype)
        if self._nabla:
            self.set_attention(transformer)
        return transformer

    def backend_of(self, attention: str, backend: str | None) -> str:
        """NABLA's masks are for flex attention alone."""
        if self._nabla and attention.startswith(f"{self.spec.blocks}.") and attention.endswith(".self_attention"):
            return FLEX
        return super().backend_of(attention, backend)

    def load_text_encoder(self, path: str, dtype: torch.dtype) -> Any:
        """A pipeline of the text side alone: its `encode_prompt` is the one that sampling uses."""
        qwen = read_transformers(Qwen2_5_VLForConditionalGeneration, path, "text_encoder", dtype)
        clip = read_transformers(CLIPTextModel, path, "text_encoder_2", dtype)
        return _pipeline(
            # The whole processor would need torchvision for images, and captions hold none.
            tokenizer=AutoTokenizer.from_pretrained(path, subfolder="tokenizer"),
            text_encoder=qwen,
            tokenizer_2=CLIPTokenizer.from_pretrained(path, subfolder="tokenizer_2"),
            text_encoder_2=clip,
        )

    def count_tokens(self, path: str, captions: Sequence[str]) -> list[int]:
        pipeline = _bare_pipeline()
        tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
        texts = [pipeline.prompt_template.format(prompt_clean(caption)) for caption in captions]
        start = pipeline.prompt_template_encode_start_idx
        return [min(len(tokenizer(text).input_ids) - start, self.text_length) for text in texts]

    def cut_captions(self, path: str, captions: Sequence[str]) -> list[CutCaption | None]:
        """Of what Qwen reads; CLIP's summary is of the first 77 tokens of any caption."""
        pipeline, limit = _bare_pipeline(), self.text_length
        tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
        start = pipeline.prompt_template_encode_start_idx
        opening, closing = pipeline.prompt_template.split("{}")
        cut: list[CutCaption | None] = []
        for caption in map(prompt_clean, captions):
            text = opening + caption + closing
            ids = tokenizer(text, verbose=False).input_ids
            if len(ids) <= start + limit:
                cut.append(None)
                continue
            # The pipeline removes as many characters from the text's end, template included, as the tokens too many stand for.
            removed = len(tokenizer.decode(ids[start:-2][limit - 2 :]))
            kept = tokenizer(text[: len(text) - removed], truncation=True, max_length=start + limit, verbose=False).input_ids
            read = tokenizer.decode(kept[start:], skip_special_tokens=True)
            whole = tokenizer.decode(tokenizer(opening + caption, verbose=False).input_ids[start:], skip_special_tokens=True)
            cut.append(None if read == whole else CutCaption(len(ids) - start, limit, last_words(read)))
        return cut

    def encode_text(self, text_encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Those of one length together: the encoder is given no mask, so a longer neighbour's padding would change a caption."""
        template, limit = text_encoder.prompt_template, text_encoder.prompt_template_encode_start_idx + self.text_length
        alike: dict[Any, list[int]] = {}
        for number, caption in enumerate(captions):
            tokens = len(text_encoder.tokenizer(template.format(prompt_clean(caption)), verbose=False).input_ids)
            alike.setdefault(tokens if tokens <= limit else -1 - number, []).append(number)  # a cut one alone
        encoded: dict[int, dict[str, Tensor]] = {}
        for numbers in alike.values():
            embeds, pooled, _ = text_encoder.encode_prompt(
                [captions[number] for number in numbers], max_sequence_length=self.text_length
            )
            made = ({"prompt_embeds": row, "pooled": summary} for row, summary in zip(embeds, pooled, strict=True))
            encoded |= zip(numbers, made, strict=True)
        return [encoded[number] for number in range(len(captions))]

    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.checkpoint.transformer
        return {"prompt_embeds": (self.text_length, config["in_text_dim"]), "pooled": (config["in_text_dim2"],)}

    def collate_text(self, texts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """prompt_embeds [B, L, text width] of captions of one length, as the transformer has no mask; pooled [B, CLIP width]."""
        return {name: torch.stack([text[name] for text in texts]) for name in ("prompt_embeds", "pooled")}

    def encode_video(self, vae: Any, pixels: Tensor) -> Tensor:
        return vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float() * vae.config.scaling_factor

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode((latents.float() / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]

    def denoise(self, transformer: nn.Module, noisy: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        mask = noisy_frames(batch)
        if mask is not None:
            noisy = with_clean_frames(noisy, mask, batch)
        _frames, height, width = noisy.shape[2:]
        channels_last = noisy.permute(0, 2, 3, 4, 1)
        if self.checkpoint.transformer.get("visual_cond"):
            clean = channels_last.new_zeros(*channels_last.shape[:-1], 1)
            if mask is not None:
                clean = clean + (1 - mask).to(noisy.dtype).permute(0, 2, 3, 4, 1)
            channels_last = torch.cat([channels_last, torch.zeros_like(channels_last), clean], dim=-1)
        stride, device = self.geometry.spatial_stride, noisy.device
        text = batch.text["prompt_embeds"].to(noisy.dtype)
        prediction = transformer(
            hidden_states=channels_last.contiguous(),
            encoder_hidden_states=text,
            pooled_projections=batch.text["pooled"].to(noisy.dtype),
            timestep=sigma * TRAIN_TIMESTEPS,
            visual_rope_pos=[torch.arange(size, device=device) for size in (batch.grid.t, batch.grid.h, batch.grid.w)],
            text_rope_pos=torch.arange(text.shape[1], device=device),
            scale_factor=_bare_pipeline()._get_scale_factor(height * stride, width * stride),
            sparse_params=self._sparse_params(batch.grid, device),
            return_dict=False,
        )
        return prediction.permute(0, 4, 1, 2, 3)

    def _sparse_params(self, grid: TokenGrid, device: torch.device) -> dict[str, Any] | None:
        """The parameters of NABLA attention, as the pipeline's own `get_sparse_params` names them."""
        if not self._nabla:
            return None
        config, tile = self.checkpoint.transformer, self.geometry.tile
        window = {name: config[f"attention_{name}"] for name in ("wT", "wH", "wW")}
        tiles = Kandinsky5T2VPipeline.fast_sta_nabla(grid.t, grid.h // tile, grid.w // tile, **window, device=str(device))
        return {
            "sta_mask": tiles[None, None],
            "attention_type": config["attention_type"],
            "to_fractal": True,
            "P": config["attention_P"],
            **window,
            "add_sta": config["attention_add_sta"],
            "visual_shape": (grid.t, grid.h, grid.w),
            "method": config["attention_method"],
        }

    def video_tokens(self, block_output: Tensor, grid: TokenGrid) -> Tensor:
        """NABLA keeps the tokens of a frame tile by tile."""
        tokens = super().video_tokens(block_output, grid)
        if not self._nabla:
            return tokens
        side = self.geometry.tile
        tiles = tokens.unflatten(1, (grid.t, grid.h // side, grid.w // side, side, side))
        return tiles.transpose(3, 4).flatten(1, 5)

    def text_arguments(self, text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arguments = {}
        for prefix, of in (("", text), ("negative_", negative)):
            length = torch.tensor([0, of["prompt_embeds"].shape[1]], dtype=torch.int32, device=of["prompt_embeds"].device)
            arguments |= {
                f"{prefix}prompt_embeds_qwen": of["prompt_embeds"],
                f"{prefix}prompt_embeds_clip": of["pooled"],
                f"{prefix}prompt_cu_seqlens": length,
            }
        return arguments

    def export_name(self, module: str) -> str:
        """diffusers and ComfyUI use the same names."""
        return f"transformer.{inside_blocks(module, self.spec)}"

    @staticmethod
    def random_parts(shapes: ModelShapes) -> PipelineParts:
        qwen_tokenizer, clip_tokenizer = _qwen_tokenizer(), _clip_tokenizer()
        sizes = {"hidden_size": shapes.transformer["in_text_dim"], "intermediate_size": 64, "num_hidden_layers": 2}
        rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
        qwen = Qwen2_5_VLConfig(
            text_config={**sizes, **heads, "head_dim": 16, "vocab_size": len(qwen_tokenizer), "rope_scaling": rope},
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "num_heads": 2,
                "intermediate_size": 16,
                "out_hidden_size": sizes["hidden_size"],
            },
        )
        clip = CLIPTextConfig(
            hidden_size=shapes.transformer["in_text_dim2"],
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(clip_tokenizer),
            **{mark: getattr(clip_tokenizer, mark) for mark in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )
        return PipelineParts(
            models={
                "transformer": (Kandinsky5Transformer3DModel, shapes.transformer),
                "vae": (AutoencoderKLHunyuanVideo, shapes.vae),
            },
            saved={
                "text_encoder": Qwen2_5_VLForConditionalGeneration(qwen),
                "tokenizer": qwen_tokenizer,
                "text_encoder_2": CLIPTextModel(clip),
                "tokenizer_2": clip_tokenizer,
                "scheduler": FlowMatchEulerDiscreteScheduler.from_config(dict(shapes.scheduler)),
            },
        )


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes as tokens, except that the text which the pipeline puts before a prompt has as many tokens as the pipeline crops."""
    letters = sorted(bytes_to_unicode().values())
    tokenizer = Qwen2Tokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(_QWEN_MARKS)})
    pipeline = _bare_pipeline()
    mark, length = "<|im_start|>", pipeline.prompt_template_encode_start_idx
    before = pipeline.prompt_template.partition("{}")[0].removeprefix(mark)
    cut = next(cut for cut in range(len(before)) if len(tokenizer(before[cut:]).input_ids) == length - 2)
    tokenizer.add_tokens([before[:cut]])
    assert len(tokenizer(mark + before).input_ids) == length
    return tokenizer


def _clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(bytes_to_unicode().values())
    marks = ["<|startoftext|>", "<|endoftext|>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *marks]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])


FAMILY = Kandinsky5VideoFamily
