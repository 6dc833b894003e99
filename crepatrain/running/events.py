"""What happens within one optimizer step, for who watches a run in its own process: a test, a profiler.

What a run's records are made of is in `crepatrain.records.events`.
"""

from dataclasses import dataclass

from crepatrain.running.session import Run
from crepatrain.tensors import Batch


@dataclass(frozen=True, eq=False)
class StepBegins:
    """The optimizer step `run.state.step` is about to be launched."""

    run: Run


@dataclass(frozen=True, eq=False)
class BatchReady:
    """A micro-batch is on the device, and about to be trained on."""

    batch: Batch


@dataclass(frozen=True, eq=False)
class StepLaunched:
    """All work of an optimizer step is queued; the device may still be at it."""

    run: Run
