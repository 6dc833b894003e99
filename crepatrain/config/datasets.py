"""The datasets that train_data names: one folder or list, or several with settings of their own."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from crepatrain.config.fields import ClipMode, PathText, Section
from crepatrain.errors import Problem, UserError, closest

LISTS = frozenset({".jsonl", ".csv", ".json"})
"""Suffixes of lists of clips."""
DATASETS_FILES = frozenset({".yaml", ".yml", ".toml", ".json"})
"""Suffixes of files that name datasets."""

# Others' names of the list in such a file.
_LIST_KEYS = ("datasets", "dataset", "directory")


class DatasetConfig(Section, frozen=True):
    """One dataset among several. What is null is as in the run."""

    path: PathText = Field(description="Folder of clips, or a .jsonl, .csv or .json list.")
    repeats: float = Field(
        1.0, gt=0, le=1000, description="How often each window is trained on in an epoch, on average: with 2.5 five times in two."
    )
    caption_prefix: str | None = Field(None, max_length=2000, description="Text before every caption.")
    caption_suffix: str | None = Field(None, max_length=2000, description="Text after every caption.")
    height: int | None = Field(None, ge=16, le=4096, description="Height of the windows in pixels.")
    width: int | None = Field(None, ge=16, le=4096, description="Width of the windows in pixels.")
    num_frames: int | None = Field(None, ge=1, le=2048, description="Frames of a window.")
    fps: Annotated[float, Field(gt=0, le=240)] | None = Field(None, description="Rate that clips are resampled to.")
    clip_mode: ClipMode | None = Field(None, description="Which windows a clip is cut into.")
    start: float = Field(0.0, ge=0, description="Seconds that are left out at the beginning of every clip.")
    end: float | None = Field(None, gt=0, description="Second at which every clip ends. null: its own end.")


@dataclass(frozen=True)
class NamedDataset:
    """A dataset of a run.

    Attributes:
        where: what messages call it; empty where it is the only one.
    """

    config: DatasetConfig
    where: str = ""

    @property
    def path(self) -> Path:
        return Path(self.config.path)

    def about(self, problem: Problem) -> Problem:
        """A problem that says which dataset it is about, where there are several."""
        return replace(problem, what=f"{self.where}: {problem.what}") if self.where else problem


def dataset_at(path: str) -> NamedDataset:
    """A folder or list with the run's own settings."""
    return NamedDataset(DatasetConfig.model_validate({"path": path}))


def read_datasets(train_data: str | Sequence[Mapping[str, Any]], key: str = "train_data") -> tuple[NamedDataset, ...]:
    """The datasets of a run, their paths seen from where they are written.

    Raises:
        UserError: a file of them can't be read, or with every entry that is wrong.
    """
    if not isinstance(train_data, str):
        return _entries(train_data, key, Path())
    path = Path(train_data)
    if path.suffix.lower() not in DATASETS_FILES or not path.is_file():
        return (dataset_at(train_data),)
    values = _read(path, key)
    if path.suffix.lower() == ".json" and not _names_datasets(values, path.parent):
        return (dataset_at(train_data),)
    if isinstance(values, dict):
        name = next((name for name in _LIST_KEYS if isinstance(values.get(name), list)), None)
        others = [other for other in values if other != name]
        if name is None or others:
            what = f"no list named {_LIST_KEYS[0]}" if name is None else f"unknown: {', '.join(map(str, others))}"
            raise UserError(f"{key}={path}: {what}", f"write {_LIST_KEYS[0]}: a list of entries with a path each", (key,))
        values = values[name]
    if not isinstance(values, list) or not values:
        raise UserError(f"{key}={path}: it lists no datasets", "write a list of entries with a path each", (key,))
    return _entries(values, f"{key}={path}", path.parent)


def _names_datasets(values: Any, folder: Path) -> bool:
    """Whether a JSON file names datasets rather than clips: an object, or entries whose path is a folder or a list."""
    if isinstance(values, dict):
        return True
    first = values[0] if isinstance(values, list) and values else None
    path = first.get("path") if isinstance(first, dict) else None
    return isinstance(path, str) and ((folder / path).is_dir() or Path(path).suffix.lower() in LISTS)


def _read(path: Path, key: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        match path.suffix.lower():
            case ".json":
                return json.loads(text)
            case ".toml":
                return tomllib.loads(text)
            case _:
                return yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{key}={path}: it can't be read ({reason})", "correct the file", (key,)) from None


def _entries(values: Sequence[Any], where: str, folder: Path) -> tuple[NamedDataset, ...]:
    found: list[NamedDataset] = []
    problems: list[Problem] = []
    for number, entry in enumerate(values, start=1):
        name = f"{where}, dataset {number}"
        try:
            config = DatasetConfig.model_validate(entry)
        except ValidationError as error:
            problems += [_explained(name, entry, details) for details in error.errors()]
            continue
        if config.end is not None and config.end <= config.start:
            problems.append(Problem(f"{name}: end={config.end:g} is not after start={config.start:g}", "correct one of the two"))
        path = folder / config.path
        found.append(NamedDataset(config.model_copy(update={"path": str(path)}), f"dataset {number} ({path})"))
    if problems:
        raise UserError.of([Problem(problem.what, problem.fix, ("train_data",)) for problem in problems])
    return tuple(found)


def _explained(where: str, entry: Any, details: Any) -> Problem:
    keys = ", ".join(DatasetConfig.model_fields)
    if not isinstance(entry, dict):
        return Problem(f"{where}: it is no entry", f"write an object with the keys {keys}")
    key = str(details["loc"][0])
    if details["type"] == "extra_forbidden":
        close = closest(key.lower(), DatasetConfig.model_fields, cutoff=0.6)
        return Problem(f"{where}: unknown key {key}", f"did you mean {close}?" if close else f"use {keys}")
    if details["type"] == "missing":
        return Problem(f"{where}: {key} is missing", DatasetConfig.model_fields[key].description or "add it")
    value = json.dumps(entry[key], default=str)
    shown = value if len(value) <= 80 else f"{value[:80]}..."
    return Problem(f"{where}: {key}={shown} is not possible", f"{details['msg'][0].lower()}{details['msg'][1:]}")
