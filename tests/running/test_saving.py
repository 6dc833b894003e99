"""What a save takes of memory."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.memory.account import StorageAccount
from crepatrain.records.events import CheckpointSaved, StepDone


class _NewStorages(StorageAccount):
    """Leaves out what is held already."""

    def __init__(self) -> None:
        super().__init__()
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        self._before = {tensor.untyped_storage()._cdata for tensor in tensors}

    def _see(self, tensor: torch.Tensor) -> None:
        if tensor.untyped_storage()._cdata not in self._before:
            super()._see(tensor)


class _Watch:
    """Counts what is held from the end of a step on until its checkpoint is written."""

    def __init__(self) -> None:
        self.peaks: list[int] = []

    def __call__(self, event: object) -> None:
        match event:
            case StepDone():
                self._account = _NewStorages()
                self._account.__enter__()
            case CheckpointSaved():
                self._account.__exit__(None, None, None)
                self.peaks.append(self._account.on(torch.device("cpu")).peak)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_save_takes_the_room_of_one_tensor(config_file: Any, tmp_path: Path, optimizer: str):
    """On a CPU the copies for the disk count too, so that this holds for the device and for the host beside it."""
    changes = {"model_type": "full", "use_ema": True, "ema_decay": 0.5, "optimizer": optimizer, "max_train_steps": 2}
    run, watch = tmp_path / "run", _Watch()
    fit(
        read_plan(config_file(**changes, checkpointing_steps=1, output_dir=str(run), validation_prompts=None)),
        Screen(quiet=True),
        subscribers=[watch],
    )
    tensors = load_file(run / "checkpoints" / "step-000002" / "ema.safetensors")
    largest, total = max(t.nbytes for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    assert total > 20 * largest, "what is measured would show nothing"
    assert len(watch.peaks) == 2
    assert max(watch.peaks) <= 2 * largest
