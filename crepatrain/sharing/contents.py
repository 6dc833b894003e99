"""What of a run goes to the hub: its result, a few videos, and the model card."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crepatrain.adapters.adapter_file import Model, read_adapter
from crepatrain.adapters.checks import check_adapter
from crepatrain.adapters.recipe import SCHEMA, recipe
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.data.encode import video_facts
from crepatrain.errors import UserError
from crepatrain.families.base import Family
from crepatrain.files import written_aside
from crepatrain.records.layout import ADAPTER_FILE, BESIDE_BASE, RunLayout, checkpoints, set_aside_name, step_of
from crepatrain.records.opening import adapter_name
from crepatrain.records.reading import RunRecord
from crepatrain.records.whole import expect_whole, expect_whole_transformer
from crepatrain.screen import Screen
from crepatrain.sharing.model_card import Card, Shown
from crepatrain.training.checkpoint_content import read_fingerprint

# At most so many videos of `sample`, the newest first, beside the newest of validation and the base's.
_SAMPLES = 4


@dataclass(frozen=True, eq=False)
class Result:
    """What a run has made, as it goes to the hub.

    Attributes:
        weights: in the repository: the adapter's file, or the transformer's folder.
        files: by their place in the repository.
        recipe: as an adapter's header holds it.
    """

    weights: str
    files: Mapping[str, Path]
    recipe: Mapping[str, Any]


def find_result(root: Path, config: ResolvedConfig, family: Family, step: int | None) -> Result:
    """A run's adapter or transformer.

    Args:
        step: whose adapter; None: the last.

    Raises:
        UserError: there is none, the adapter would do nothing, it is damaged, or the last checkpoint of a whole transformer is.
    """
    layout = RunLayout(root)
    if config.model.model_type == "full":
        if step is not None:
            raise UserError(
                f"--step {step}: this run trained the whole transformer, and keeps only the last one", "leave --step out"
            )
        part, found = family.variant.transformer, checkpoints(layout.checkpoints)
        folder = layout.result_transformer(part)
        paths = sorted(path for path in folder.glob("*") if path.is_file())
        if not paths or not found:
            raise UserError(f"{folder}: there is no transformer yet", "train first")
        expect_whole_transformer(folder, f"write it again with `crepatrain export {root}`, and put that in its place")
        expect_whole(found[-1])
        fingerprint, last = read_fingerprint(found[-1]), step_of(found[-1])
        return Result(
            part,
            {f"{part}/{path.name}": path for path in paths},
            recipe(config, family, fingerprint, last, (), averaged=config.optim.use_ema),
        )
    name = adapter_name(config.loop, family)
    path = layout.result_adapter if step is None else layout.adapter(name, step)
    file = read_adapter(path)
    if file.recipe().get("schema") != SCHEMA:
        raise UserError(f"{path}: its header holds no recipe, so a card can't describe it", f"run `crepatrain export {root}`")
    problems = check_adapter(file, Model(family, family.empty_transformer(), family.variant.title)).problems
    if problems:
        raise UserError.of(list(problems))
    # Both experts may go into one repository.
    place = f"{name}.safetensors" if family.variant.expert else ADAPTER_FILE
    return Result(place, {place: path}, file.recipe())


def find_videos(run: RunRecord, step: int) -> dict[Path, Shown]:
    """The videos worth showing, the best first, as the card shows them: of `sample`, then validation's beside the base's.

    A video of a training caption is left out, as captions stay on this machine.
    """
    layout, found = run.layout, dict[Path, Shown]()
    samples = sorted(layout.samples.glob(f"*{BESIDE_BASE}"), key=lambda path: -path.stat().st_mtime)
    for path in samples:
        facts = video_facts(path)
        if facts.get("step") == step and "prompt" in facts and not facts.get("caption") and len(found) < _SAMPLES:
            found[path] = Shown(_place(path, run), [facts["prompt"]])
    of_run = [path for at, path in run.videos if at <= step]
    for path in [*of_run[:1], *(path for path in of_run[1:] if path == layout.video(0))]:
        facts = video_facts(path)
        if "prompts" in facts:
            found[path] = Shown(_place(path, run), list(facts["prompts"]), base=path == layout.video(0))
    return found


def _place(path: Path, run: RunRecord) -> str:
    """The place in the repository: the same as in the run's folder."""
    return path.relative_to(run.root).as_posix()


def write_card(path: Path, card: Card, on_hub: str | None, screen: Screen) -> None:
    """Write the card into the run's folder: what is new of it, in the repository's card, or else in the one of the folder.

    Args:
        on_hub: the repository's card; None where it has none, or was not asked.

    Raises:
        UserError: it can't be written, or the one before can't be read.
    """
    try:
        own = path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({error})", "fix or remove it") from error
    text = card.over(own if on_hub is None else on_hub)
    try:
        if None not in (own, on_hub) and own != on_hub:
            aside = path.replace(set_aside_name(path))
            screen.note(f"{path} was replaced by the card on the hub; the old file is kept as {aside}")
        with written_aside(path) as aside:
            aside.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror})", "free disk space, or fix its permissions") from error
