"""Explaining what other programs do with an adapter file."""

import hashlib
from collections import Counter
from pathlib import Path

from crepatrain.adapters.adapter_file import AdapterFile, Model, model_of_folder, read_adapter, recognise
from crepatrain.adapters.checks import check_adapter, check_expert
from crepatrain.adapters.compatibility import how_to_load
from crepatrain.errors import Problem, UserError
from crepatrain.screen import Screen


def verify(path: Path, base: Path | None, screen: Screen) -> None:
    """Show what a file is, what each program loads of it, and how to load it.

    Args:
        base: a diffusers pipeline folder, of which the JSON files are read; None: the model is recognised by names and shapes.

    Raises:
        UserError: with everything that is wrong, or that a program would ignore.
    """
    file = read_adapter(path)
    notes: list[str] = []
    problems: list[Problem] = []
    if base is None:
        model, fits = recognise(file)
        if not fits:
            notes.append(
                f"its shapes are not those of a released {model.family.spec.title}: give the base with --base to check them"
            )
    else:
        model, fits = model_of_folder(base, file.expert), True
        problems += check_expert(file, model)
        if model.family.variant.expert and not file.expert:
            notes.append(f"{model.title} has two experts, and neither the file's name nor its header says for which one it is")
    skipped = next((word for word in ("checkpoint", "optimizer", "scheduler") if word in path.name), None)
    if skipped:
        notes.append(f"diffusers ignores files with {skipped} in their name unless weight_name names them")
    result = check_adapter(file, model, shapes=fits)
    screen.rows(str(path), _facts(file, model) + [(found.program, found.summary) for found in result.programs])
    for note in (*notes, *result.notes):
        screen.note(note)
    problems += result.problems
    if problems:
        raise UserError.of(problems)
    for line in how_to_load(file, model, None if base is None else str(base)):
        screen.say(line)


def _facts(file: AdapterFile, model: Model) -> list[tuple[str, str]]:
    with file.path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors.values())
    prefixes = Counter(pair.prefix or "no prefix" for pair in file.pairs.values())
    ends = sorted({end for pair in file.pairs.values() for end in pair.ends})
    alphas = sum(pair.alpha is not None for pair in file.pairs.values())
    recipe = file.recipe()
    rows = [
        ("model", f"{model.family.spec.title}, by the names and shapes of {model.title}"),
        (
            "keys",
            f"{len(file.tensors)}: {', '.join(prefixes)}; {', '.join(ends)}; {f'{alphas} .alpha' if alphas else 'no .alpha'}",
        ),
        ("layers", f"{len(file.pairs)}, of rank {', '.join(map(str, sorted(file.ranks))) or 'unknown'}"),
        ("dtype", ", ".join(dtypes)),
        ("sha256", digest),
        ("digest in its header", "right: the file is what was written" if file.sealed else "none, so that damage would not show"),
    ]
    if recipe:
        trained = f"step {recipe.get('step')}, alpha {recipe.get('alpha_trained')} of rank {recipe.get('rank')}, scale baked in"
        expert = f", for the {recipe['expert']}-noise expert" if recipe.get("expert") else ""
        rows.insert(1, ("trained", trained + expert))
    return rows
