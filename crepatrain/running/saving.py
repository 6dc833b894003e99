"""What is kept of a run: gathered by every process, written by the first one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from crepatrain.adapters.writing import write_result
from crepatrain.records.events import CheckpointSaved
from crepatrain.records.reading import read_best
from crepatrain.records.runfolder import rotate
from crepatrain.running.session import Run
from crepatrain.training.checkpoint import EMA_FILE, TRAINED_FILE, write_checkpoint
from crepatrain.training.lora import trained_state


@dataclass(frozen=True, eq=False)
class Gathered:
    """All of a checkpoint, whole: as `write_checkpoint` takes it."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    trees: Mapping[str, Any]
    plain: Mapping[str, Any]


def save(run: Run) -> None:
    """A checkpoint, its small adapter, and the run's last adapter. Every process comes here at the same step."""
    gathered = gather(run)
    if run.accelerator.is_main_process:
        _write(run, gathered)
    run.saved = run.state.step
    run.accelerator.wait_for_everyone()


def gather(run: Run) -> Gathered:
    """Bring together what the processes hold. Every process comes here."""
    transformer = run.transformer
    tensors = {TRAINED_FILE[run.config.model.model_type]: trained_state(transformer.module)}
    if transformer.average:
        with transformer.average.in_place():
            tensors[EMA_FILE] = {name: tensor.clone() for name, tensor in trained_state(transformer.module).items()}
    if run.projector:
        tensors["projector"] = run.projector.state_dict()
    return Gathered(
        tensors,
        trees={f"{name}_learner": model.optimizer.state_dict() for name, model in run.models.items()},
        plain={"state": run.state.state_dict(), "fingerprint": run.fingerprint},
    )


def _write(run: Run, gathered: Gathered) -> None:
    step, folder = run.state.step, run.folder
    # The result first: a kill in between then leaves no checkpoint without it.
    weights = gathered.tensors[EMA_FILE if run.transformer.average else TRAINED_FILE[run.config.model.model_type]]
    write_result(folder, run.family, run.fingerprint, run.transformer.module, step, weights=weights)
    path = folder.checkpoint(step)
    write_checkpoint(path, gathered.tensors, gathered.trees, gathered.plain)
    rotate(folder.checkpoints, run.config.loop.checkpoints_total_limit, keep=read_best(folder.root).get("step"))
    folder.status("running", step)
    run.events.emit(CheckpointSaved(step, path))
