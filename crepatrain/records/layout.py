"""The name of everything in a run's folder, and the step that a name holds: who writes or reads a file asks here. No torch."""

import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from crepatrain.files import UNFINISHED
from crepatrain.leftovers import is_abandoned, written_for
from crepatrain.outputs import RUN_CONFIG_FILE, RUN_METRICS_FILE, RUN_STATUS_FILE

ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # the name under which diffusers looks for an adapter
CARD_FILE = "README.md"
REPORT_FILE = "report.html"
# What ends the name of a video that shows the adapter beside the base.
BESIDE_BASE = "-beside-base.mp4"
# What ends the name of a transformer's folder while another one takes its place.
REPLACED = ".old"

_CHECKPOINT = re.compile(r"step-(\d+)")
_VIDEO = re.compile(r"step-(\d{6,})(?:-.*)?\.mp4")  # the first version wrote a file for each prompt: step-000500-0.mp4
_ADAPTER = re.compile(r".+-(\d{6,})\.safetensors")
_TRANSFORMER = re.compile(r"transformer(_\d+)?")
# How the names in samples/ begin that the run itself writes.
_RUNS_OWN = ("step-", "figures")


class RunLayout:
    """Where everything of one run lies.

    Args:
        root: the run's folder, its output_dir.

    Attributes:
        metrics: what was logged, a JSON object on each line.
        figures: what was measured of the validation videos, a JSON object on each line.
        changes: what of the run was changed on the way, a JSON object on each line.
        result_adapter: the run's last adapter.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config_file = root / RUN_CONFIG_FILE
        self.status_file = root / RUN_STATUS_FILE
        self.dataset_file = root / "dataset.json"
        self.best_file = root / "best.json"
        self.lock_file = root / ".lock"
        self.wandb_id_file = root / "wandb-id.txt"
        self.alignment_map_file = root / "alignment_map.json"
        self.report_file = root / REPORT_FILE
        self.card_file = root / CARD_FILE
        self.metrics = root / RUN_METRICS_FILE
        self.changes = root / "changes.jsonl"
        self.clip_lists = root / "clip-lists"
        self.checkpoints = root / "checkpoints"
        self.adapters = root / "adapters"
        self.samples = root / "samples"
        self.figures = self.samples / "figures.jsonl"
        self.exports = root / "exports"
        self.tensorboard = root / "tensorboard"
        self.result_adapter = root / ADAPTER_FILE

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.checkpoints / numbered("step", step)

    def result_transformer(self, part: str) -> Path:
        """The folder of the run's last transformer, where a whole one is trained; `part` is its name in a pipeline."""
        return self.root / part

    def adapter(self, name: str, step: int) -> Path:
        """The adapter that a checkpoint leaves for good, even when the checkpoint itself is removed."""
        return self.adapters / f"{numbered(name, step)}.safetensors"

    def video(self, step: int) -> Path:
        """The validation video of a step; that of step 0 is the base's."""
        return self.samples / f"{numbered('step', step)}.mp4"

    def diverged(self, step: int, process: int | None = None) -> Path:
        """The batch of a step that was not finite; of several processes each writes its own."""
        of_process = "" if process is None else f"-process-{process}"
        return self.root / f"{numbered('diverged-step', step)}{of_process}.safetensors"

    def all_adapters(self) -> list[Path]:
        """The adapters that the checkpoints have left, the oldest first."""
        return _by_step(path for path in self.adapters.glob("*.safetensors") if _ADAPTER.fullmatch(path.name))

    def all_videos(self) -> list[Path]:
        """The validation videos, the oldest first."""
        return _by_step(path for path in self.samples.glob("step-*.mp4") if _VIDEO.fullmatch(path.name))

    def asked_videos(self) -> list[Path]:
        """The videos that somebody has asked for, with `crepatrain sample`."""
        return sorted(path for path in self.samples.glob("*.mp4") if not _VIDEO.fullmatch(path.name))

    def clip_list(self, samples: str) -> Path:
        """The clips behind a digest of all samples, by which two of them are compared clip by clip."""
        return self.clip_lists / f"{samples[:16]}.json"

    def transformers(self, ending: str = "") -> list[Path]:
        """The run's last transformer, where a whole one is trained; with an ending those of a write that a kill has cut off."""
        return sorted(path for path in self.root.glob(f"transformer*{ending}") if _is_transformer(path, ending))

    def unfinished_checkpoints(self) -> list[Path]:
        """The checkpoints that a kill has left half written."""
        return sorted(self.checkpoints.glob(f"step-*{UNFINISHED}"))

    def leftovers(self) -> list[Path]:
        """What a killed run has left half written, for the one that holds the run's lock.

        Other commands write into the folder as well, and take no lock: of these what has surely been given up.
        """
        others = {self.report_file.name, self.card_file.name, self.alignment_map_file.name}
        found = [*self.unfinished_checkpoints(), *self.transformers(UNFINISHED)]
        for folder in (self.root, self.checkpoints, self.adapters, self.clip_lists, self.samples, self.exports):
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                name = written_for(path)
                if name is None:
                    continue
                shared = folder == self.exports or name in others or (folder == self.samples and not name.startswith(_RUNS_OWN))
                if not shared or is_abandoned(path):
                    found.append(path)
        return found

    def after(self, step: int) -> list[Path]:
        """Checkpoints, adapters and videos of later steps; from step 0 on every adapter and video, as they are made anew."""
        files = [path for path in (*self.all_adapters(), *self.all_videos()) if step == 0 or step_of(path) > step]
        return [*(path for path in checkpoints(self.checkpoints) if step_of(path) > step), *files]


def numbered(name: str, step: int) -> str:
    """A name with its step: `step-000500`."""
    return f"{name}-{step:06d}"


def set_aside_name(path: Path) -> Path:
    """Where something is moved to that is not of this run any more but may be missed; what was moved before stays."""
    names = (f"{path.name}.left{f'-{number}' if number > 1 else ''}" for number in itertools.count(1))
    return next(free for free in map(path.with_name, names) if not os.path.lexists(free))


def _is_transformer(path: Path, ending: str) -> bool:
    return path.is_dir() and path.name.endswith(ending) and bool(_TRANSFORMER.fullmatch(path.name.removesuffix(ending)))


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a run's folder `checkpoints`, the oldest first."""
    return _by_step(path for path in folder.glob("step-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir())


def step_of(path: Path) -> int:
    """The optimizer steps behind a checkpoint, an adapter or a validation video."""
    found = (pattern.fullmatch(path.name) for pattern in (_CHECKPOINT, _VIDEO, _ADAPTER))
    match = next(filter(None, found), None)
    assert match, path
    return int(match.group(1))


def _by_step(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: (step_of(path), path.name))
