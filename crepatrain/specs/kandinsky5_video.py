"""Kandinsky 5 Video, Lite and Pro."""

from types import MappingProxyType
from typing import Any

from crepatrain.geometry import Geometry
from crepatrain.specs.base import (
    JSON,
    Checkpoint,
    Expert,
    FamilySpec,
    ModelShapes,
    Sampling,
    Task,
    TextParameters,
    Unsupported,
    Variant,
    three_whole_numbers,
    usual_parts,
    whole_number,
)

_NEGATIVE = (
    "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low quality, ugly, deformed, walking backwards"
)


def _geometry(transformer: JSON, vae: JSON) -> Geometry:
    return Geometry(
        temporal_stride=whole_number(vae, "temporal_compression_ratio", 4),
        spatial_stride=whole_number(vae, "spatial_compression_ratio", 8),
        patch=three_whole_numbers(transformer, "patch_size"),
        latent_channels=whole_number(vae, "latent_channels"),
        depth=whole_number(transformer, "num_visual_blocks"),
        width=whole_number(transformer, "model_dim"),
        tile=8 if transformer.get("attention_type") == "nabla" else 1,
    )


def _variant(files: Checkpoint, _expert: Expert | None) -> Variant:
    i2v = str(files.model_index.get("_class_name", "")).startswith("Kandinsky5I2V")
    tasks: tuple[Task, ...] = ("t2v",)
    if files.transformer.get("visual_cond"):
        tasks = ("i2v", "t2v") if i2v else ("t2v", "i2v")
    elif i2v:
        raise Unsupported("it is an image-to-video model whose transformer takes no image")
    return Variant(
        "Kandinsky 5",
        tasks,
        usual_parts(text_encoder_2="text_encoder", tokenizer_2="tokenizer"),
        size=(512, 768, 121),
        fps=24.0,
        sampling=Sampling(negative_prompt=_NEGATIVE),
        architecture="Kandinsky-5",
    )


def _transformer(width: int, ff: int, layers: tuple[int, int], axes: list[int], time: int, **more: Any) -> JSON:
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
_SAMPLER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0}
_NABLA = {
    "attention_type": "nabla",
    "attention_P": 0.9,
    "attention_wT": 11,
    "attention_wW": 3,
    "attention_wH": 3,
    "attention_add_sta": True,
    "attention_method": "topcdf",
}

_LITE = _transformer(1792, 7168, (2, 32), [16, 24, 24], 512)
_PRO = _transformer(4096, 16384, (4, 60), [32, 48, 48], 1024, **_NABLA)
_I2V = {"_class_name": "Kandinsky5I2VPipeline"}
_ATTENTIONS = tuple(
    f"{attention}.{layer}"
    for attention in ("self_attention", "cross_attention")
    for layer in ("to_query", "to_key", "to_value", "out_layer")  # by whole names: one class of the model is named out_layer too
)

KANDINSKY5_VIDEO = FamilySpec(
    name="kandinsky5_video",
    title="Kandinsky 5 Video",
    transformer_class="Kandinsky5Transformer3DModel",
    pipelines={"t2v": "Kandinsky5T2VPipeline", "i2v": "Kandinsky5I2VPipeline"},
    default_block=8,
    lora_targets=_ATTENTIONS,
    linears=(
        *_ATTENTIONS,
        "feed_forward.in_layer",
        "feed_forward.out_layer",
        "visual_modulation.out_layer",
    ),
    blocks="visual_transformer_blocks",
    depth_key="num_visual_blocks",
    block_parts=("self_attention", "cross_attention", "feed_forward"),
    unmasked_attentions=("self_attention", "cross_attention"),
    text_length=512,
    text_parameters=TextParameters(8_415_227_136, 1_174_084_096, 259_847_864),
    text_is_padded=False,
    geometry=_geometry,
    variant=_variant,
    comfyui=("diffusion_model.", "transformer.", "lora_unet_", ""),
    comfyui_since="December 2025",
    released=MappingProxyType(
        {
            "kandinsky5-lite": ModelShapes("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers", _LITE, _HUNYUAN_VAE, _SAMPLER),
            "kandinsky5-i2v-lite": ModelShapes(
                "kandinskylab/Kandinsky-5.0-I2V-Lite-5s-Diffusers",
                _LITE,
                _HUNYUAN_VAE,
                _SAMPLER,
                _I2V,
            ),
            "kandinsky5-pro": ModelShapes("kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers", _PRO, _HUNYUAN_VAE, _SAMPLER),
            "kandinsky5-i2v-pro": ModelShapes(
                "kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers",
                _PRO,
                _HUNYUAN_VAE,
                _SAMPLER,
                _I2V,
            ),
        }
    ),
)
