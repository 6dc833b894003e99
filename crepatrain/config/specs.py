"""What is known of a family and of the vision encoders without loading them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from crepatrain.geometry import Geometry

JSON = Mapping[str, Any]


@dataclass(frozen=True)
class ReleasedModel:
    """A released checkpoint: where it is, and what its config.json files say."""

    repo: str
    transformer: JSON
    vae: JSON
    text_width: int
    flow_shift: float


@dataclass(frozen=True)
class FamilySpec:
    """One DiT family.

    Attributes:
        title: for people.
        transformer_class, pipeline_class: their names in diffusers.
        parts: folders that a checkpoint must hold.
        weights: those of them that hold safetensors.
        default_block: `crepa_block_index` where the config says none.
        default_size: (height, width, num_frames) where the config says none.
        fps: frames per second that the family was trained at.
        lora_targets: names of the Linear layers that LoRA adapts by default, matched at the end of a module's name.
        blocks: attribute of the transformer that holds its blocks.
        text_length: tokens of a caption at most.
        geometry: reads a checkpoint's transformer and VAE config.
        unsupported: reads a checkpoint's model_index and transformer config; says what of it can't be trained, or None.
        released: released models by name.
    """

    name: str
    title: str
    transformer_class: str
    pipeline_class: str
    parts: tuple[str, ...]
    weights: tuple[str, ...]
    default_block: int
    default_size: tuple[int, int, int]
    fps: float
    lora_targets: tuple[str, ...]
    blocks: str
    text_length: int
    geometry: Callable[[JSON, JSON], Geometry]
    unsupported: Callable[[JSON, JSON], str | None]
    released: Mapping[str, ReleasedModel]


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


def _wan_unsupported(model_index: JSON, transformer: JSON) -> str | None:
    if any(model_index.get("transformer_2") or ()) or model_index.get("boundary_ratio") is not None:
        return "it is a Wan 2.2 A14B model with two experts"
    if model_index.get("expand_timesteps"):
        return "it is a Wan 2.2 TI2V model with a timestep per token"
    if transformer["in_channels"] != transformer["out_channels"] or transformer.get("image_dim") is not None:
        return "it is an image-to-video model"
    return None


def _wan_transformer(heads: int, ffn: int, layers: int) -> JSON:
    return {
        "patch_size": [1, 2, 2],
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
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

WAN = FamilySpec(
    name="wan",
    title="Wan 2.1 text-to-video",
    transformer_class="WanTransformer3DModel",
    pipeline_class="WanPipeline",
    parts=("transformer", "vae", "text_encoder", "tokenizer", "scheduler"),
    weights=("transformer", "vae", "text_encoder"),
    default_block=8,
    default_size=(480, 832, 81),
    fps=16.0,
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    blocks="blocks",
    text_length=512,
    geometry=_wan_geometry,
    unsupported=_wan_unsupported,
    released=MappingProxyType(
        {
            "wan2.1-1.3b": ReleasedModel(
                "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", _wan_transformer(12, 8960, 30), _WAN_VAE, text_width=4096, flow_shift=3.0
            ),
            "wan2.1-14b": ReleasedModel(
                "Wan-AI/Wan2.1-T2V-14B-Diffusers", _wan_transformer(40, 13824, 40), _WAN_VAE, text_width=4096, flow_shift=3.0
            ),
        }
    ),
)

FAMILIES: Mapping[str, FamilySpec] = MappingProxyType({spec.name: spec for spec in (WAN,)})


def released_model(spec: FamilySpec, repo: str) -> ReleasedModel | None:
    """The released model that lives in a hub repository, if the package knows it."""
    return next((model for model in spec.released.values() if model.repo == repo), None)


@dataclass(frozen=True)
class EncoderSpec:
    """A vision transformer as a teacher: where it is, E, and the pixels of one patch."""

    repo: str
    width: int
    patch: int


def _dinov2() -> dict[str, EncoderSpec]:
    sizes = {"vits14": ("small", 384), "vitb14": ("base", 768), "vitl14": ("large", 1024), "vitg14": ("giant", 1536)}
    specs = {}
    for short, (size, width) in sizes.items():
        specs[f"dinov2_{short}"] = EncoderSpec(f"facebook/dinov2-{size}", width, 14)
        specs[f"dinov2_{short}_reg"] = EncoderSpec(f"facebook/dinov2-with-registers-{size}", width, 14)
    return specs


ENCODERS: Mapping[str, EncoderSpec] = MappingProxyType(_dinov2())
