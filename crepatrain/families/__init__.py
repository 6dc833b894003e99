"""The DiT families: their tensors and names, nothing of alignment. One file each."""

from collections.abc import Mapping

from crepatrain.families.base import Family
from crepatrain.families.wan import WanFamily

_FAMILIES: Mapping[str, type[Family]] = {"wan": WanFamily}


def get_family(name: str) -> Family:
    """The family of a config's `model_family`."""
    return _FAMILIES[name]()
