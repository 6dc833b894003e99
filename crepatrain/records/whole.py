"""Refusing a checkpoint or a transformer's folder that is not what was written, and offering what is."""

from collections.abc import Callable
from pathlib import Path

from crepatrain.errors import UserError
from crepatrain.integrity import Damaged, expect_listed
from crepatrain.records.layout import checkpoints, step_of
from crepatrain.training.checkpoint import damage_of


def resume_from(checkpoint: Path) -> str:
    """How a run is made to go on from a checkpoint."""
    return f"--resume_from_checkpoint {checkpoint.name}"


def step_option(checkpoint: Path) -> str:
    """How a command is made to take a checkpoint."""
    return f"--step {step_of(checkpoint)}"


def expect_whole(checkpoint: Path, choose: Callable[[Path], str] | None = None) -> None:
    """Make sure that every file of a checkpoint is what was written; of one by an earlier version nothing is known.

    Args:
        choose: the option that takes another checkpoint; None: there is none.

    Raises:
        UserError: a file is damaged or missing; the newest checkpoint that is whole is offered.
    """
    damage = damage_of(checkpoint)
    if damage is None:
        return
    others = (other for other in reversed(checkpoints(checkpoint.parent)) if other != checkpoint)
    whole = next((other for other in others if damage_of(other) is None), None)
    if whole is None:
        fix = "no other checkpoint of this run is whole: bring it back from a copy, or train anew in another output_dir"
    elif choose is None:
        fix = f"remove that folder: {whole.name} is the newest that is whole"
    else:
        fix = f"take the newest that is whole with {choose(whole)}, or remove that folder"
    raise UserError(f"{checkpoint} is damaged: {damage}", fix)


def expect_whole_transformer(folder: Path, remedy: str) -> None:
    """Make sure that every file of a transformer's folder is what was written.

    Args:
        remedy: what to do where it is not.

    Raises:
        UserError: a file is damaged or missing.
    """
    try:
        expect_listed(folder)
    except Damaged as damage:
        raise UserError(f"{folder} is damaged: {damage}", remedy) from damage
