"""What is known of families and of vision encoders without loading them; a file for each family."""

from collections.abc import Mapping
from types import MappingProxyType

from crepatrain.specs.base import Checkpoint, Expert, FamilySpec, ModelShapes, Task, Unsupported, Variant, WrongContent, has_part
from crepatrain.specs.encoders import ENCODERS, EncoderSpec
from crepatrain.specs.kandinsky5_video import KANDINSKY5_VIDEO
from crepatrain.specs.ltxvideo import LTXVIDEO
from crepatrain.specs.sanavideo import SANAVIDEO
from crepatrain.specs.wan import WAN

__all__ = [
    "ENCODERS",
    "FAMILIES",
    "Checkpoint",
    "EncoderSpec",
    "Expert",
    "FamilySpec",
    "ModelShapes",
    "Task",
    "Unsupported",
    "Variant",
    "WrongContent",
    "has_part",
    "released_model",
]

_SPECS = (
    WAN,
    LTXVIDEO,
    SANAVIDEO,
    KANDINSKY5_VIDEO,
)

FAMILIES: Mapping[str, FamilySpec] = MappingProxyType({spec.name: spec for spec in _SPECS})


def released_model(spec: FamilySpec, repo: str) -> ModelShapes | None:
    """The released model of a hub repository, if the package knows it."""
    return next((model for model in spec.released.values() if model.repo == repo), None)
