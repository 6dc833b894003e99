"""Whether a config may go on in a folder, and from where: by the folder's JSON files and names alone. No torch."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crepatrain.config.migrations import migrate
from crepatrain.config.plan import Plan
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.config.run_config import KEYS
from crepatrain.errors import Problem, UserError
from crepatrain.leftovers import written_for
from crepatrain.records.layout import RunLayout, checkpoints, step_of
from crepatrain.records.reading import raw_lines, read_config_values, read_dataset, read_status, step_of_line
from crepatrain.records.same_run import KeyChange, Split, config_problem, key_changes, split_problem

_LATEST = "latest"
_ANEW = "--resume_from_checkpoint null"


@dataclass(frozen=True)
class Continuation:
    """How a config goes on in a folder.

    Attributes:
        checkpoint: to go on from; None: from step 0.
        lost: whether a run begins anew whose checkpoints are gone; what it has left is set aside.
        changes: keys that differ from those before, which allow_changes names.
        remark: on the number of processes, where another one than before is needed.
    """

    checkpoint: Path | None = None
    lost: bool = False
    changes: tuple[KeyChange, ...] = ()
    remark: str | None = None

    @property
    def notes(self) -> list[str]:
        """What of it should be known, for people."""
        begun = f"from step {step_of(self.checkpoint)} on" if self.checkpoint else "from the beginning"
        changes = [f"{change.key} is {change.now} {begun}, and was {change.before}" for change in self.changes]
        return [*changes, self.remark] if self.remark else changes


def find_continuation(layout: RunLayout, config: ResolvedConfig, processes: int | None = None) -> Continuation:
    """Whether and how a config goes on in a folder.

    Args:
        processes: that will train together; None: not known yet.

    Raises:
        UserError: the folder is not empty and holds no run, or holds another one; its checkpoints are lost, or the one that is
            asked for is not in it.
    """
    before = _config_before(layout)
    if before is None:
        _expect_empty(layout)
        return Continuation()
    problems, remark = _misplaced_files(layout), None
    found, steps = checkpoints(layout.checkpoints), _last_step(layout)
    changes: list[KeyChange] = []
    if found or steps:  # else it ended before its first step: there is nothing to lose
        changes = key_changes(before, config.model_dump())
        problems += _problems(config_problem(layout.root, changes, config.loop.allow_changes))
        remark = _compare_samples(layout, before, config, processes, problems)
    lost = not found and _had_checkpoints(layout, before, steps)
    checkpoint = None
    try:
        checkpoint = _checkpoint(layout, config.loop.resume_from_checkpoint, found, lost=lost)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError.of(problems)
    return Continuation(checkpoint, lost, tuple(changes), remark)


def keep_begun(plan: Plan) -> Plan:
    """A plan whose open keys are those of a run in its folder, where these can't change within a run.

    Raises:
        UserError: the run's config.json is damaged.
    """
    fixed = {key for key in plan.open_keys if not KEYS[key].may_change}
    layout = RunLayout(Path(plan.config.loop.output_dir))
    before = _config_before(layout) if fixed else None
    if not before or not (checkpoints(layout.checkpoints) or _last_step(layout)):
        return plan
    kept = {key: before.get(key, KEYS[key].field.default) for key in fixed}
    return replace(plan, config=plan.config.changed(**kept), open_keys=plan.open_keys - fixed)


def _problems(found: Problem | None) -> list[Problem]:
    return [] if found is None else [found]


def _config_before(layout: RunLayout) -> dict[str, Any] | None:
    """The config of the run that the folder holds; None if it holds none, or somebody else's config.json."""
    before = read_config_values(layout)
    if not {"model_family", "output_dir"} <= before.keys():
        return None
    return migrate(before, layout.config_file)


def _expect_empty(layout: RunLayout) -> None:
    root = layout.root
    try:
        names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    except OSError as error:
        raise UserError(f"output_dir={root}: it can't be read ({error.strerror})", "fix its permissions") from error
    # A run that was killed while it claimed the folder may have got no further than this.
    others = [name for name in names if name != layout.lock_file.name and written_for(root / name) is None]
    if others:
        raise UserError(f"output_dir={root}: it is not empty and holds no run ({', '.join(others[:5])})", "give a new folder")


def _misplaced_files(layout: RunLayout) -> list[Problem]:
    """Files and broken links in the place of folders that the run will write into."""
    folders = (layout.checkpoints, layout.adapters, layout.samples)
    return [
        Problem(f"{folder}: it is no folder, and the run writes into it", "move it away")
        for folder in folders
        if os.path.lexists(folder) and not folder.is_dir()
    ]


def _last_step(layout: RunLayout) -> int:
    """The last step that is logged, 0 without one; damaged lines do not count, as `claim` removes them."""
    return max((step_of_line(text) or 0 for text in raw_lines(layout.metrics)), default=0)


def _compare_samples(
    layout: RunLayout, before: Mapping[str, Any], config: ResolvedConfig, processes: int | None, problems: list[Problem]
) -> str | None:
    """Whether a step has as many samples as before, as far as that is known already; its checkpoint knows it too.

    Args:
        problems: what is wrong is added to it.

    Returns:
        A remark on the number of processes.
    """
    try:
        unit = read_dataset(layout.root).get("unit")
    except UserError:  # it is written anew
        return None
    own = (before.get("train_batch_size", 1), before.get("gradient_accumulation_steps", 1))
    if not unit or not all(isinstance(number, int) and number > 0 for number in own) or unit % math.prod(own):
        return None
    there = Split(unit // math.prod(own), *own)
    here = Split(processes or 1, config.loop.train_batch_size, config.loop.gradient_accumulation_steps)
    if processes is None and unit % here.unit == 0:
        needed = unit // here.unit
        several = "process trains" if needed == 1 else "processes train"
        same = needed == there.processes
        return None if same else f"a step of this run has {unit} samples: with this config {needed} {several} them"
    problems += _problems(split_problem(unit, there, here))
    return None


def _had_checkpoints(layout: RunLayout, before: Mapping[str, Any], steps: int) -> bool:
    """Whether a checkpoint must have been written, by what else is there.

    An adapter alone does not say it, nor do a few steps: the adapter is written before its checkpoint, and a kill may come in
    between, or before the first of them.
    """
    try:
        ended = read_status(layout.root)
    except UserError:
        ended = {}
    if ended.get("status") in {"completed", "stopped"} and ended.get("step", 0) > 0:
        return True
    adapters = sorted({step_of(path) for path in layout.all_adapters()})
    if len(adapters) > 1 or (adapters and steps > adapters[-1]):
        return True
    every = before.get("checkpointing_steps")
    return isinstance(every, int) and steps > every


def _checkpoint(layout: RunLayout, wanted: str | None, found: Sequence[Path], *, lost: bool) -> Path | None:
    root = layout.root
    if wanted is None:
        if found:
            raise UserError(
                f"output_dir={root} holds a run at step {step_of(found[-1])}, and resume_from_checkpoint is null",
                "give a new output_dir, or set resume_from_checkpoint to latest",
                ("resume_from_checkpoint",),
            )
        return None
    if lost:
        what = f"output_dir={root}: its run has trained, and its checkpoints are gone: {layout.checkpoints} holds none"
        fix = f"put them back, or give a new output_dir; {_ANEW} begins it anew and sets aside what is there"
        raise UserError(what, fix, ("resume_from_checkpoint",))
    if wanted == _LATEST:
        return found[-1] if found else None
    is_path = any(sign in wanted for sign in (os.sep, os.altsep) if sign) or wanted in {os.curdir, os.pardir, "~"}
    matching = _at_path(wanted, found) if is_path else _of_name(wanted, found)
    if matching:
        return matching
    names = ", ".join(path.name for path in found) or "none yet"
    if is_path:
        what = f"resume_from_checkpoint={wanted}: it is not in this run, whose checkpoints are in {layout.checkpoints}"
    else:
        what = f"resume_from_checkpoint={wanted}: no such checkpoint in {layout.checkpoints}"
    raise UserError(what, f"use latest, or one of: {names}", ("resume_from_checkpoint",))


def _at_path(wanted: str, found: Sequence[Path]) -> Path | None:
    place = os.path.realpath(os.path.expanduser(wanted))  # noqa: PTH111 - as the strings that it is compared by
    return next((path for path in found if os.path.realpath(path) == place), None)


def _of_name(wanted: str, found: Sequence[Path]) -> Path | None:
    """Of the folder's whole name, or else of its step: step-8 is step-000008."""
    named = next((path for path in found if path.name == wanted), None)
    number = wanted.removeprefix("step-")
    if named or number == wanted or not (number.isascii() and number.isdecimal()):
        return named
    return next((path for path in found if step_of(path) == int(number)), None)
