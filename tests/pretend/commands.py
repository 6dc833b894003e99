"""Commands of crepatrain on the pretend device, one after the other: `python commands.py LIBRARY ASKED RESULTS`."""

import contextlib
import functools
import gc
import io
import json
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device import Device, install

if TYPE_CHECKING:
    from torch import Tensor

    from crepatrain.running.session import Run


class Watcher:
    """Subscribes to a run: what the host waited for in each step, and how much memory was in use between the steps.

    Args:
        tighten: from this moment on no memory is left but `room` bytes: {"step": 2, "launched": false, "room": 4096}.
    """

    def __init__(self, device: Device, tighten: dict[str, Any] | None) -> None:
        self._device, self._tighten = device, tighten
        self.steps: list[dict[str, Any]] = []

    def __call__(self, event: object) -> None:
        from crepatrain.records.events import Logged, StepDone
        from crepatrain.running.events import StepBegins, StepLaunched

        match event:
            case StepBegins(run):
                gc.collect()
                step = {"step": run.state.step, "live": self._device.live, "held": held(run), "logged": False}
                step["teacher"] = None if run.teacher is None else type(run.teacher).__name__
                self.steps.append(step)
                self._limit(run.state.step, launched=False)
                self._device.seen.clear()
                self._device.watching = True
            case StepLaunched(run):
                self._take("launch")
                self._limit(run.state.step - 1, launched=True)
            case Logged() if self._device.watching:  # of the step before
                self.steps[-1]["logged"] = True
            case StepDone():
                self._take("settle")
                self._device.watching = False

    def _take(self, part: str) -> None:
        seen: dict[str, dict[str, int]] = {"wait": {}, "event": {}, "copy": {}}
        for (kind, what, where), count in self._device.seen.items():
            seen[kind][f"{what} ({where})"] = count
        self.steps[-1][part] = seen
        self._device.seen.clear()

    def _limit(self, step: int, *, launched: bool) -> None:
        if self._tighten and (self._tighten["step"], self._tighten["launched"]) == (step, launched):
            self._device.limit(self._device.live + self._tighten["room"])


def held(run: "Run") -> int:
    """Bytes of what a run has to hold between two steps: its modules, their gradients' owners' states and averages."""
    tensors: list[Tensor] = [run.diverged]
    for model in run.models.values():
        tensors += [*model.module.parameters(), *model.module.buffers()]
        tensors += [
            value for part in model.module.modules() for value in vars(part).values() if hasattr(value, "untyped_storage")
        ]
        for state in model.optimizer.optimizer.state.values():
            tensors += [value for value in state.values() if hasattr(value, "untyped_storage")]
        if model.average:
            tensors += model.average._values
    # A teacher has an encoder or a VAE in one of its attributes, or nothing.
    for thing in vars(run.teacher).values() if run.teacher is not None else ():
        module = getattr(thing, "model", thing)
        if hasattr(module, "parameters"):
            tensors += [*module.parameters(), *module.buffers()]
    return storages(tensors)


def storages(tensors: Iterable["Tensor"]) -> int:
    """Bytes of the device's storages behind these, as they are rounded there."""
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors if tensor.is_cuda}
    return sum(-(-size // 512) * 512 for size in sizes.values())


def call(device: Device, asked: dict[str, Any]) -> dict[str, Any]:
    """One command line, as a user gives it, with a watcher where it trains.

    Args:
        asked: `arguments`; `limit` in bytes where there is one; `tighten`, as a `Watcher` takes it.
    """
    import crepatrain.commands.fit
    from crepatrain import cli

    watcher, fit = Watcher(device, asked.get("tighten")), crepatrain.commands.fit.fit
    crepatrain.commands.fit.fit = functools.partial(fit, subscribers=[watcher])
    said, code, fault = io.StringIO(), 0, ""
    before = device.live
    device.forget_peak()
    device.limit(asked.get("limit", 0))
    sys.argv = ["crepatrain", *asked["arguments"]]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli.main()
    except SystemExit as ended:
        code = ended.code
    except Exception:  # noqa: BLE001 - a test shows it
        code, fault = 1, traceback.format_exc()
    finally:
        crepatrain.commands.fit.fit = fit
        device.watching = False
        device.limit(0)
    gc.collect()
    return {
        "code": code or 0,
        "said": " ".join(said.getvalue().split()),
        "fault": fault,
        "steps": watcher.steps,
        "before": before,
        "after": device.live,
        "peak": device.peak,
    }


def main(library: Path, asked: Path, results: Path) -> None:
    """Do what is asked, a list of commands as JSON, and write down how each went."""
    device = install(library)
    import torch

    torch.set_num_threads(1)
    done: list[dict[str, Any]] = []
    for each in json.loads(asked.read_text(encoding="utf-8")):
        if "share_of_held" in each:  # a limit, as a share of what the first run holds before its first step
            each["limit"] = int(each["share_of_held"] * next(run for run in done if run["steps"])["steps"][0]["held"])
        done.append(call(device, each))
    results.write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":  # workers of a loader import this file too
    main(*map(Path, sys.argv[1:]))
