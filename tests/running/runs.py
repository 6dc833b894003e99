"""Runs of the tiny Wan, and what they leave."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crepatrain import cli
from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.records.events import StepDone, Subscriber
from crepatrain.running.events import BatchReady
from crepatrain.stopping import Stopped
from crepatrain.tensors import Batch

Write = Callable[..., Path]


KEYS = {
    "step",
    "loss",
    "diffusion_loss",
    "crepa_loss",
    "crepa_alignment_score",
    "crepa_similarity_self",
    "crepa_weight",
    "crepa_cutoff",
    "crepa_alignment_score_ema",
    "learning_rate",
    "grad_norm",
    "sigma_loss",
    "step_seconds",
    "data_seconds",
    "forward_seconds",
    "crepa_seconds",
    "backward_seconds",
    "optimizer_seconds",
    "samples_per_second",
    "peak_memory_gib",
}
TIMES = {key for key in KEYS if key.endswith("_seconds")} | {"samples_per_second", "peak_memory_gib"}
MEASURED = ("crepa_loss", "crepa_alignment_score", "crepa_similarity_self")
ADAPTER = "pytorch_lora_weights.safetensors"
# What could break a resume: dropout of captions and adapter, a warm-up, an EMA, several buckets of randomness.
RESTLESS = {
    "lora_dropout": 0.2,
    "caption_dropout": 0.5,
    "crepa_warmup_steps": 2,
    "lr_warmup_steps": 4,
    "crepa_similarity_threshold": 1.2,
    "crepa_similarity_ema_decay": 0.9,
}


def train(
    write: Write, *, after_step: Callable[[int], None] | None = None, subscribers: Sequence[Subscriber] = (), **changes: Any
) -> Path:
    """Train the config with changes; gives the run's folder.

    Args:
        after_step: called with the number of steps that are done.
    """

    def watch(event: object) -> None:
        if after_step and isinstance(event, StepDone):
            after_step(event.done)

    plan = read_plan(write(**changes))
    fit(plan, Screen(quiet=True), subscribers=[watch, *subscribers])
    return Path(plan.config.loop.output_dir)


def interrupted(write: Write, *, at: int, **changes: Any) -> Path:
    """A run that gets a SIGINT during the step after `at`."""

    def interrupt(step: int) -> None:
        if step == at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped):
        train(write, after_step=interrupt, **changes)
    return Path(read_plan(write(**changes)).config.loop.output_dir)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines(folder)]


class Batches(list[Batch]):
    """Collects every micro-batch that is trained on."""

    def __call__(self, event: object) -> None:
        if isinstance(event, BatchReady):
            self.append(event.batch)


def of(folder: Path) -> dict[str, str]:
    """The keys that name a checkpoint made by `tiny_checkpoint`."""
    return {"model_family": folder.name.partition("-")[0], "pretrained_model_name_or_path": str(folder)}


def column(folder: Path, key: str) -> list[Any]:
    return [line[key] for line in lines(folder)]


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text(encoding="utf-8"))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / ADAPTER)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def expect_same_run(left: Path, right: Path) -> None:
    """Every number and every tensor, to the bit."""
    assert timeless(left) == timeless(right)
    assert same_tensors(adapter(left), adapter(right))
    last = [max(names(folder / "checkpoints")) for folder in (left, right)]
    assert last[0] == last[1]
    for file in ("adapter", "projector", "transformer_learner", "projector_learner"):
        tensors = [load_file(folder / "checkpoints" / last[0] / f"{file}.safetensors") for folder in (left, right)]
        assert same_tensors(*tensors), file
    states = [(folder / "checkpoints" / last[0] / "state.json").read_text(encoding="utf-8") for folder in (left, right)]
    assert states[0] == states[1]


def alive(*kinds: type, but: Sequence[Any] = ()) -> list[Any]:
    """The instances of these classes that are in memory."""
    gc.collect()
    others = set(map(id, but))
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kinds) and id(thing) not in others]


def forget(folder: Path, *, after: int) -> None:
    """As if the machine had died: checkpoints behind a step never came to be, metrics went on."""
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > after:
            shutil.rmtree(checkpoint)
    (folder / "metrics.jsonl").open("a", encoding="utf-8").write('{"step": 99, "lo')


def start(config: Path, log: Path, *, start_new_session: bool = False) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "crepatrain", "fit", str(config)]
    with log.open("wb") as file:  # no pipe: the workers of a killed run hold it open for a while
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=start_new_session
        )


def wait_until(process: subprocess.Popen[bytes], happened: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 90
    while not happened():
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
        assert process.poll() is None, log.read_text(encoding="utf-8")
        time.sleep(0.01)


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["crepatrain", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


CUT = {"crepa_similarity_threshold": -0.9, "crepa_similarity_ema_decay": 0.0}


def losses_of(folder: Path) -> list[float]:
    return [line[key] for line in lines(folder) for key in ("loss", "diffusion_loss", "crepa_loss", "crepa_alignment_score")]


FULL = {"model_type": "full", "lora_rank": ..., "adam_weight_decay": 0.0}


def last_checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / max(names(folder / "checkpoints"))
