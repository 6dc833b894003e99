"""What is known of a family and of the vision encoders without loading them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from crepatrain.geometry import Geometry

JSON = Mapping[str, Any]
Task = Literal["t2v", "i2v"]
Expert = Literal["high", "low"]


@dataclass(frozen=True)
class Checkpoint:
    """What a pipeline's JSON files say.

    Attributes:
        transformer: config of the transformer that is trained.
        origin: folder, hub, or package where only the package's own table could be asked.
    """

    model_index: JSON
    transformer: JSON
    vae: JSON
    scheduler: JSON
    origin: str

    def flow_shift(self, tokens: int) -> float:
        """The shift of the noise levels at which clips of that many tokens are sampled."""
        scheduler = self.scheduler
        if not scheduler.get("use_dynamic_shifting"):
            return float(scheduler.get("flow_shift") or scheduler.get("shift") or 1.0)
        first, last = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        return math.exp(low + (high - low) * (tokens - first) / (last - first))


@dataclass(frozen=True)
class ModelShapes:
    """What the JSON files of one model say, released or tiny.

    Attributes:
        repo: on the hub; None for a tiny model, which only exists with random weights.
        model_index: beside the names of the parts.
    """

    repo: str | None
    transformer: JSON
    vae: JSON
    scheduler: JSON
    model_index: JSON = field(default_factory=dict)

    @property
    def checkpoint(self) -> Checkpoint:
        """As if it were on the disk."""
        return Checkpoint(self.model_index, self.transformer, self.vae, self.scheduler, origin="package")


@dataclass(frozen=True)
class Sampling:
    """How a model's own pipeline is best asked for a video.

    Attributes:
        guidance: `guidance_scale`; of two experts the high-noise one's.
        guidance_2: of the low-noise expert; None where there is one transformer.
        decode: arguments of the pipeline that only its VAE needs.
    """

    steps: int = 50
    guidance: float = 5.0
    guidance_2: float | None = None
    negative_prompt: str = ""
    decode: JSON = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """What one checkpoint is among those of its family.

    Attributes:
        title: for people.
        tasks: what it can be trained for, its own first.
        parts: folders that training reads.
        transformer: the one of them that is trained.
        expert: which of two transformers that is; None where there is one.
        sigmas: the noise levels that this transformer is asked for.
        images: whether one-frame clips can train it.
        size: (height, width, num_frames) where the config says none.
        fps: frames per second that it was trained at.
        sampling: how it is sampled.
        architecture: as files that are shared name what they are for.
    """

    title: str
    tasks: tuple[Task, ...]
    parts: tuple[str, ...]
    size: tuple[int, int, int]
    fps: float
    transformer: str = "transformer"
    expert: Expert | None = None
    sigmas: tuple[float, float] = (0.0, 1.0)
    images: bool = True
    sampling: Sampling = Sampling()
    architecture: str = field(kw_only=True)

    @property
    def weights(self) -> tuple[str, ...]:
        """The parts that hold safetensors."""
        return tuple(part for part in self.parts if part.startswith(("transformer", "vae", "text_encoder", "image_encoder")))


class Unsupported(Exception):
    """A checkpoint that can't be trained, with the reason."""


@dataclass(frozen=True)
class FamilySpec:
    """One DiT family. Its tensors are in the module of its name in `crepatrain.families`.

    Attributes:
        title: for people.
        transformer_class: its name in diffusers.
        pipelines: the pipeline class of every task.
        default_block: `crepa_block_index` where the config says none.
        lora_targets: names of the Linear layers that LoRA adapts by default, matched at the end of a module's name.
        linears: every Linear layer that a block may have, by its name inside the block.
        blocks: attribute of the transformer that holds its blocks.
        text_length: tokens of a caption at most.
        text_parameters: of the released models' text encoders together.
        text_is_padded: whether captions of several lengths fit into one batch.
        geometry: reads a checkpoint's transformer and VAE config.
        variant: says what a checkpoint is; with two experts, for one of them. Raises Unsupported.
        released: released models by name.
        comfyui: how keys of an adapter file may begin for ComfyUI, before the original's names; empty: it has no such model.
    """

    name: str
    title: str
    transformer_class: str
    pipelines: Mapping[Task, str]
    default_block: int
    lora_targets: tuple[str, ...]
    linears: tuple[str, ...]
    blocks: str
    text_length: int
    text_parameters: int
    text_is_padded: bool
    geometry: Callable[[JSON, JSON], Geometry]
    variant: Callable[[Checkpoint, Expert | None], Variant]
    released: Mapping[str, ModelShapes]
    comfyui: tuple[str, ...] = ("diffusion_model.", "lora_unet_")

    def default_variant(self) -> Variant:
        """Of the first released model."""
        return self.variant(self.first.checkpoint, None)

    @property
    def first(self) -> ModelShapes:
        """The first released model."""
        return next(iter(self.released.values()))


_TEXT_AND_VAE = ("vae", "text_encoder", "tokenizer", "scheduler")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_ATTENTIONS = tuple(f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in _ATTENTION)


_WAN_NEGATIVE = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall gray, "
    "worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three legs, "
    "many people in the background, walking backwards"
)
_LTX_NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"
_KANDINSKY_NEGATIVE = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, walking backwards"
)
_SANA_NEGATIVE = (
    "A chaotic sequence with misshapen, deformed limbs in heavy motion blur, sudden disappearance, jump cuts, jerky movements, "
    "rapid shot changes, frames out of sync, inconsistent character shapes, temporal artifacts, jitter, and ghosting effects, "
    "creating a disorienting visual experience."
)


def _wan_geometry(transformer: JSON, vae: JSON) -> Geometry:
    patch_t, patch_h, patch_w = transformer["patch_size"]
    return Geometry(
        temporal_stride=vae.get("scale_factor_temporal", 4),
        spatial_stride=vae.get("scale_factor_spatial", 8),
        patch=(patch_t, patch_h, patch_w),
        latent_channels=vae["z_dim"],
        depth=transformer["num_layers"],
        width=transformer["num_attention_heads"] * transformer["attention_head_dim"],
    )


def _wan_variant(files: Checkpoint, expert: Expert | None) -> Variant:
    index, channels = files.model_index, files.transformer["in_channels"]
    latents = files.vae["z_dim"]
    two_experts = any(index.get("transformer_2") or ())
    clip = files.transformer.get("image_dim") is not None
    if files.transformer.get("pos_embed_seq_len") is not None:
        raise Unsupported("it is a model of first and last frames")
    if channels not in {latents, 2 * latents + files.vae.get("scale_factor_temporal", 4)}:
        raise Unsupported(f"its transformer takes {channels} channels, of which {latents} are latents")
    sampling = Sampling(negative_prompt=_WAN_NEGATIVE)
    if index.get("expand_timesteps"):
        parts = ("transformer", *_TEXT_AND_VAE)
        size = (704, 1280, 121)
        return Variant(
            "Wan 2.2 text- and image-to-video", ("t2v", "i2v"), parts, size, 24.0, sampling=sampling, architecture="wan2.2"
        )
    i2v = channels != latents
    tasks: tuple[Task, ...] = ("i2v",) if i2v else ("t2v",)
    words = "image-to-video" if i2v else "text-to-video"
    image = ("image_encoder", "image_processor") if clip else ()
    size, fps = (480, 832, 81), 16.0
    if not two_experts:
        parts = ("transformer", *_TEXT_AND_VAE, *image)
        return Variant(f"Wan 2.1 {words}", tasks, parts, size, fps, images=not i2v, sampling=sampling, architecture="wan2.1")
    boundary = index.get("boundary_ratio")
    if not isinstance(boundary, (int, float)) or not 0 < boundary < 1:
        raise Unsupported(f"it has two experts, and boundary_ratio={boundary} in its model_index.json")
    low = expert == "low"
    trained = "transformer_2" if low else "transformer"
    return Variant(
        f"Wan 2.2 {words}",
        tasks,
        (trained, *_TEXT_AND_VAE, *image),
        size,
        fps,
        transformer=trained,
        expert="low" if low else "high",
        sigmas=(0.0, boundary) if low else (boundary, 1.0),
        images=not i2v,
        sampling=replace(sampling, guidance=3.5 if i2v else 4.0, guidance_2=3.5 if i2v else 3.0),
        architecture="wan2.2",
    )


def _wan_transformer(heads: int, ffn: int, layers: int, channels: int = 16, latents: int = 16, **more: Any) -> JSON:
    return {
        "patch_size": [1, 2, 2],
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": latents,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
        **more,
    }


# The released latents_mean and latents_std are AutoencoderKLWan's own defaults.
_WAN_VAE = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}
_WAN22_VAE = _WAN_VAE | {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "latents_mean": [0.0] * 48,  # the released ones are in the checkpoint; shapes do not need them
    "latents_std": [1.0] * 48,
}
_WAN_SAMPLER = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
_WAN_IMAGE = {"image_dim": 1280, "added_kv_proj_dim": 5120}
_TWO_EXPERTS = {"transformer_2": ["diffusers", "WanTransformer3DModel"]}

WAN = FamilySpec(
    name="wan",
    title="Wan 2.1 and 2.2",
    transformer_class="WanTransformer3DModel",
    pipelines={"t2v": "WanPipeline", "i2v": "WanImageToVideoPipeline"},
    default_block=8,
    lora_targets=_ATTENTION,
    linears=(
        *_ATTENTIONS,
        "attn2.add_k_proj",
        "attn2.add_v_proj",
        "ffn.net.0.proj",
        "ffn.net.2",
    ),
    blocks="blocks",
    text_length=512,
    text_parameters=5_680_910_336,
    text_is_padded=True,
    geometry=_wan_geometry,
    variant=_wan_variant,
    released=MappingProxyType(
        {
            "wan2.1-1.3b": ModelShapes(
                "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _wan_transformer(12, 8960, 30), _WAN_VAE, _WAN_SAMPLER
            ),
            "wan2.1-14b": ModelShapes("Wan-AI/Wan2.1-T2V-14B-Diffusers", _wan_transformer(40, 13824, 40), _WAN_VAE, _WAN_SAMPLER),
            "wan2.1-i2v-14b": ModelShapes(
                "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
                _wan_transformer(40, 13824, 40, 36, **_WAN_IMAGE),
                _WAN_VAE,
                _WAN_SAMPLER,
            ),
            "wan2.2-5b": ModelShapes(
                "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
                _wan_transformer(24, 14336, 30, 48, 48),
                _WAN22_VAE,
                _WAN_SAMPLER | {"flow_shift": 5.0},
                {"expand_timesteps": True},
            ),
            "wan2.2-a14b": ModelShapes(
                "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
                _wan_transformer(40, 13824, 40),
                _WAN_VAE,
                _WAN_SAMPLER,
                _TWO_EXPERTS | {"boundary_ratio": 0.875},
            ),
            "wan2.2-i2v-a14b": ModelShapes(
                "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
                _wan_transformer(40, 13824, 40, 36),
                _WAN_VAE,
                _WAN_SAMPLER,
                _TWO_EXPERTS | {"boundary_ratio": 0.9},
            ),
        }
    ),
)


def _ltx_compression(vae: JSON) -> tuple[int, int]:
    """(temporal, spatial) strides, as AutoencoderKLLTXVideo reads them from its config."""
    halvings = 2 ** sum(vae["spatio_temporal_scaling"])
    return (
        vae.get("temporal_compression_ratio") or vae["patch_size_t"] * halvings,
        vae.get("spatial_compression_ratio") or vae["patch_size"] * halvings,
    )


def _ltx_geometry(transformer: JSON, vae: JSON) -> Geometry:
    temporal, spatial = _ltx_compression(vae)
    return Geometry(
        temporal_stride=temporal,
        spatial_stride=spatial,
        patch=(transformer["patch_size_t"], transformer["patch_size"], transformer["patch_size"]),
        latent_channels=vae["latent_channels"],
        depth=transformer["num_layers"],
        width=transformer["num_attention_heads"] * transformer["attention_head_dim"],
    )


def _ltx_variant(files: Checkpoint, _expert: Expert | None) -> Variant:
    if (files.transformer["patch_size"], files.transformer["patch_size_t"]) != (1, 1):
        raise Unsupported("its transformer has patches of several latents")
    # A VAE with timestep conditioning does the last of the denoising itself.
    decode = {"decode_timestep": 0.05, "decode_noise_scale": 0.025} if files.vae.get("timestep_conditioning") else {}
    sampling = Sampling(guidance=3.0, negative_prompt=_LTX_NEGATIVE, decode=decode)
    parts, size = ("transformer", *_TEXT_AND_VAE), (512, 704, 121)
    return Variant("LTX-Video", ("t2v", "i2v"), parts, size, 25.0, sampling=sampling, architecture="ltx-video")


def _ltx_transformer(head_dim: int, layers: int) -> JSON:
    return {
        "in_channels": 128,
        "out_channels": 128,
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": 32,
        "attention_head_dim": head_dim,
        "cross_attention_dim": 32 * head_dim,
        "num_layers": layers,
        "caption_channels": 4096,
    }


_LTX_VAE = {
    "latent_channels": 128,
    "block_out_channels": [128, 256, 512, 512],
    "decoder_block_out_channels": [128, 256, 512, 512],
    "layers_per_block": [4, 3, 3, 3, 4],
    "decoder_layers_per_block": [4, 3, 3, 3, 4],
    "spatio_temporal_scaling": [True, True, True, False],
    "decoder_spatio_temporal_scaling": [True, True, True, False],
    "patch_size": 4,
    "patch_size_t": 1,
}
_LTX_VAE_13B = _LTX_VAE | {
    "block_out_channels": [128, 256, 512, 1024, 2048],
    "down_block_types": ["LTXVideo095DownBlock3D"] * 4,
    "decoder_block_out_channels": [256, 512, 1024],
    "layers_per_block": [4, 6, 6, 2, 2],
    "decoder_layers_per_block": [5, 5, 5, 5],
    "spatio_temporal_scaling": [True, True, True, True],
    "decoder_spatio_temporal_scaling": [True, True, True],
    "decoder_inject_noise": [False, False, False, False],
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
    "upsample_residual": [True, True, True],
    "upsample_factor": [2, 2, 2],
    "timestep_conditioning": True,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
_LTX_SAMPLER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}

LTXVIDEO = FamilySpec(
    name="ltxvideo",
    title="LTX-Video 0.9",
    transformer_class="LTXVideoTransformer3DModel",
    pipelines={"t2v": "LTXPipeline", "i2v": "LTXImageToVideoPipeline"},
    default_block=8,
    lora_targets=_ATTENTION,
    linears=(
        *_ATTENTIONS,
        "ff.net.0.proj",
        "ff.net.2",
    ),
    blocks="transformer_blocks",
    text_length=128,
    text_parameters=4_762_310_656,
    text_is_padded=True,
    geometry=_ltx_geometry,
    variant=_ltx_variant,
    released=MappingProxyType(
        {
            "ltx-2b": ModelShapes("Lightricks/LTX-Video", _ltx_transformer(64, 28), _LTX_VAE, _LTX_SAMPLER),
            "ltx-13b": ModelShapes("Lightricks/LTX-Video-0.9.7-dev", _ltx_transformer(128, 48), _LTX_VAE_13B, _LTX_SAMPLER),
        }
    ),
)


def _sana_geometry(transformer: JSON, vae: JSON) -> Geometry:
    """Its transformer names things as Wan's does, whatever VAE it has."""
    if "z_dim" in vae:
        return _wan_geometry(transformer, vae)
    temporal, spatial = _ltx_compression(vae)
    known = {"scale_factor_temporal": temporal, "scale_factor_spatial": spatial, "z_dim": vae["latent_channels"]}
    return _wan_geometry(transformer, known)


def _sana_variant(files: Checkpoint, _expert: Expert | None) -> Variant:
    if "z_dim" not in files.vae and "spatio_temporal_scaling" not in files.vae:
        raise Unsupported(f"its VAE is a {files.vae.get('_class_name', 'strange one')}, which knows no frames")
    if files.transformer.get("guidance_embeds"):
        raise Unsupported("its transformer is told the guidance, as a distilled one is")
    hd = files.transformer.get("sample_size") == 22
    size = (704, 1280, 81) if hd else (480, 832, 81)
    sampling = Sampling(guidance=6.0, negative_prompt=_SANA_NEGATIVE)
    parts = ("transformer", *_TEXT_AND_VAE)
    return Variant("SANA-Video", ("t2v", "i2v"), parts, size, 16.0, sampling=sampling, architecture="sana-video")


SANAVIDEO = FamilySpec(
    name="sanavideo",
    title="SANA-Video",
    transformer_class="SanaVideoTransformer3DModel",
    pipelines={"t2v": "SanaVideoPipeline", "i2v": "SanaImageToVideoPipeline"},
    default_block=10,
    lora_targets=_ATTENTION,
    linears=_ATTENTIONS,
    blocks="transformer_blocks",
    text_length=300,
    text_parameters=2_614_341_888,
    text_is_padded=True,
    geometry=_sana_geometry,
    variant=_sana_variant,
    comfyui=(),
    released=MappingProxyType(
        {
            "sana-2b": ModelShapes(
                "Efficient-Large-Model/SANA-Video_2B_480p_diffusers",
                {
                    "in_channels": 16,
                    "out_channels": 16,
                    "num_attention_heads": 20,
                    "attention_head_dim": 112,
                    "num_layers": 20,
                    "num_cross_attention_heads": 20,
                    "cross_attention_head_dim": 112,
                    "cross_attention_dim": 2240,
                    "caption_channels": 2304,
                    "mlp_ratio": 3.0,
                    "sample_size": 30,
                    "patch_size": [1, 2, 2],
                    "qk_norm": "rms_norm_across_heads",
                    "rope_max_seq_len": 1024,
                },
                _WAN_VAE,
                {
                    "_class_name": "DPMSolverMultistepScheduler",
                    "prediction_type": "flow_prediction",
                    "use_flow_sigmas": True,
                    "flow_shift": 8.0,
                },
            ),
        }
    ),
)


def _kandinsky_geometry(transformer: JSON, vae: JSON) -> Geometry:
    patch_t, patch_h, patch_w = transformer["patch_size"]
    return Geometry(
        temporal_stride=vae.get("temporal_compression_ratio", 4),
        spatial_stride=vae.get("spatial_compression_ratio", 8),
        patch=(patch_t, patch_h, patch_w),
        latent_channels=vae["latent_channels"],
        depth=transformer["num_visual_blocks"],
        width=transformer["model_dim"],
        tile=8 if transformer.get("attention_type") == "nabla" else 1,
    )


def _kandinsky_variant(files: Checkpoint, _expert: Expert | None) -> Variant:
    parts = ("transformer", *_TEXT_AND_VAE, "text_encoder_2", "tokenizer_2")
    i2v = str(files.model_index.get("_class_name", "")).startswith("Kandinsky5I2V")
    tasks: tuple[Task, ...] = ("t2v",)
    if files.transformer.get("visual_cond"):
        tasks = ("i2v", "t2v") if i2v else ("t2v", "i2v")
    elif i2v:
        raise Unsupported("it is an image-to-video model whose transformer takes no image")
    sampling, size = Sampling(negative_prompt=_KANDINSKY_NEGATIVE), (512, 768, 121)
    return Variant("Kandinsky 5", tasks, parts, size, 24.0, sampling=sampling, architecture="Kandinsky-5")


def _kandinsky_transformer(width: int, ff: int, layers: tuple[int, int], axes: list[int], time: int, **more: Any) -> JSON:
    text_blocks, visual_blocks = layers
    return {
        "in_visual_dim": 16,
        "in_text_dim": 3584,
        "in_text_dim2": 768,
        "time_dim": time,
        "out_visual_dim": 16,
        "patch_size": [1, 2, 2],
        "model_dim": width,
        "ff_dim": ff,
        "num_text_blocks": text_blocks,
        "num_visual_blocks": visual_blocks,
        "axes_dims": axes,
        "visual_cond": True,
        "attention_type": "regular",
        **more,
    }


_HUNYUAN_VAE = {
    "latent_channels": 16,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "spatial_compression_ratio": 8,
    "temporal_compression_ratio": 4,
    "scaling_factor": 0.476986,
}
_KANDINSKY_SAMPLER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0}
_NABLA = {
    "attention_type": "nabla",
    "attention_P": 0.9,
    "attention_wT": 11,
    "attention_wW": 3,
    "attention_wH": 3,
    "attention_add_sta": True,
    "attention_method": "topcdf",
}

_KANDINSKY_LITE = _kandinsky_transformer(1792, 7168, (2, 32), [16, 24, 24], 512)
_KANDINSKY_PRO = _kandinsky_transformer(4096, 16384, (4, 60), [32, 48, 48], 1024, **_NABLA)
_KANDINSKY_I2V = {"_class_name": "Kandinsky5I2VPipeline"}
_KANDINSKY_ATTENTIONS = tuple(
    f"{attention}.{layer}"
    for attention in ("self_attention", "cross_attention")
    for layer in ("to_query", "to_key", "to_value", "out_layer")  # by whole names: one class of the model is called out_layer too
)

KANDINSKY5_VIDEO = FamilySpec(
    name="kandinsky5_video",
    title="Kandinsky 5 Video",
    transformer_class="Kandinsky5Transformer3DModel",
    pipelines={"t2v": "Kandinsky5T2VPipeline", "i2v": "Kandinsky5I2VPipeline"},
    default_block=8,
    lora_targets=_KANDINSKY_ATTENTIONS,
    linears=(
        *_KANDINSKY_ATTENTIONS,
        "feed_forward.in_layer",
        "feed_forward.out_layer",
        "visual_modulation.out_layer",
    ),
    blocks="visual_transformer_blocks",
    text_length=512,
    text_parameters=8_415_227_136,
    text_is_padded=False,
    geometry=_kandinsky_geometry,
    variant=_kandinsky_variant,
    comfyui=("diffusion_model.", "transformer.", "lora_unet_", ""),
    released=MappingProxyType(
        {
            "kandinsky5-lite": ModelShapes(
                "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers", _KANDINSKY_LITE, _HUNYUAN_VAE, _KANDINSKY_SAMPLER
            ),
            "kandinsky5-i2v-lite": ModelShapes(
                "kandinskylab/Kandinsky-5.0-I2V-Lite-5s-Diffusers",
                _KANDINSKY_LITE,
                _HUNYUAN_VAE,
                _KANDINSKY_SAMPLER,
                _KANDINSKY_I2V,
            ),
            "kandinsky5-pro": ModelShapes(
                "kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers", _KANDINSKY_PRO, _HUNYUAN_VAE, _KANDINSKY_SAMPLER
            ),
            "kandinsky5-i2v-pro": ModelShapes(
                "kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers",
                _KANDINSKY_PRO,
                _HUNYUAN_VAE,
                _KANDINSKY_SAMPLER,
                _KANDINSKY_I2V,
            ),
        }
    ),
)


FAMILIES: Mapping[str, FamilySpec] = MappingProxyType({spec.name: spec for spec in (WAN, LTXVIDEO, SANAVIDEO, KANDINSKY5_VIDEO)})


def released_model(spec: FamilySpec, repo: str) -> ModelShapes | None:
    """The released model that lives in a hub repository, if the package knows it."""
    return next((model for model in spec.released.values() if model.repo == repo), None)


@dataclass(frozen=True)
class EncoderSpec:
    """A vision transformer as a teacher: where it is, E, and the pixels of one patch.

    Attributes:
        shapes: what its config.json says, for transformers' AutoConfig.
    """

    repo: str
    width: int
    patch: int
    shapes: JSON


def _dinov2() -> dict[str, EncoderSpec]:
    sizes = {
        "vits14": ("small", 384, 12, 6),
        "vitb14": ("base", 768, 12, 12),
        "vitl14": ("large", 1024, 24, 16),
        "vitg14": ("giant", 1536, 40, 24),
    }
    specs = {}
    for short, (size, width, layers, heads) in sizes.items():
        shapes = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": 518,
            "patch_size": 14,
            "use_swiglu_ffn": size == "giant",
        }
        specs[f"dinov2_{short}"] = EncoderSpec(f"facebook/dinov2-{size}", width, 14, {"model_type": "dinov2"} | shapes)
        specs[f"dinov2_{short}_reg"] = EncoderSpec(
            f"facebook/dinov2-with-registers-{size}",
            width,
            14,
            {"model_type": "dinov2_with_registers", "num_register_tokens": 4} | shapes,
        )
    return specs


ENCODERS: Mapping[str, EncoderSpec] = MappingProxyType(_dinov2())
