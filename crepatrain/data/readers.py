"""The processes that read batches ahead: started, missed when one dies, ended however the run ends."""

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Collection, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

from crepatrain.data.loader import MicroBatches, TrainingSet
from crepatrain.errors import UserError
from crepatrain.stopping import leave_signals_to_the_parent
from crepatrain.tensors import Batch

# Seconds in which readers end of themselves.
_PATIENCE = 2.0


def read_batches(dataset: TrainingSet, draws: MicroBatches, *, workers: int, pin_memory: bool) -> Generator[Batch]:
    """The micro-batches, read ahead. Whoever stops reading closes the generator, which ends its readers.

    Raises:
        UserError: something that was there when the run began can't be read any more, or a reader died.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=draws,  # type: ignore[arg-type] - endless, so without a length
        num_workers=workers,
        collate_fn=_as_it_is,  # a micro-batch is collated where it is read
        pin_memory=pin_memory,
        prefetch_factor=2 if workers else None,
        generator=torch.Generator().manual_seed(dataset.seed),  # else every iterator draws from the global one
        worker_init_fn=_begin_worker,
    )
    others = set(multiprocessing.active_children())
    iterator: Any = None
    try:
        with _deaths_noticed_when_waiting():
            iterator = iter(loader)
        for batch in iterator:
            if not isinstance(batch, Batch):
                raise UserError.of(batch)
            yield batch
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise UserError(
            f"dataloader_num_workers={workers}: a reader process died ({str(error).splitlines()[0]})",
            "set it to 0, or give more shared memory (docker run --shm-size 8g) or memory",
        ) from error
    finally:
        _end(iterator, set(multiprocessing.active_children()) - others)


def batches_ahead(batches: Iterator[Batch], *, pin_memory: bool) -> Iterator[Batch]:
    """The batches, each read, and pinned, by a thread while the one before is worked on."""

    def read() -> Batch | None:
        batch = next(batches, None)
        return batch.pin_memory() if batch and pin_memory else batch

    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(read)
        while batch := following.result():
            following = reader.submit(read)
            yield batch


@contextlib.contextmanager
def _deaths_noticed_when_waiting() -> Iterator[None]:
    """Within it a loader may be opened without a dead reader raising an error in whatever line the run is at, such as in a save.

    The loader looks after its readers itself, every few seconds in which it waits for a batch.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _end(iterator: Any, readers: Collection[BaseProcess]) -> None:
    """End the readers of a loader's iterator: those that don't leave when asked to are killed. They write nothing."""

    def kill() -> None:
        for reader in readers:
            reader.kill()

    deadline = threading.Timer(_PATIENCE, kill)
    deadline.daemon = True
    deadline.start()
    try:
        # What it does when it is collected, which a traceback that holds it puts off until the process waits for its readers.
        getattr(iterator, "_shutdown_workers", _nothing)()
    finally:
        deadline.cancel()
        kill()
        for reader in readers:
            reader.join(_PATIENCE)


def _nothing() -> None:
    pass


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(_worker: int) -> None:
    leave_signals_to_the_parent()
