"""Random checkpoints, for demos, tests and benchmarks."""

from pathlib import Path

from crepatrain.commands.quiet import quiet_libraries
from crepatrain.config.specs import FAMILIES
from crepatrain.console import Screen
from crepatrain.errors import UserError, closest
from crepatrain.families import get_family
from crepatrain.families.random import write_random_pipeline


def make_random(family: str, folder: Path, size: str | None, seed: int, screen: Screen) -> None:
    """Write a pipeline of a family, tiny or of a released model's shapes.

    Raises:
        UserError: no such family or size, or a folder that holds something.
    """
    if family not in FAMILIES:
        raise UserError(f"family {family}: unknown", _did_you_mean(family, list(FAMILIES)))
    released = FAMILIES[family].released
    if size is not None and size not in released:
        raise UserError(f"--size {size}: unknown", _did_you_mean(size, list(released)))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: there is something already", "give a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: it can't be made ({error.strerror})", "give another folder") from error
    quiet_libraries()
    write_random_pipeline(
        get_family(family),
        folder,
        released=released[size] if size else None,
        seed=seed,
        progress=lambda part: screen.say(f"writing {part}"),
    )
    screen.say(f"wrote a random {size or f'tiny {family}'} checkpoint to {folder}, and a vision encoder to {folder / 'encoder'}")


def _did_you_mean(word: str, known: list[str]) -> str:
    close = closest(word, known)
    return f"did you mean {close}?" if close else f"use one of {', '.join(known)}"
