"""Opening a run that is there already: its config, its family, the step that is asked for."""

from pathlib import Path

from crepatrain.config.load import read_run_config
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.config.sections import LoopConfig
from crepatrain.config.sources import read_checkpoint
from crepatrain.errors import UserError
from crepatrain.families import get_family
from crepatrain.families.base import Family
from crepatrain.records.layout import RunLayout
from crepatrain.records.reading import no_run, note_unknown_keys, read_best, read_config_values
from crepatrain.screen import Screen
from crepatrain.specs import FAMILIES


def config_of(run: Path, screen: Screen) -> ResolvedConfig:
    """The config of a run's folder. A key that this version does not know is set aside, with a note.

    Raises:
        UserError: the folder holds no run, or its config is damaged.
    """
    layout = RunLayout(run)
    values = read_config_values(layout)
    if not values:
        raise no_run(run)
    config, unknown = read_run_config(values, layout.config_file)
    note_unknown_keys(layout, unknown, screen)
    return config


def family_of(config: ResolvedConfig) -> Family:
    """The family as a run's base is; of the base only the JSON files are read.

    Raises:
        UserError: the base is gone.
    """
    source, revision = config.model.pretrained_model_name_or_path, config.model.revision
    checkpoint, _ = read_checkpoint(source, revision, FAMILIES[config.model.model_family], config.model.wan_expert, online=False)
    return get_family(config.model.model_family, checkpoint, task=config.model.task, expert=config.model.wan_expert)


def adapter_name(config: LoopConfig, family: Family) -> str:
    """How the run's adapters are named, with the expert that they are for."""
    return config.output_name + (f"_{family.variant.expert}_noise" if family.variant.expert else "")


def asked_step(root: Path, text: str | None) -> int | None:
    """What `--step` means: a number, or `best`; None: the last.

    Raises:
        UserError: it is neither, or the run held nothing out.
    """
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    if text != "best":
        raise UserError(f"--step {text}: not a step", "give a number, or best")
    best = read_best(root).get("step")
    if best is None:
        raise UserError(
            f"--step best: {root} has no {RunLayout(root).best_file.name}, as it held out no clips",
            "give a number, or train with eval_share",
        )
    return best
