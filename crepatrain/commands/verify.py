"""What other programs make of an adapter file, in words."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from crepatrain.adapters.adapter_file import AdapterFile, Model, read_adapter, recognise
from crepatrain.adapters.checks import check_expert, judge
from crepatrain.adapters.compatibility import how_to_load
from crepatrain.errors import Problem, UserError
from crepatrain.families import family_class
from crepatrain.families.base import Family
from crepatrain.screen import Screen
from crepatrain.specs import FAMILIES, Checkpoint, Unsupported


def verify(path: Path, base: Path | None, screen: Screen) -> None:
    """Tell what a file is, who reads what of it, and how it is loaded.

    Args:
        base: a diffusers pipeline folder, of which the JSON files are read; None: the model is recognised by names and shapes.

    Raises:
        UserError: with everything that a program would ignore, or that is wrong.
    """
    file = read_adapter(path)
    notes: list[str] = []
    problems: list[Problem] = []
    if base is None:
        model, fits = recognise(file)
        if not fits:
            notes.append(
                f"its shapes are those of no released {model.family.spec.title}: give the base with --base to check them"
            )
    else:
        model, fits = _model_of(base, file), True
        problems += check_expert(file, model)
        if model.family.variant.expert and not file.expert:
            notes.append(f"{model.title} has two experts, and nothing in the header says for which one it is")
    found = next((word for word in ("checkpoint", "optimizer", "scheduler") if word in path.name), None)
    if found:
        notes.append(f"diffusers passes over files named after a {found} unless weight_name names them")
    verdict = judge(file, model, shapes=fits)
    screen.rows(str(path), _facts(file, model) + [(reading.program, reading.in_words) for reading in verdict.readings])
    for note in (*notes, *verdict.notes):
        screen.note(note)
    problems += verdict.problems
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
    ]
    if recipe:
        trained = f"step {recipe.get('step')}, alpha {recipe.get('alpha_trained')} of rank {recipe.get('rank')}, scale baked in"
        expert = f", for the {recipe['expert']}-noise expert" if recipe.get("expert") else ""
        rows.insert(1, ("trained", trained + expert))
    return rows


def _model_of(base: Path, file: AdapterFile) -> Model:
    """The model of a pipeline folder, or of a transformer's own."""
    second = file.expert == "low" and (base / "transformer_2").is_dir()
    folder = next((base / name for name in ("transformer_2",) * second + ("transformer",) if (base / name).is_dir()), base)
    config = _read_json(folder / "config.json")
    spec = next((spec for spec in FAMILIES.values() if spec.transformer_class == config.get("_class_name")), None)
    if spec is None:
        known = ", ".join(spec.transformer_class for spec in FAMILIES.values())
        raise UserError(f"--base {base}: its transformer is a {config.get('_class_name')}", f"give one of: {known}")
    model_index, vae, scheduler = (
        _read_json(path) if path.is_file() else {}
        for path in (base / "model_index.json", base / "vae" / "config.json", base / "scheduler" / "scheduler_config.json")
    )
    first = spec.first
    checkpoint = Checkpoint(model_index or first.model_index, config, vae or first.vae, scheduler, origin="folder")
    try:
        variant = spec.variant(checkpoint, "low" if second else None)
    except (Unsupported, KeyError) as error:
        raise UserError(f"--base {base}: {error}", f"give a {spec.title} pipeline") from error
    family: Family = family_class(spec.name)(checkpoint, variant, variant.tasks[0])
    return Model(family, family.empty_transformer(), base.name or str(base))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error})", "give a diffusers pipeline folder") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}", "give a diffusers pipeline folder")
    return values
