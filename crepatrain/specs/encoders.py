"""Vision encoders that are known by name, for the teacher of CREPA."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from crepatrain.specs.base import JSON


@dataclass(frozen=True)
class EncoderSpec:
    """A vision transformer as a teacher.

    Attributes:
        repo: on the hub, or a folder.
        width: E, channels of a patch's features.
        patch: pixels of one side of a patch.
        shapes: its config.json, for transformers' AutoConfig.
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
