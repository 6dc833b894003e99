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
from crepatrain.training.checkpoint import (
    FINGERPRINT_FILE,
    STATE_FILE,
    average_file,
    optimizer_file,
    weights_file,
    write_checkpoint,
)
from crepatrain.training.lora import is_adapted, trained_state


@dataclass(frozen=True, eq=False)
class Gathered:
    """All of a checkpoint, whole: as `write_checkpoint` takes it. What a device holds is copied as it is written."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    trees: Mapping[str, Any]
    plain: Mapping[str, Any]


def save(run: Run) -> None:
    """A checkpoint, its small adapter, and the run's last adapter. Every process comes here at the same step."""
    gathered = gather(run)
    if run.folder.writes:
        _write(run, gathered)
    run.saved = run.state.step
    run.accelerator.wait_for_everyone()
    run.events.emit(CheckpointSaved(run.saved, run.folder.checkpoint(run.saved)))


def gather(run: Run) -> Gathered:
    """Bring together what the processes hold. Every process comes here."""
    tensors = {}
    for name, model in run.models.items():
        tensors[weights_file(name, adapted=is_adapted(model.module))] = trained_state(model.module)
        if model.average:
            tensors[average_file(name)] = model.average.of(trained_state(model.module))
    return Gathered(
        tensors,
        trees={optimizer_file(name): model.optimizer.state_dict() for name, model in run.models.items()},
        plain={STATE_FILE: run.state.state_dict(), FINGERPRINT_FILE: run.fingerprint},
    )


def _write(run: Run, gathered: Gathered) -> None:
    step, folder = run.state.step, run.folder
    # The result first: a kill in between then leaves no checkpoint without it.
    transformer = run.transformer
    average, own = average_file("transformer"), weights_file("transformer", adapted=is_adapted(transformer.module))
    weights = gathered.tensors[average if transformer.average else own]
    write_result(folder, run.family, run.fingerprint, transformer.module, step, weights=weights)
    path = folder.checkpoint(step)
    write_checkpoint(path, gathered.tensors, gathered.trees, gathered.plain)
    rotate(folder.checkpoints, run.config.loop.checkpoints_total_limit, keep=read_best(folder.root).get("step"))
    folder.status("running", step)
