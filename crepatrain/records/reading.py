"""What a run's folder holds, read without torch: its config, where it stands, what it has logged and made."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crepatrain.config.migrations import migrate
from crepatrain.errors import UserError
from crepatrain.records.layout import RunLayout, step_of
from crepatrain.screen import Screen

# Of a number in a run's files: what is drawn of them, sums and products, stays finite.
_LARGEST = 1e100

_Value = TypeVar("_Value")

_Count = Annotated[int, Field(ge=0, le=10**15)]
_Positive = Annotated[int, Field(ge=1, le=10**15)]
_Number = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)]


class _Expected(BaseModel):
    """What is read of a JSON file of a run; its other keys may hold anything."""

    model_config = ConfigDict(strict=True)


class _Config(_Expected):
    max_train_steps: _Count | None = None
    logging_steps: _Positive = 1
    crepa_similarity_threshold: _Number | None = None


class _Status(_Expected):
    status: str = ""
    step: _Count = 0
    reason: str = ""
    pid: _Count = 0
    host: str = ""
    heartbeat: str = ""


class _Bucket(_Expected):
    bucket: str
    windows: _Count
    grid: str
    tokens: _Count
    teacher_grid: str | None


class _Clip(_Expected):
    file: str
    windows: _Count
    caption: str


class _Window(_Expected):
    file: str
    start: _Number
    frames: _Count
    source: Annotated[list[_Count], Field(min_length=2, max_length=2)]
    source_fps: _Number
    crop: str
    kept: _Number
    bucket: str
    weight: _Number
    warnings: list[str]


class _Dataset(_Expected):
    train_data: str
    clips: _Count
    windows: _Count
    left_out: _Count
    unit: _Count
    steps_per_epoch: _Positive
    steps: _Count
    buckets: list[_Bucket]
    captions: list[_Clip]
    each: list[_Window] = []


class _Change(_Expected):
    step: _Count
    keys: dict[str, tuple[Any, Any]]
    clips: list[str]


class _Best(_Expected):
    step: _Count
    eval_loss: _Number


@dataclass(frozen=True)
class RunRecord:
    """A run, as its folder has it.

    Attributes:
        name: for people; no two of several runs have the same.
        config: with every default filled in; empty where it is gone.
        status: of status.json; empty before the first one.
        dataset: what was trained on; empty for a run from before it was written down.
        best: step and eval_loss of the best checkpoint; empty where no clips were held out.
        lines: of metrics.jsonl.
        changes: what was changed on the way, for people.
    """

    root: Path
    name: str
    config: dict[str, Any]
    status: dict[str, Any]
    dataset: dict[str, Any]
    best: dict[str, Any]
    lines: list[dict[str, Any]]
    changes: list[str]

    @property
    def layout(self) -> RunLayout:
        """Where everything of the run lies."""
        return RunLayout(self.root)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of training steps; others hold held-out numbers alone."""
        return [line for line in self.lines if "loss" in line]

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as is known."""
        return max(self.lines[-1]["step"] if self.lines else 0, self.status.get("step", 0))

    @property
    def total(self) -> int | None:
        """Optimizer steps of the whole run."""
        return self.config.get("max_train_steps") or self.dataset.get("steps")

    @property
    def logging_steps(self) -> int:
        """Optimizer steps of one line."""
        return self.config.get("logging_steps", 1)

    def column(self, key: str) -> tuple[list[int], list[float]]:
        """The steps at which a number was logged, and the number."""
        found = [(line["step"], line[key]) for line in self.lines if _is_number(line.get(key))]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def videos(self) -> list[tuple[int, Path]]:
        """The validation videos with their steps, those of the last step first."""
        return sorted(((step_of(path), path) for path in self.layout.all_videos()), key=lambda item: (-item[0], item[1].name))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def read_run(root: Path) -> RunRecord:
    """Read a run's folder. A line that is being written while it is read is left out.

    Raises:
        UserError: it holds no run, or a damaged one.
    """
    layout = RunLayout(root)
    if not layout.config_file.is_file() and not layout.metrics.is_file():
        raise no_run(root)
    return RunRecord(
        root,
        root.resolve().name,
        config=migrate(read_config_values(layout), layout.config_file),
        status=read_status(root),
        dataset=read_dataset(root),
        best=read_best(root),
        lines=read_lines(layout.metrics),
        changes=_read_changes(layout.changes),
    )


def no_run(root: Path) -> UserError:
    """There is no run in a folder, as what the user can do about it."""
    what = "it holds no run" if root.is_dir() else "no such folder"
    return UserError(f"{root}: {what}", "give the output_dir of a run")


def read_config_values(layout: RunLayout) -> dict[str, Any]:
    """The keys of a run's config.json as its version wrote them; empty without the file.

    Raises:
        UserError: the file is damaged.
    """
    return _read_object(layout.config_file, _Config, "fix it, or give another folder")


def note_unknown_keys(layout: RunLayout, unknown: Iterable[str], screen: Screen) -> None:
    """Tell the user which keys of a run's config.json this version does not know, if there are any."""
    if keys := ", ".join(unknown):
        screen.note(f"{layout.config_file}: {keys}: unknown to this version of crepatrain, and ignored")


def read_status(root: Path) -> dict[str, Any]:
    """Where a run stands; empty before its first step.

    Raises:
        UserError: the file is damaged.
    """
    return _read_object(RunLayout(root).status_file, _Status)


def read_dataset(root: Path) -> dict[str, Any]:
    """What a run trains on; empty for a run from before it was written down.

    Raises:
        UserError: the file is damaged.
    """
    return _read_object(RunLayout(root).dataset_file, _Dataset)


def _read_changes(path: Path) -> list[str]:
    """What was changed of a run on the way; a line that can't be read is left out."""
    found = []
    for text in raw_lines(path):
        try:
            line = _Change.model_validate_json(text)
        except ValidationError:
            continue
        keys = [f"{key} {json.dumps(before)} -> {json.dumps(now)}" for key, (before, now) in line.keys.items()]
        found.append(f"from step {line.step} on: {', '.join([*keys, *line.clips])}")
    return found


def step_of_change(text: bytes) -> int | None:
    """The step of a line of changes.jsonl; None of a damaged one."""
    try:
        return _Change.model_validate_json(text).step
    except ValidationError:
        return None


def read_best(root: Path) -> dict[str, Any]:
    """Step and eval_loss of the best checkpoint; empty where no clips were held out.

    Raises:
        UserError: the file is damaged.
    """
    return _read_object(RunLayout(root).best_file, _Best)


def _read_object(path: Path, kind: type[_Expected], fix: str = "fix or remove it") -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        kind.model_validate(found)
    except ValidationError as error:
        details = error.errors()[0]
        place = ".".join(map(str, details["loc"]))
        raise UserError(f"{path}: {f'{place}: ' if place else ''}{details['msg']}", fix) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error})", fix) from error
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file without their nulls, and without a last line that is not whole yet; none without a file.

    Raises:
        UserError: a line is damaged.
    """
    texts = raw_lines(path)
    lines = []
    for number, text in enumerate(texts, start=1):
        line = _read_line(text)
        if line is not None:
            lines.append(line)
        elif number < len(texts) or text.endswith(b"\n"):
            shown = text.decode(errors="replace").strip()[:60]
            raise UserError(f"{path}, line {number}: it is damaged ({shown!r})", "remove that line")
    return lines


def raw_lines(path: Path) -> list[bytes]:
    """The lines of a file with their line ends; none without a file.

    Raises:
        UserError: it can't be read.
    """
    if not path.is_file():
        return []
    try:
        return path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error})", "fix its permissions") from error


def step_of_line(text: bytes) -> int | None:
    """The step of a line of a JSON Lines file; None where `read_lines` refuses the line, or leaves it out as cut off."""
    line = _read_line(text)
    return None if line is None else line["step"]


def _read_line(text: bytes) -> dict[str, Any] | None:
    """The object of a line without its nulls; None where it is damaged."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    step = found.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return None
    line = {key: value for key, value in found.items() if value is not None}
    return line if all(_fits(key, value) for key, value in line.items()) else None


def _fits(key: str, value: object) -> bool:
    """Whether a logged value is of its key's kind."""
    if key.endswith("sigma_loss"):
        return isinstance(value, dict) and all(map(_is_number, value.values()))
    return isinstance(value, str) if key == "prompt" else isinstance(value, bool) or _is_number(value)


def with_distinct_names(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The same runs, each with as many of its parent folders in its name as no other one shares.

    Raises:
        UserError: two of them are one.
    """
    paths = [run.root.resolve().parts for run in runs]
    named = []
    for index, (run, own) in enumerate(zip(runs, paths, strict=True)):
        if own in paths[:index]:
            raise UserError(f"{run.root} was given twice", "give each run once")
        others = [path for path in paths if path != own]
        names = (own[-length:] for length in range(1, len(own) + 1))
        distinct = next(name for name in names if all(other[-len(name) :] != name for other in others))
        named.append(replace(run, name=str(Path(*distinct))))
    return named


def mean(values: Sequence[float]) -> float | None:
    """The mean; None where there are no values."""
    return sum(values) / len(values) if values else None


def first_and_last(values: Sequence[_Value]) -> tuple[Sequence[_Value], Sequence[_Value]]:
    """The first and the last tenth, of at least one value each: one step alone says more of its noise than of the training."""
    tenth = max(len(values) // 10, 1)
    return values[:tenth], values[-tenth:]


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
