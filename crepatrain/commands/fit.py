"""Training, from a plan to an adapter: the stages of a run in their order."""

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from crepatrain.adapters.compatibility import load_call
from crepatrain.commands.push import push
from crepatrain.config.plan import Plan
from crepatrain.config.sections import LoopConfig
from crepatrain.data.buckets import Bucket
from crepatrain.errors import UserError
from crepatrain.labels import LABELS
from crepatrain.memory.choosing import choose_memory
from crepatrain.memory.estimate import largest_bucket
from crepatrain.memory.offload import expect_room_on_host
from crepatrain.placement.devices import free_bytes, keep_compiled, open_device
from crepatrain.placement.host_memory import pinnable_memory
from crepatrain.placement.placing import within_memory
from crepatrain.placement.processes import expect_all_processes, local_processes
from crepatrain.preparing.context import Context
from crepatrain.preparing.preflight import dataset_facts
from crepatrain.records.continuing import keep_begun
from crepatrain.records.events import Ended, Events, Logged, StepDone, Subscriber
from crepatrain.records.layout import ADAPTER_FILE, checkpoints
from crepatrain.records.reading import first_and_last, mean, read_run
from crepatrain.records.runfolder import RunFolder
from crepatrain.records.trackers import tracking
from crepatrain.reporting.report import live_report
from crepatrain.running.companions import Companions, Loss
from crepatrain.running.evaluation import Evaluation
from crepatrain.running.growth import GrowthNotes
from crepatrain.running.loop import due_before, train
from crepatrain.running.rehearsal import SMALLER, compare_memory, rehearse
from crepatrain.running.session import Run, build_run
from crepatrain.running.start import RunStart, expect_one_start, fill_all_caches, prepare_start
from crepatrain.running.validation import Validation
from crepatrain.screen import Screen, TrainingView
from crepatrain.sharing.hub import expect_pushable
from crepatrain.stopping import Stopped, StopSignal
from crepatrain.training.build import build_family
from crepatrain.training.selftest import expect_gradients


def fit(plan: Plan, screen: Screen, *, rehearsed: bool = False, subscribers: Sequence[Subscriber] = ()) -> None:
    """Train a plan to its end, from the beginning or from its last checkpoint.

    Args:
        rehearsed: try a step before the first one on a CPU too, as is always done on a GPU.
        subscribers: called with every event of `records.events` and `running.events`.

    Raises:
        UserError: something that the user can repair, before or between steps.
        DivergedError: a loss or gradient that is not finite; the weights are those before it.
        Stopped: a signal came; the step that was under way is saved.
    """
    # The first process fills the caches while the others wait for it, however long that takes.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    device = open_device(screen)
    keep_compiled(Path(plan.config.data.cache_dir))
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu", kwargs_handlers=[patience])
    plan = _with_memory_chosen(keep_begun(plan), accelerator, screen)
    if plan.config.hub.push_to_hub:
        expect_pushable(plan.config)
    expect_all_processes()
    one, processes = accelerator.is_main_process, accelerator.num_processes
    with (
        RunFolder(plan.config, writes=one, processes=processes) as folder,
        Companions(accelerator, partial(_lost, folder), say=lambda error: screen.problems(error.problems)) as companions,
        companions.explained(),
        StopSignal() as stop,
    ):
        context = Context(plan, screen, accelerator.device, stop)
        events = Events([*subscribers, *([live_report(folder.root, screen.note)] if folder.writes else [])])
        resume = folder.inspect()
        with accelerator.main_process_first():
            start = prepare_start(context, accelerator.num_processes, resume)
            before = due_before(plan, folder, start)  # decided before any process can do it
            if start.complete:
                screen.say(f"this run is complete: {start.state.step} steps. {_further(plan.config.loop)} to continue it")
                if not before.validate:
                    _close(folder, start.state.step, events, screen)
                    return
            expect_room_on_host(plan, largest_bucket(plan, list(start.caches.dataset.clips.buckets)), context.device)
            expect_gradients(plan, build_family(plan), context.device)
            held = fill_all_caches(context, start)
        expect_one_start(start, accelerator)
        for note in folder.claim(start.state.step, start.changed):
            screen.note(note)
        facts = dataset_facts(plan, start.caches.dataset, start.sampler)
        folder.describe(facts, start.fingerprint["samples"], start.clips)
        first, buckets = start.state.step, list(start.caches.dataset.clips.buckets)
        with _status(folder, start, events), tracking(folder, first) as trackers:
            for tracker in trackers:
                events.subscribe(tracker)
            with within_memory("while the model was loaded", SMALLER):
                run = build_run(context, accelerator, folder, events, start)
            if not run.several:  # several leave together, from within the loop
                stop.check("before its first step")
            if context.device.type == "cuda" or rehearsed:
                rehearse(run, buckets)
            if context.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # of the caches' models and the rehearsal
            with screen.training(first, run.total) as view:
                events.subscribe(_Shown(view))
                events.subscribe(GrowthNotes(screen, context.device))
                evaluation = Evaluation.of(run, held) if held else None
                with companions.explained():
                    train(run, Validation(run, start.caches), evaluation, before)
    _closing_table(run, screen)
    if not folder.writes:
        return
    peak = run.measure_peak()
    if peak is not None and run.state.step > first:
        compare_memory(context, buckets, peak)
    if plan.config.hub.push_to_hub:
        _push(folder, stop, screen)


def _with_memory_chosen(plan: Plan, accelerator: Accelerator, screen: Screen) -> Plan:
    """The plan with a value for every open key, the same in all processes: for the least of what each has."""
    if not plan.open_keys:
        return plan
    room, host = free_bytes(accelerator.device), pinnable_memory(local_processes())
    if room is not None and accelerator.num_processes > 1:
        rooms, hosts = zip(*gather_object([(room, host)]), strict=True)
        room, host = min(rooms), min(hosts)
    return choose_memory(plan, Bucket(*plan.largest), room, host, screen)


def _lost(folder: RunFolder, loss: Loss) -> UserError:
    """Another process has ended: written down, and as what the user can do about it."""
    reason = f"process {loss.process} ended: {loss.reason}"
    with contextlib.suppress(UserError):  # on a full disk the error itself says more
        folder.fail(reason)
    saved = checkpoints(folder.checkpoints)
    last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    return UserError(reason, f"{last}; see what that process printed, then run the same command again")


class _Shown:
    """Passes events on to the live view."""

    def __init__(self, view: TrainingView) -> None:
        self._view = view

    def __call__(self, event: object) -> None:
        match event:
            case StepDone(done, seconds):
                self._view.step(done, seconds)
            case Logged(line) if "loss" in line:
                self._view.log(line)


def _push(folder: RunFolder, stop: StopSignal, screen: Screen) -> None:
    if stop.requested:
        screen.say(f"not uploaded, as a stop was asked for: `crepatrain push {folder.root}` does it")
    else:
        push(folder.root, screen)


def _close(folder: RunFolder, step: int, events: Events, screen: Screen) -> None:
    """Leave a complete run as it is; if it was killed after its last checkpoint, mark it as completed now."""
    if folder.writes and read_run(folder.root).status.get("status") != "completed":
        folder.status("completed", step)
        events.emit(Ended("completed", step))
    if folder.config.hub.push_to_hub:
        screen.say(f"`crepatrain push {folder.root}` uploads it")


def _further(config: LoopConfig) -> str:
    return f"raise {'num_train_epochs' if config.num_train_epochs else 'max_train_steps'}"


@contextlib.contextmanager
def _status(folder: RunFolder, start: RunStart, events: Events) -> Iterator[None]:
    """However the training ends, it is written to status.json, and the subscribers receive it."""
    state = start.state
    try:
        yield
    except BaseException as error:
        status = "stopped" if isinstance(error, Stopped) else "failed"
        reason = str(error) if isinstance(error, Stopped) else f"{type(error).__name__}: {error}"
        reason = (reason.splitlines() or [""])[0]
        with contextlib.suppress(UserError):  # on a full disk the error itself says more
            folder.status(status, state.step, reason)
        try:
            events.emit(Ended(status, state.step, reason))
        except Exception as another:  # noqa: BLE001 - whatever a subscriber does, the cause is what the user has to know
            error.add_note(f"and a subscriber failed at the end of the run: {another!r}")
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(f"out of GPU memory at step {state.step + 1}", SMALLER) from error
        raise
    try:
        folder.status("completed", state.step)
    finally:
        events.emit(Ended("completed", state.step))


def _closing_table(run: Run, screen: Screen) -> None:
    lines = [line for line in run.folder.lines() if "loss" in line]
    if not lines:
        return
    parts = first_and_last(lines)
    keys = ("loss", "diffusion_loss", "crepa_loss", "crepa_alignment_score", "crepa_similarity_self")
    logged = [key for key in keys if any(line.get(key) is not None for part in parts for line in part)]
    rows = [(LABELS[key], *(_mean(part, key) for part in parts)) for key in logged]
    starts = [0, *(line["step"] for line in lines)]  # a line stands for the steps since the one before
    spans = []
    for first in (0, len(lines) - len(parts[1])):
        begin, end = starts[first] + 1, starts[first + len(parts[0])]
        spans.append(f"steps {begin}-{end}" if begin < end else f"step {end}")
    screen.table("training, first -> last", ("mean of", *spans), rows)
    screen.rows(
        "result",
        [
            *_result(run),
            ("all numbers", str(run.folder.metrics)),
            ("to continue", f"{_further(run.config.loop)} and run the same command again"),
        ],
    )


def _result(run: Run) -> list[tuple[str, str]]:
    """What the run made, and how to load it."""
    root, variant = run.folder.root, run.family.variant
    if run.config.model.model_type == "full":
        load = f'{run.family.spec.transformer_class}.from_pretrained("{root}", subfolder="{variant.transformer}")'
        return [("transformer", str(run.folder.result_transformer(variant.transformer))), ("load it", load)]
    return [("adapter", str(run.folder.result_adapter)), ("load it", load_call(root, ADAPTER_FILE, variant.expert))]


def _mean(lines: Sequence[dict[str, Any]], key: str) -> str:
    found = mean([line[key] for line in lines if line.get(key) is not None])
    return "-" if found is None else f"{found:.4f}"
