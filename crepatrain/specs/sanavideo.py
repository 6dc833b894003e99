"""SANA-Video, with the VAE of Wan or of LTX-2."""

from types import MappingProxyType

from crepatrain.geometry import Geometry
from crepatrain.specs.autoencoders import WAN_VAE, ltx_latents, wan_latents
from crepatrain.specs.base import (
    ATTENTION,
    ATTENTIONS,
    JSON,
    Checkpoint,
    Expert,
    FamilySpec,
    ModelShapes,
    Sampling,
    TextParameters,
    Unsupported,
    Variant,
    three_whole_numbers,
    usual_parts,
    whole_number,
)

_NEGATIVE = (
    "A chaotic sequence with misshapen, deformed limbs in heavy motion blur, sudden disappearance, jump cuts, jerky movements, "
    "rapid shot changes, frames out of sync, inconsistent character shapes, temporal artifacts, jitter, and ghosting effects, "
    "creating a disorienting visual experience."
)


def _geometry(transformer: JSON, vae: JSON) -> Geometry:
    temporal, spatial, channels = wan_latents(vae) if "z_dim" in vae else ltx_latents(vae)
    return Geometry(
        temporal_stride=temporal,
        spatial_stride=spatial,
        patch=three_whole_numbers(transformer, "patch_size"),
        latent_channels=channels,
        depth=whole_number(transformer, "num_layers"),
        width=whole_number(transformer, "num_attention_heads") * whole_number(transformer, "attention_head_dim"),
    )


def _variant(files: Checkpoint, _expert: Expert | None) -> Variant:
    if "z_dim" not in files.vae and "spatio_temporal_scaling" not in files.vae:
        raise Unsupported(f"its VAE ({files.vae.get('_class_name', 'of an unknown class')}) encodes images, not video")
    if files.transformer.get("guidance_embeds"):
        raise Unsupported("its transformer takes the guidance scale as an input, as distilled models do")
    hd = files.transformer.get("sample_size") == 22
    size = (704, 1280, 81) if hd else (480, 832, 81)
    sampling = Sampling(guidance=6.0, negative_prompt=_NEGATIVE)
    return Variant("SANA-Video", ("t2v", "i2v"), usual_parts(), size, fps=16.0, sampling=sampling, architecture="sana-video")


SANAVIDEO = FamilySpec(
    name="sanavideo",
    title="SANA-Video",
    transformer_class="SanaVideoTransformer3DModel",
    pipelines={"t2v": "SanaVideoPipeline", "i2v": "SanaImageToVideoPipeline"},
    default_block=10,
    lora_targets=ATTENTION,
    linears=ATTENTIONS,
    blocks="transformer_blocks",
    depth_key="num_layers",
    block_parts=("attn1", "attn2", "ff"),
    unmasked_attentions=(),  # its self-attention is linear, and its cross-attention has a mask
    text_length=300,
    text_parameters=TextParameters(2_614_341_888, 589_826_304, 77_865_984),
    text_is_padded=True,
    geometry=_geometry,
    variant=_variant,
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
                WAN_VAE,
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
