"""LTX-Video 0.9: two generations, told apart by the pipeline class that a checkpoint's model_index.json names.

LTXPipeline and LTXImageToVideoPipeline are those of 0.9.0 and 0.9.1, LTXConditionPipeline is that of 0.9.5 and later. The weights
do not tell the two apart, and the pipelines feed them other positions in time and other embeddings of a caption.
"""

import json
from types import MappingProxyType

from crepatrain.geometry import Geometry
from crepatrain.specs.autoencoders import ltx_latents
from crepatrain.specs.base import (
    ATTENTION,
    ATTENTIONS,
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
    usual_parts,
    whole_number,
)

CONDITION_PIPELINE = "LTXConditionPipeline"
_FIRST_PIPELINES: dict[Task, str] = {"t2v": "LTXPipeline", "i2v": "LTXImageToVideoPipeline"}

_NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"


def _geometry(transformer: JSON, vae: JSON) -> Geometry:
    temporal, spatial, channels = ltx_latents(vae)
    patch = whole_number(transformer, "patch_size")
    return Geometry(
        temporal_stride=temporal,
        spatial_stride=spatial,
        patch=(whole_number(transformer, "patch_size_t"), patch, patch),
        latent_channels=channels,
        depth=whole_number(transformer, "num_layers"),
        width=whole_number(transformer, "num_attention_heads") * whole_number(transformer, "attention_head_dim"),
    )


def _variant(files: Checkpoint, _expert: Expert | None) -> Variant:
    if any(whole_number(files.transformer, side) != 1 for side in ("patch_size", "patch_size_t")):
        raise Unsupported("its transformer has patches of several latents")
    conditions = _conditions(files.model_index)
    # A VAE with timestep conditioning does the last denoising step itself.
    decode = {"decode_timestep": 0.05, "decode_noise_scale": 0.025} if files.vae.get("timestep_conditioning") else {}
    impossible = None
    if conditions and files.scheduler.get("use_dynamic_shifting"):
        impossible = f"its scheduler has use_dynamic_shifting, with which {CONDITION_PIPELINE} can't sample"
    sampling = Sampling(guidance=3.0, negative_prompt=_NEGATIVE, decode=decode, impossible=impossible)
    return Variant(
        "LTX-Video 0.9.5 or later" if conditions else "LTX-Video",
        ("t2v", "i2v"),
        usual_parts(),
        size=(512, 704, 121),
        fps=25.0,
        sampling=sampling,
        architecture="ltx-video",
        pipeline=CONDITION_PIPELINE if conditions else None,
        text_length=256 if conditions else None,
    )


def _conditions(model_index: JSON) -> bool:
    """Whether the pipeline is that of 0.9.5 and later.

    Raises:
        Unsupported: it is none whose inputs to the transformer are known.
    """
    named = model_index.get("_class_name")
    if named == CONDITION_PIPELINE:
        return True
    if named not in _FIRST_PIPELINES.values():
        known = ", ".join((*_FIRST_PIPELINES.values(), CONDITION_PIPELINE))
        raise Unsupported(f"_class_name of its model_index.json is not one of {known}, but {json.dumps(named, default=str)}")
    return False


def _transformer(head_dim: int, layers: int) -> JSON:
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


_VAE = {
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
_VAE_095 = _VAE | {
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
_SAMPLER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
_FIRST: JSON = {"_class_name": _FIRST_PIPELINES["t2v"]}

# LTXConditionPipeline sets its own noise levels, which diffusers refuses of a scheduler that shifts by the size of a clip.
CONDITION_SAMPLER: JSON = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": False, "shift": 1.0}
CONDITION_INDEX: JSON = {"_class_name": CONDITION_PIPELINE}

LTXVIDEO = FamilySpec(
    name="ltxvideo",
    title="LTX-Video 0.9",
    transformer_class="LTXVideoTransformer3DModel",
    pipelines=_FIRST_PIPELINES,
    default_block=8,
    lora_targets=ATTENTION,
    linears=(
        *ATTENTIONS,
        "ff.net.0.proj",
        "ff.net.2",
    ),
    blocks="transformer_blocks",
    depth_key="num_layers",
    block_parts=("attn1", "attn2", "ff"),
    unmasked_attentions=("attn1",),
    text_length=128,
    text_parameters=TextParameters(4_762_310_656, 131_600_384, 192_948_224),
    text_is_padded=True,
    sees_fps=True,
    geometry=_geometry,
    variant=_variant,
    released=MappingProxyType(
        {
            "ltx-2b": ModelShapes("Lightricks/LTX-Video", _transformer(64, 28), _VAE, _SAMPLER, _FIRST),
            "ltx-2b-0.9.5": ModelShapes(
                "Lightricks/LTX-Video-0.9.5",
                _transformer(64, 28),
                _VAE_095,
                CONDITION_SAMPLER,
                CONDITION_INDEX,
            ),
            "ltx-13b": ModelShapes(
                "Lightricks/LTX-Video-0.9.7-dev",
                _transformer(128, 48),
                _VAE_095,
                CONDITION_SAMPLER,
                CONDITION_INDEX,
            ),
        }
    ),
)
