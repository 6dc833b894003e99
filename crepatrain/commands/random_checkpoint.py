"""Writing random checkpoints, for demos, tests and benchmarks."""

from pathlib import Path

from crepatrain.errors import UserError, closest
from crepatrain.families import family_class
from crepatrain.families.random import write_random_pipeline
from crepatrain.outputs import expect_nothing_at
from crepatrain.quiet import quiet_libraries
from crepatrain.screen import Screen
from crepatrain.specs import FAMILIES


def make_random(family: str, folder: Path, size: str | None, seed: int, screen: Screen) -> None:
    """Write a pipeline of a family, with the shapes of a released model or of a tiny one.

    Args:
        size: the name of the model; None: the simplest tiny one.

    Raises:
        UserError: no such family or size, or a folder that is not empty.
    """
    if family not in FAMILIES:
        raise UserError(f"family {family}: unknown", _did_you_mean(family, list(FAMILIES)))
    quiet_libraries()
    kind = family_class(family)
    models = {**kind.tiny, **kind.spec.released}
    name = size or next(iter(kind.tiny))
    if name not in models:
        raise UserError(f"--size {name}: unknown", _did_you_mean(name, list(models)))
    expect_nothing_at(folder, "folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: it can't be created ({error.strerror})", "give another folder") from error
    write_random_pipeline(kind, folder, models[name], seed=seed, progress=lambda part: screen.say(f"writing {part}"))
    screen.say(f"wrote a random {name} checkpoint of {family} to {folder}, and a vision encoder to {folder / 'encoder'}")


def _did_you_mean(word: str, known: list[str]) -> str:
    close = closest(word, known)
    return f"did you mean {close}?" if close else f"use one of {', '.join(known)}"
