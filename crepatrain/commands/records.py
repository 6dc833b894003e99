"""What a run's folder tells, read without torch: its config, where it stands, what it has logged and made."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crepatrain.errors import UserError

_STEP_AT_THE_END = re.compile(r".*-(\d{6,})")
_STEP_OF_VIDEO = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it.

    Attributes:
        config: with every default filled in; empty where it is gone.
        status: of status.json; empty before the first one.
        dataset: what was trained on; empty for a run from before it was written down.
        lines: of metrics.jsonl.
    """

    root: Path
    config: dict[str, Any]
    status: dict[str, Any]
    dataset: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.root.resolve().name

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

    def column(self, key: str) -> tuple[list[int], list[float]]:
        """The steps at which a number was logged, and the number."""
        found = [(line["step"], line[key]) for line in self.lines if _is_number(line.get(key))]
        return [step for step, _ in found], [value for _, value in found]

    def newest(self, folder: str, pattern: str) -> Path | None:
        """Of the files `NAME-000500...` or folders `step-000500` in a folder of the run, the one of the last step."""
        named = [(path, path.name.removesuffix(".safetensors")) for path in (self.root / folder).glob(pattern)]
        steps = {path: int(match.group(1)) for path, name in named if (match := _STEP_AT_THE_END.fullmatch(name))}
        return max(steps, key=lambda path: (steps[path], path.name), default=None)

    @property
    def videos(self) -> list[tuple[int, Path]]:
        """The validation videos with their steps, those of the last step first."""
        found = [(_STEP_OF_VIDEO.match(path.name), path) for path in (self.root / "samples").glob("step-*.mp4")]
        return sorted(((int(match.group(1)), path) for match, path in found if match), key=lambda item: (-item[0], item[1].name))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_run(root: Path) -> RunRecord:
    """Read a run's folder. A line that is being written while it is read is left out.

    Raises:
        UserError: it holds no run, or a damaged one.
    """
    if not (root / "config.json").is_file() and not (root / "metrics.jsonl").is_file():
        what = "it holds no run" if root.is_dir() else "no such folder"
        raise UserError(f"{root}: {what}", "give the output_dir of a run")
    config, status, dataset = (_read_object(root / f"{name}.json") for name in ("config", "status", "dataset"))
    return RunRecord(root, config, status, dataset, read_lines(root / "metrics.jsonl", needs=("step",)))


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error})", "mend or remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: it is no JSON object", "mend or remove it")
    return found


def read_lines(path: Path, *, needs: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, without a last line that is not whole yet; none where there is no file.

    Args:
        needs: keys that every line has; `step` is a whole number.

    Raises:
        UserError: a line is damaged.
    """
    if not path.is_file():
        return []
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error})", "mend its permissions") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and all(key in line for key in needs) and isinstance(line.get("step"), int):
            lines.append(line)
        elif number < len(texts) or text.endswith("\n"):
            raise UserError(f"{path}, line {number}: it is damaged ({text.strip()[:60]!r})", "remove that line")
    return lines


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return sum(values) / len(values) if values else None


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
