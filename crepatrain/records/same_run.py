"""Whether a run may go on: its config is the one that its folder holds, and its checkpoint was made from the same things."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crepatrain.config.run_config import ALLOWABLE, KEYS
from crepatrain.errors import Problem, UserError
from crepatrain.records.clip_lists import Difference, ListedClip, differences
from crepatrain.specs import FAMILIES

# Of a step's samples: how they are split does not matter, as long as they are the same ones.
_SPLIT = ("train_batch_size", "gradient_accumulation_steps")
# Keys whose default is the value of another one, and which change with it.
_FOLLOWS = {"crepa_projector_lr": "learning_rate"}


@dataclass(frozen=True)
class KeyChange:
    """A key that changed within a run, with its values as JSON."""

    key: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} there, {self.now} here"


@dataclass(frozen=True)
class Split:
    """How the samples of an optimizer step are split."""

    processes: int
    batch_size: int
    accumulation: int

    @property
    def unit(self) -> int:
        """Samples of a step."""
        return self.processes * self.batch_size * self.accumulation

    def __str__(self) -> str:
        several = "process" if self.processes == 1 else "processes"
        return (
            f"{self.processes} {several} x train_batch_size {self.batch_size} x gradient_accumulation_steps {self.accumulation}"
        )


def key_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[KeyChange]:
    """The keys by which another config makes another run.

    One that this version does not know counts as well: it may have meant something.
    """
    # A key that the run did not know yet had the meaning of its default.
    defaults = {key: info.field.default for key, info in KEYS.items() if key not in before}
    before = {**before, **{key: now[key] if default is None else default for key, default in defaults.items()}}
    changed = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key) and not _may_change(key)]
    kept = _kept_by_the_split(before, now)
    return [KeyChange(key, json.dumps(before.get(key)), json.dumps(now.get(key))) for key in changed if key not in kept]


def _may_change(key: str) -> bool:
    return key == "output_dir" or (key in KEYS and KEYS[key].may_change)


def _kept_by_the_split(before: Mapping[str, Any], now: Mapping[str, Any]) -> Collection[str]:
    """The keys that only split a step's samples otherwise; `split_problem` sees to it that these are as many as before."""
    spec = FAMILIES.get(now["model_family"])
    # Where text is not padded, more than one sample in a forward pass sorts the clips by the length of their captions.
    sorts = spec is not None and not spec.text_is_padded and (before.get(_SPLIT[0]) == 1) != (now[_SPLIT[0]] == 1)
    return () if sorts else _SPLIT


def config_problem(root: Path, changes: Sequence[KeyChange], allowed: Collection[str]) -> Problem | None:
    """What is wrong with going on with a config that differs in these keys; None where allow_changes names all of them."""
    refused = [change for change in changes if not _is_allowed(change, changes, allowed)]
    if not refused:
        return None
    what = f"output_dir={root} holds a different run ({'; '.join(map(str, refused))})"
    fix = "give a new output_dir, or the same values to continue it"
    names = [change.key for change in refused if change.key in ALLOWABLE]
    if len(names) == len(refused):
        needed = [change.key for change in refused if not _is_allowed(change, changes, set(names) - {change.key})]
        fix += f"; or continue it with the new ones: {in_option([*allowed, *needed])}"
    return Problem(what, fix, tuple(change.key for change in refused if change.key in KEYS))


def _is_allowed(change: KeyChange, changes: Sequence[KeyChange], allowed: Collection[str]) -> bool:
    if change.key in allowed:
        return True
    leader = next((other for other in changes if other.key == _FOLLOWS.get(change.key)), None)
    return leader is not None and leader.key in allowed and (change.before, change.now) == (leader.before, leader.now)


def in_option(keys: Collection[str]) -> str:
    """How allow_changes is written on the command line."""
    return f"--allow_changes {','.join(dict.fromkeys(keys))}"


def split_problem(unit: int, before: Split | None, now: Split) -> Problem | None:
    """What is wrong with other samples of a step; None where they are as many as before.

    Args:
        unit: samples of a step so far.
        before: how these were split, where that is known.
    """
    if unit == now.unit:
        return None
    there = f" ({before})" if before else ""
    what = f"a step of this run has {unit} samples{there}, and here it would have {now.unit} ({now})"
    several = "process" if now.processes == 1 else "processes"
    if unit % (now.processes * now.batch_size) == 0:
        steps = unit // (now.processes * now.batch_size)
        fix = f"set gradient_accumulation_steps to {steps} for {now.processes} {several}, or give a new output_dir"
    else:
        fix = f"use as many processes and such a train_batch_size that their product divides {unit}, or give a new output_dir"
    return Problem(what, fix, _SPLIT)


def expect_same_fingerprint(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    clips_before: Sequence[ListedClip] | None = None,
    clips_now: Sequence[ListedClip] = (),
    allowed: Collection[str] = (),
) -> list[str]:
    """Compare what a checkpoint was made from with what there is now.

    Args:
        clips_before: of the checkpoint, where the run's folder lists them.
        allowed: of allow_changes.

    Returns:
        What is different about the clips, where that is allowed.

    Raises:
        UserError: something of it has changed.
    """
    problems, told = [], []
    # The encoder is in neither where no teacher is asked any more.
    parts = sorted(
        part for part in before["models"].keys() & now["models"].keys() if before["models"][part] != now["models"][part]
    )
    if parts:
        what = f"the weights of {', '.join(parts)} changed since this run's checkpoint"
        problems.append(Problem(what, "put them back, or give a new output_dir"))
    if before["samples"] != now["samples"]:
        unknown = [Difference("which of them is not known: an earlier version wrote it", frozenset({"train_data"}))]
        found = unknown if clips_before is None else differences(clips_before, clips_now)
        refused = [difference for difference in found if difference.keys.isdisjoint(allowed)]
        told = [difference.words for difference in found]
        if refused:
            words = "; ".join(difference.words for difference in refused)
            problems.append(
                Problem(
                    f"the clips or captions changed since this run's checkpoint: {words}",
                    "put them back, or give a new output_dir; "
                    f"or continue with them as they are: {in_option([*allowed, 'train_data'])}",
                    ("train_data",),
                )
            )
    samples = split_problem(before["unit"], split_of(before), _split(now["split"]))
    problems += [samples] if samples else []
    if problems:
        raise UserError.of(problems)
    return told


def split_of(fingerprint: Mapping[str, Any]) -> Split | None:
    """How a step was split when a checkpoint was written; None where an earlier version wrote it."""
    found = fingerprint.get("split")
    keys = {"processes", *_SPLIT}
    if not isinstance(found, dict) or not all(isinstance(found.get(key), int) for key in keys):
        return None
    return _split(found)


def _split(found: Mapping[str, int]) -> Split:
    return Split(found["processes"], *(found[key] for key in _SPLIT))
