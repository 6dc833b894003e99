"""Which folders the page may list, read and write to, whatever a config, an address or a link in a folder says."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crepatrain.config.datasets import read_datasets
from crepatrain.errors import Problem, UserError
from crepatrain.records.layout import RunLayout
from crepatrain.records.reading import no_run

# Keys that name a file or folder, whether or not it is there.
_PATHS = ("train_data", "output_dir", "cache_dir", "init_adapter", "eval_data", "validation_images")
# Keys that name a file or folder, or something else: a hub id, a known encoder, a checkpoint of the run.
_PERHAPS_PATHS = ("pretrained_model_name_or_path", "crepa_encoder", "resume_from_checkpoint")
PATH_KEYS = _PATHS + _PERHAPS_PATHS
# Under the folder of runs: what the page itself writes.
OWN_FOLDER = ".ui"
# How far below the folder of runs a run may lie.
_DEPTH = 2
_MOST_FOLDERS = 5000


def _caches() -> tuple[Path, ...]:
    """The hub's cache and crepatrain's own, as their programs find them."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crepatrain"
    return hub, own


@dataclass(frozen=True)
class Folders:
    """The folders of a page. A path is inside of one where it is after every link and `..` of it is followed.

    Attributes:
        runs: where runs are looked for, and made.
        data: clips, local models and configs.
        caches: of the hub and of crepatrain.
    """

    runs: Path
    data: tuple[Path, ...]
    caches: tuple[Path, ...] = field(default_factory=_caches)

    @property
    def own(self) -> Path:
        """What the page writes: drafts, and the config and log of every run that it starts."""
        return self.runs / OWN_FOLDER

    def holds(self, path: Path) -> bool:
        """Whether the page may read a path."""
        return any(_is_inside(path, root) for root in (self.runs, *self.data, *self.caches))

    def problems_of(self, values: Mapping[str, Any]) -> list[Problem]:
        """The keys of a config that name something outside."""
        listed = ", ".join(map(str, (self.runs, *self.data)))
        problems = []
        for key in PATH_KEYS:
            value = values.get(key)
            for text in value if isinstance(value, list) else [value]:
                if not isinstance(text, str) or not text or not _is_path(key, text):
                    continue
                allowed = self.name_of(expanded(text)) is not None if key == "output_dir" else self.holds(expanded(text))
                if not allowed:
                    where = f"give a folder in {self.runs}" if key == "output_dir" else f"give one in {listed}"
                    fix = f"{where}, or start the page with another --{'runs' if key == 'output_dir' else 'data'}"
                    problems.append(Problem(f"{key}={text}: outside of the folders of this page", fix, (key,)))
        return problems + self._datasets_outside(values.get("train_data"), f"give folders in {listed}")

    def _datasets_outside(self, train_data: Any, fix: str) -> list[Problem]:
        """The datasets that a config, or a file that it names, lists and that lie outside."""
        if isinstance(train_data, str) and not (train_data and self.holds(expanded(train_data))):
            return []  # it is outside itself, and not opened
        try:
            datasets = read_datasets(str(expanded(train_data)) if isinstance(train_data, str) else train_data)
        except (UserError, TypeError):  # which the check of the config reports
            return []
        outside = [dataset for dataset in datasets if dataset.where and not self.holds(dataset.path)]
        return [Problem(f"{each.where}: outside of the folders of this page", fix, ("train_data",)) for each in outside]

    def name_of(self, output_dir: Path) -> str | None:
        """A run's path below the folder of runs; None where it is not there, or would not be found there."""
        if not _is_inside(output_dir, self.runs):
            return None
        parts = output_dir.resolve().relative_to(self.runs.resolve()).parts
        return Path(*parts).as_posix() if 0 < len(parts) <= _DEPTH and not any(part.startswith(".") for part in parts) else None

    def run(self, name: str) -> Path:
        """The folder of a run, by its path below the folder of runs.

        Raises:
            UserError: no run is there, or a file of it is a link to something outside.
        """
        root = self.runs / name
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or any(part.startswith(".") for part in parts) or "\0" in name:
            raise no_run(Path(name))
        if not _is_inside(root, self.runs) or not _holds_run(root):
            raise no_run(Path(name))
        layout = RunLayout(root)
        read = (
            layout.config_file,
            layout.status_file,
            layout.dataset_file,
            layout.best_file,
            layout.metrics,
            layout.changes,
            layout.figures,
            layout.alignment_map_file,
            layout.lock_file,
        )
        for path in (*read, *layout.all_videos(), *layout.asked_videos()):
            if path.is_symlink() and not _is_inside(path, self.runs):
                raise UserError(f"{path}: a link to something outside of {self.runs}", "replace it by the file")
        if not _is_inside(layout.samples, self.runs):
            raise UserError(f"{layout.samples}: a link to something outside of {self.runs}", "replace it by the folder")
        return root

    def run_names(self) -> list[str]:
        """The paths of all runs below the folder of runs."""
        return sorted(path.relative_to(self.runs).as_posix() for path in _folders(self.runs, _DEPTH) if _holds_run(path))

    def configs(self) -> list[Path]:
        """The configs that can be opened: of runs, and loose files beside them and in the folders of data."""
        loose = [path for root in (self.runs, *self.data) if root.is_dir() for path in sorted(root.glob("*.json"))[:100]]
        loose += [path for root in self.data if root.is_dir() for path in sorted(root.glob("*.y*ml"))[:100]]
        of_runs = [RunLayout(self.runs / name).config_file for name in self.run_names()]
        return [path for path in dict.fromkeys(loose + of_runs) if path.is_file() and self.holds(path)]

    def data_folders(self) -> list[Path]:
        """Folders that may hold clips or models, for a field's suggestions."""
        return [path for root in self.data for path in (root, *_folders(root, _DEPTH))][:300]


def _folders(root: Path, depth: int) -> Iterator[Path]:
    """The folders below one, without hidden ones and without what links lead to outside of it."""
    seen = 0
    level: Sequence[Path] = [root]
    for _ in range(depth):
        following: list[Path] = []
        for folder in level:
            for name in _names_of_folders(folder):
                if not _is_inside(folder / name, root):
                    continue
                seen += 1
                if seen > _MOST_FOLDERS:
                    return
                yield folder / name
                if not _holds_run(folder / name):
                    following.append(folder / name)
        level = following


def _names_of_folders(folder: Path) -> list[str]:
    """What a folder holds of folders, without hidden ones; nothing of a folder that can't be listed."""
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):  # a circle of links
                if entry.is_dir() and not entry.name.startswith("."):
                    found.append(entry.name)
    return sorted(found)


def _holds_run(root: Path) -> bool:
    layout = RunLayout(root)
    return layout.config_file.is_file() or layout.metrics.is_file()


def _is_path(key: str, text: str) -> bool:
    if key in _PATHS:
        return True
    return text.startswith(("/", "~", ".")) or ".." in Path(text).parts or "\\" in text or os.path.lexists(text)


def expanded(text: str) -> Path:
    """A path with ~ expanded, as a config's are."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - a user that does not exist is no error here


def _is_inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # a circle of links, or a name that no system has
        return False
