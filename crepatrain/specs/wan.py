"""Wan 2.1 and 2.2: text-to-video, image-to-video, TI2V-5B, and A14B with two experts."""

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from crepatrain.geometry import Geometry
from crepatrain.specs.autoencoders import WAN_VAE, wan_latents
from crepatrain.specs.base import (
    ATTENTION,
    ATTENTIONS,
    JSON,
    Checkpoint,
    Expert,
    FamilySpec,
    ModelShapes,
    Role,
    Sampling,
    Task,
    TextParameters,
    Unsupported,
    Variant,
    has_part,
    three_whole_numbers,
    usual_parts,
    whole_number,
)

_NEGATIVE = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall gray, "
    "worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three legs, "
    "many people in the background, walking backwards"
)


def _geometry(transformer: JSON, vae: JSON) -> Geometry:
    temporal, spatial, channels = wan_latents(vae)
    return Geometry(
        temporal_stride=temporal,
        spatial_stride=spatial,
        patch=three_whole_numbers(transformer, "patch_size"),
        latent_channels=channels,
        depth=whole_number(transformer, "num_layers"),
        width=whole_number(transformer, "num_attention_heads") * whole_number(transformer, "attention_head_dim"),
    )


def _variant(files: Checkpoint, expert: Expert | None) -> Variant:
    index, channels = files.model_index, whole_number(files.transformer, "in_channels")
    stride, _, latents = wan_latents(files.vae)
    two_experts = has_part(index, "transformer_2")
    clip = files.transformer.get("image_dim") is not None
    if files.transformer.get("pos_embed_seq_len") is not None:
        raise Unsupported("it takes first and last frames")
    if channels not in {latents, 2 * latents + stride}:
        raise Unsupported(f"its transformer takes {channels} channels, of which {latents} are latents")
    sampling = Sampling(negative_prompt=_NEGATIVE)
    if index.get("expand_timesteps"):
        return Variant(
            "Wan 2.2 text- and image-to-video",
            ("t2v", "i2v"),
            usual_parts(),
            size=(704, 1280, 121),
            fps=24.0,
            sampling=sampling,
            architecture="wan2.2",
        )
    i2v = channels != latents
    tasks: tuple[Task, ...] = ("i2v",) if i2v else ("t2v",)
    words = "image-to-video" if i2v else "text-to-video"
    image: dict[str, Role] = {"image_encoder": "image_encoder", "image_processor": "image_processor"} if clip else {}
    size, fps = (480, 832, 81), 16.0
    if not two_experts:
        parts = usual_parts(**image)
        return Variant(f"Wan 2.1 {words}", tasks, parts, size, fps, images=not i2v, sampling=sampling, architecture="wan2.1")
    boundary = index.get("boundary_ratio")
    if not isinstance(boundary, (int, float)) or not 0 < boundary < 1:
        raise Unsupported(f"it has two experts, and boundary_ratio={boundary} in its model_index.json")
    low = expert == "low"
    return Variant(
        f"Wan 2.2 {words}",
        tasks,
        usual_parts("transformer_2" if low else "transformer", **image),
        size,
        fps,
        expert="low" if low else "high",
        sigmas=(0.0, boundary) if low else (boundary, 1.0),
        images=not i2v,
        sampling=replace(sampling, guidance=3.5 if i2v else 4.0, guidance_2=3.5 if i2v else 3.0),
        architecture="wan2.2",
    )


def _transformer(heads: int, ffn: int, layers: int, channels: int = 16, latents: int = 16, **more: Any) -> JSON:
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


_VAE_22 = WAN_VAE | {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "latents_mean": [0.0] * 48,  # the released values are in the checkpoint; shapes do not depend on them
    "latents_std": [1.0] * 48,
}
_SAMPLER = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}
_IMAGE = {"image_dim": 1280, "added_kv_proj_dim": 5120}
_TWO_EXPERTS = {"transformer_2": ["diffusers", "WanTransformer3DModel"]}

WAN = FamilySpec(
    name="wan",
    title="Wan 2.1 and 2.2",
    transformer_class="WanTransformer3DModel",
    pipelines={"t2v": "WanPipeline", "i2v": "WanImageToVideoPipeline"},
    default_block=8,
    lora_targets=ATTENTION,
    linears=(
        *ATTENTIONS,
        "attn2.add_k_proj",
        "attn2.add_v_proj",
        "ffn.net.0.proj",
        "ffn.net.2",
    ),
    blocks="blocks",
    depth_key="num_layers",
    block_parts=("attn1", "attn2", "ffn"),
    unmasked_attentions=("attn1", "attn2"),
    text_length=512,
    text_parameters=TextParameters(5_680_910_336, 1_050_152_960, 192_948_224),
    text_is_padded=True,
    geometry=_geometry,
    variant=_variant,
    diffusers_translates_lora=True,
    released=MappingProxyType(
        {
            "wan2.1-1.3b": ModelShapes("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _transformer(12, 8960, 30), WAN_VAE, _SAMPLER),
            "wan2.1-14b": ModelShapes("Wan-AI/Wan2.1-T2V-14B-Diffusers", _transformer(40, 13824, 40), WAN_VAE, _SAMPLER),
            "wan2.1-i2v-14b": ModelShapes(
                "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
                _transformer(40, 13824, 40, 36, **_IMAGE),
                WAN_VAE,
                _SAMPLER,
            ),
            "wan2.2-5b": ModelShapes(
                "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
                _transformer(24, 14336, 30, 48, 48),
                _VAE_22,
                _SAMPLER | {"flow_shift": 5.0},
                {"expand_timesteps": True},
            ),
            "wan2.2-a14b": ModelShapes(
                "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
                _transformer(40, 13824, 40),
                WAN_VAE,
                _SAMPLER,
                _TWO_EXPERTS | {"boundary_ratio": 0.875},
            ),
            "wan2.2-i2v-a14b": ModelShapes(
                "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
                _transformer(40, 13824, 40, 36),
                WAN_VAE,
                _SAMPLER,
                _TWO_EXPERTS | {"boundary_ratio": 0.9},
            ),
        }
    ),
)
