"""The config that is being written on the page, and what is to be said of it. It is kept in a file, so that it can be left."""

import contextlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crepatrain.config.checks import maximum_score
from crepatrain.config.load import parse, read_values
from crepatrain.config.plan import Plan, plan_of
from crepatrain.config.run_config import KEYS
from crepatrain.config.summary import summarize
from crepatrain.data.texts import is_unicode
from crepatrain.errors import Problem, UserError
from crepatrain.files import written_aside
from crepatrain.geometry import TokenGrid
from crepatrain.records.continuing import find_continuation
from crepatrain.records.layout import RunLayout
from crepatrain.training.schedule import build_schedule
from crepatrain.web.confinement import Folders, expanded
from crepatrain.web.fields import fields, off_default
from crepatrain.web.steps import CREPA_PRESETS, SCHEDULE_KEYS

# Points of the drawn weight.
_POINTS = 400
ASSUMED_STEPS = 1000
"""The length of a run that is drawn while its own is not known."""
# What decides about the token grid and the score; the rest of a config may still be missing.
_OF_THE_SCORE = frozenset(
    key for key, info in KEYS.items() if info.section in {"model", "crepa"} or key in {"height", "width", "num_frames", "fps"}
)
_LONGEST_CONFIG = 200_000


@dataclass(frozen=True)
class Checked:
    """What is to be said of a draft.

    Attributes:
        plan: None where there are problems.
        summary: what will happen, as (topic, words).
        notes: what should be known though nothing is wrong.
        grid: None while the model or the size of the clips is not known.
        maximum: of the score that the threshold is compared with.
    """

    problems: tuple[Problem, ...]
    plan: Plan | None
    summary: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    grid: TokenGrid | None
    maximum: float | None

    def of(self, key: str) -> tuple[Problem, ...]:
        """The problems that stand beside a field."""
        return tuple(problem for problem in self.problems if key in problem.keys)


class Draft:
    """The values of a config, as far as somebody has chosen them.

    Args:
        folders: what the config may name; the draft's file lies in the page's own folder.

    Attributes:
        values: by key; a key that is not there has its default.
    """

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._file = folders.own / "draft.json"
        self._lock = threading.Lock()
        self.values: dict[str, Any] = self._kept()

    def _kept(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found = json.loads(self._file.read_bytes())
            if isinstance(found, dict):
                return found
        return self._first()

    def _first(self) -> dict[str, Any]:
        """What a new draft begins with: the folders that the page was started with."""
        return {"train_data": str(self._folders.data[0]), "output_dir": str(self._folders.runs / "my-run")}

    def choose(self, key: str, value: Any) -> None:
        """Choose a value; the key's default leaves the key out."""
        default = fields()[key].default
        with self._lock:
            if value == default and isinstance(value, bool) == isinstance(default, bool):
                self.values.pop(key, None)
            else:
                self.values[key] = value
            self._save()

    def write(self, key: str, text: str) -> None:
        """Choose what a text in the key's field means; an empty one leaves the key out."""
        known = fields()[key]
        self.choose(key, known.value_of(text) if text.strip() else known.default)

    def shown(self, key: str) -> str:
        """The text in the key's field."""
        known = fields()[key]
        value = self.values.get(key, known.default)
        return "null" if value is None and known.default is not None else known.shown(value)

    def replace(self, values: Mapping[str, Any]) -> None:
        """Begin from other values."""
        with self._lock:
            self.values = dict(values)
            self._save()

    def clear(self) -> None:
        """Begin anew."""
        self.replace(self._first())

    def preset(self, name: str) -> None:
        """Take the settings of CREPA for a kind of clips; block, neighbours and teacher stay as they are."""
        kept = {key: value for key, value in self.values.items() if key not in SCHEDULE_KEYS}
        self.replace(kept | CREPA_PRESETS[name])

    def _save(self) -> None:
        try:
            with written_aside(self._file) as aside:
                aside.write_text(self.text(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self._file} can't be written ({error})", "free disk space, or fix its permissions") from error

    def text(self) -> str:
        """The config file."""
        return as_file(self.values)

    def read_text(self, text: str) -> None:
        """Begin from the text of a config file.

        Raises:
            UserError: it is no config file.
        """
        if len(text) > _LONGEST_CONFIG:
            raise UserError(f"the config has {len(text)} characters", f"use {_LONGEST_CONFIG} at most")
        file = self._folders.own / "opened.json"
        with written_aside(file) as aside:
            aside.write_text(text, encoding="utf-8", errors="replace")
        self.open(file)

    def open(self, path: Path) -> None:
        """Begin from a config file, or from what a run has chosen.

        Raises:
            UserError: it is outside of the page's folders, or no config file.
        """
        if not self._folders.holds(path):
            raise UserError(f"{path}: outside of the folders of this page", "open another file")
        if path.is_file() and path.stat().st_size > _LONGEST_CONFIG:
            raise UserError(f"{path} has {path.stat().st_size} bytes", f"open a config of {_LONGEST_CONFIG} at most")
        values = read_values(path, (), [])
        of_a_run = 2 * len(values) > len(KEYS)
        self.replace(off_default(values) if of_a_run else values)

    def path(self, key: str) -> Path | None:
        """The file or folder that a key names, where one is given."""
        found = self.values.get(key)
        return expanded(found) if isinstance(found, str) and found else None

    def check(self) -> Checked:
        """Everything that is wrong with the draft, or what a run of it would do. Reads only what the page may read."""
        values = dict(self.values)
        problems = self._folders.problems_of(values)
        outside = {key for problem in problems for key in problem.keys}
        kept = {key: value for key, value in values.items() if key not in outside}
        found: list[Problem] = []
        plan = plan_of(kept, found, online=False)
        problems += [problem for problem in found if outside.isdisjoint(problem.keys)]
        if problems or plan is None:
            shape = self._shape(kept)
            return Checked(tuple(problems), None, (), (), shape.grid if shape else None, _maximum(shape))
        notes = list(plan.warnings)
        try:
            going_on = find_continuation(RunLayout(Path(plan.config.loop.output_dir)), plan.config)
        except UserError as error:
            return Checked(tuple(error.problems), None, (), (), plan.grid, _maximum(plan))
        notes += going_on.notes
        if going_on.checkpoint:
            notes.append(f"the run goes on from {going_on.checkpoint}")
        return Checked((), plan, tuple(summarize(plan)), tuple(notes), plan.grid, _maximum(plan))

    def _shape(self, values: Mapping[str, Any]) -> Plan | None:
        """A plan of what decides about the score alone, while other keys are missing or wrong."""
        known = {key: value for key, value in values.items() if key in _OF_THE_SCORE}
        rest = {"train_data": str(self._folders.runs), "output_dir": str(self._folders.own / "shape"), "max_train_steps": 1}
        return plan_of(known | rest, [], online=False)

    def weights(self) -> tuple[list[int], list[float]] | None:
        """The weight of CREPA over the steps of the run, as (steps, weights); None where CREPA is off or a value is wrong."""
        config, wrong = parse(self.values, [])
        if any(key.startswith("crepa_") for key in wrong):
            return None
        total = config.loop.max_train_steps or ASSUMED_STEPS
        schedule = build_schedule(config.crepa, total)
        if schedule is None:
            return None
        steps = sorted({round(number * (total - 1) / _POINTS) for number in range(_POINTS + 1)})
        return steps, [schedule.weight(step) for step in steps]


def as_file(values: Mapping[str, Any]) -> str:
    """The text of a config file; a path's bytes that are no text stay readable to `json`."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    return (text if is_unicode(text) else json.dumps(values, indent=2)) + "\n"


def _maximum(plan: Plan | None) -> float | None:
    """The largest value that the score can reach, where its grid is known."""
    return maximum_score(plan.config.crepa, plan.grid.t) if plan else None
