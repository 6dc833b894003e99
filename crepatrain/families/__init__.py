"""The DiT families: their tensors and names, nothing of alignment. One file each, of the same name as in specs/."""

from importlib import import_module

from crepatrain.families.base import Family
from crepatrain.specs import FAMILIES
from crepatrain.specs.base import Checkpoint, Expert, Task


def family_class(name: str) -> type[Family]:
    """The family of a config's `model_family`."""
    return import_module(f"{__name__}.{FAMILIES[name].name}").FAMILY


def get_family(name: str, checkpoint: Checkpoint, *, task: Task | None = None, expert: Expert | None = None) -> Family:
    """A family as one of its checkpoints is.

    Args:
        task: None: what the checkpoint is for.
        expert: the transformer that is trained of a checkpoint that has two.
    """
    variant = FAMILIES[name].variant(checkpoint, expert)
    return family_class(name)(checkpoint, variant, task or variant.tasks[0])
