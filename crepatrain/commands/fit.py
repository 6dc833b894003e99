"""Training, from a plan to an adapter."""

import contextlib
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor

from crepatrain.adapters.compatibility import load_call
from crepatrain.config.plan import Plan
from crepatrain.config.sections import RunConfig
from crepatrain.data.loader import keyed_generator
from crepatrain.errors import DivergedError, UserError
from crepatrain.placement.precision import autocast
from crepatrain.placement.processes import no_sync
from crepatrain.preparing.precompute import fill_caches, free_memory, plan_caches
from crepatrain.preparing.preflight import dataset_facts, hold_out, look_at_clips
from crepatrain.records.layout import ADAPTER_FILE
from crepatrain.records.reading import read_run
from crepatrain.records.runfolder import RunFolder, expect_same_fingerprint
from crepatrain.records.trackers import tracking
from crepatrain.reporting.report import refresh_report
from crepatrain.running.evaluation import Evaluation
from crepatrain.running.rehearsal import compare_memory, rehearse
from crepatrain.running.session import Run, Start, build_run, prepare_start, save, take_fingerprint
from crepatrain.running.validation import Validation
from crepatrain.screen import Screen, TrainingView
from crepatrain.sharing.push import expect_pushable, push
from crepatrain.stopping import Stopped, StopSignal
from crepatrain.tensors import Batch
from crepatrain.training import build
from crepatrain.training.checkpoint import read_plain, readable
from crepatrain.training.clock import StepClock
from crepatrain.training.metrics import SIGMA_RANGES, HostCopy, StepNumbers, StepSums
from crepatrain.training.optim import clip_gradients
from crepatrain.training.step import CrepaTerm, training_loss

_GIB = 1 << 30
_HOW_TO_READ = (
    "crepa_loss is negative: weight x -alignment, so it also shrinks with the weight; "
    "alignment and self-similarity should rise and then level off"
)
_OF_SIGMA = "sigma_loss "  # names the window's means per range of sigma
_SMALLER = (
    "set gradient_checkpointing, or lower num_frames, height and width, train_batch_size or lora_rank; checkpoints are kept"
)


def fit(plan: Plan, screen: Screen, *, rehearsed: bool = False) -> None:
    """Train a plan to its end, from the beginning or from its last checkpoint.

    Args:
        rehearsed: try a step before the first one on a CPU too, as is always done on a GPU.

    Raises:
        UserError: something that the user can mend, before or between steps.
        DivergedError: a loss or gradient that is not finite; the weights are those before it.
        Stopped: a signal came; the step that was under way is saved.
    """
    # The first process fills the caches while the others wait for it, however long that takes.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    device = accelerator.device
    if plan.config.push_to_hub:
        expect_pushable(plan.config)
    with RunFolder(plan.config, writes=accelerator.is_main_process) as folder, StopSignal() as stop:
        resume = folder.look()
        with accelerator.main_process_first():
            dataset, held = hold_out(plan, look_at_clips(plan, screen, stop), screen, stop)
            start = prepare_start(plan, dataset, accelerator.num_processes, device, resume)
            caches = plan_caches(plan, dataset, screen, device, teacher=start.state.asks_teacher)
            fingerprint = take_fingerprint(dataset, caches, start)
            if resume:
                _compare(fingerprint, resume, screen, goes_on=start.state.step < start.total)
            owed = Validation.owed(plan.config, folder, start.state.step, start.total)  # before any process can make them
            if start.state.step >= start.total:
                screen.say(f"this run is complete: {start.state.step} steps. {_further(plan.config)} to go on")
                if not owed:
                    _close(folder, start.state.step, screen)
                    return
            fill_caches(plan, dataset, caches, screen, device, stop)
            held_caches = held and plan_caches(plan, held, screen, device, teacher=start.state.asks_teacher)
            if held and held_caches:
                fill_caches(plan, held, held_caches, screen, device, stop)
        _expect_one_start(start, accelerator.num_processes)
        folder.claim(start.state.step)
        folder.describe(dataset_facts(plan, dataset, start.sampler))
        with _reported(folder), _status(folder, start), tracking(folder, plan.config, start.state.step):
            run = build_run(plan, screen, accelerator, folder, dataset, caches, start, fingerprint)
            if accelerator.num_processes == 1:  # several leave together, from within the loop
                stop.check("before its first step")
            if device.type == "cuda" or rehearsed:
                rehearse(run, plan, list(dataset.cut.buckets), screen)
            evaluation = Evaluation.of(run, plan, held, held_caches) if held and held_caches else None
            validation, first = Validation(run, plan, caches, screen, stop), start.state.step
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # of the caches' models and the rehearsal
            _look_before(run, validation if owed else None, evaluation if first == 0 else None)
            _train(run, screen, stop, validation, evaluation)
    _closing_table(run, screen)
    if not accelerator.is_main_process:
        return
    if device.type == "cuda" and run.state.step > first:
        compare_memory(plan, list(dataset.cut.buckets), _training_peak(run), screen)
    if plan.config.push_to_hub:
        _push(folder, stop, screen)


def _push(folder: RunFolder, stop: StopSignal, screen: Screen) -> None:
    if stop.requested:
        screen.say(f"not uploaded, as a stop was asked for: `crepatrain push {folder.root}` does it")
    else:
        push(folder.root, screen)


def _expect_one_start(start: Start, processes: int) -> None:
    """All processes begin at the same step; that they don't is seen where they don't share a disk."""
    steps = gather_object([start.state.step]) if processes > 1 else [start.state.step]
    if len(set(steps)) > 1:
        raise UserError(
            f"the processes see checkpoints of steps {sorted(set(steps))}", "put output_dir on a disk that all nodes share"
        )


def _compare(fingerprint: dict[str, Any], resume: Path, screen: Screen, *, goes_on: bool) -> None:
    before = read_plain(resume, "fingerprint")
    with readable(resume):
        expect_same_fingerprint(before, fingerprint)
        total = before["total"]
    if goes_on and total != fingerprint["total"]:
        screen.note(
            f"the run was of {total} steps and is of {fingerprint['total']} now: "
            "learning rate and CREPA weight, where they decay until the end, follow the new length from here on"
        )


def _close(folder: RunFolder, step: int, screen: Screen) -> None:
    """Leave a complete run, and say that it is where a kill behind its last checkpoint has left that unsaid."""
    if folder.writes and read_run(folder.root).status.get("status") != "completed":
        with _reported(folder):
            folder.status("completed", step)
    if folder.config.push_to_hub:
        screen.say(f"`crepatrain push {folder.root}` uploads it")


def _further(config: RunConfig) -> str:
    return f"raise {'num_train_epochs' if config.num_train_epochs else 'max_train_steps'}"


@contextlib.contextmanager
def _status(folder: RunFolder, start: Start) -> Iterator[None]:
    """However the training ends, status.json says it."""
    state = start.state
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, Stopped)
        reason = str(error) if stopped else f"{type(error).__name__}: {error}"
        with contextlib.suppress(UserError):  # on a full disk the error itself says more
            folder.status("stopped" if stopped else "failed", state.step, (reason.splitlines() or [""])[0])
        if isinstance(error, torch.OutOfMemoryError):
            raise UserError(f"out of GPU memory at step {state.step + 1}", _SMALLER) from error
        raise
    folder.status("completed", state.step)


@contextlib.contextmanager
def _reported(folder: RunFolder) -> Iterator[None]:
    """However the training ends, report.html shows it."""
    try:
        yield
    finally:
        if folder.writes:
            with contextlib.suppress(UserError):  # how training ended says more than a report that can't be written
                refresh_report(folder.root)


@dataclass(frozen=True, eq=False)
class Launched:
    """An optimizer step that the device may still be working on.

    Attributes:
        step: its number, from 0.
        scores: means over micro-batches and processes, and whether any process was asked to stop. Copied after the last forward:
            reading them does not wait for backward.
        checks: gradient norms, and whether any number was not finite, in this step or before.
        clock: of its parts.
    """

    step: int
    weight: float
    measured: bool
    cut_off: bool
    learning_rate: float
    clips: list[str]
    scores: HostCopy
    checks: HostCopy
    clock: StepClock


def _train(run: Run, screen: Screen, stop: StopSignal, validation: Validation, evaluation: Evaluation | None) -> None:
    """The loop. A step is settled after the next one is launched, so that the device never waits for the host."""
    state, schedule = run.state, run.state.schedule
    alone = run.accelerator.num_processes == 1
    batches = run.open_batches(state.step)
    before, stopping = None, False
    if schedule is not None:
        screen.say(_HOW_TO_READ)
    with screen.training(state.step, run.total) as view:
        while state.step < run.total and not stopping:
            began = time.perf_counter()
            was_off = schedule is not None and schedule.cutoff
            launched = _launch_or_rescue(run, batches, stop, before, view)
            if before:
                _settle(run, before, view)
            stopping = _observe(run, launched) or (alone and stop.requested)
            if schedule is not None and schedule.cutoff != was_off:
                batches = run.open_batches(state.step)
            if run.teacher is not None and not state.asks_teacher:
                run.teacher = None
                free_memory()
            seconds = time.perf_counter() - began
            state.window.add(step_seconds=seconds)
            view.step(state.step, seconds)
            settled, stopping = _save_and_look(run, launched, view, validation, evaluation, stopping=stopping)
            before = None if settled else launched
    if state.step < run.total:
        raise Stopped(f"saved at step {state.step}; the same command goes on from there")


def _launch_or_rescue(
    run: Run, batches: Iterator[Batch], stop: StopSignal, before: Launched | None, view: TrainingView
) -> Launched:
    """Launch a step. If it can't be done, keep the steps before it, unless an optimizer was at work."""
    try:
        return _launch(run, batches, stop)
    except (UserError, torch.OutOfMemoryError) as error:
        if run.accelerator.num_processes == 1 and run.state.step and not run.moving:
            traceback.clear_frames(error.__traceback__)  # which hold the step's graph
            for learner in run.learners.values():
                learner.optimizer.zero_grad(set_to_none=True)
            free_memory()
            if before:
                _settle(run, before, view)
            save(run)
        raise  # of several processes the others are within the step, and none can wait for them


def _save_and_look(
    run: Run,
    launched: Launched,
    view: TrainingView,
    validation: Validation,
    evaluation: Evaluation | None,
    *,
    stopping: bool,
) -> tuple[bool, bool]:
    """What is due behind a step: a checkpoint, videos.

    Returns:
        Whether the step was settled for it, and whether the run is to stop.
    """
    saving = stopping or run.state.step == run.total or run.state.step % run.config.checkpointing_steps == 0
    looking = not stopping and validation.due()
    if saving or looking:
        _settle(run, launched, view)
    if saving:
        _keep(run, None if stopping else evaluation)
    if looking:
        made = False
        try:
            with _looking(run):
                made = validation.make()
        finally:
            if not made and not saving and run.accelerator.num_processes == 1:
                save(run)
        stopping = not made
    return saving or looking, stopping


def _look_before(run: Run, validation: Validation | None, evaluation: Evaluation | None) -> None:
    """What the base does before the first step, or the videos that are owed before the next one."""
    made = True
    with _looking(run):
        if evaluation:
            evaluation.make()
        if validation:
            made = validation.make()
    if not made:
        raise Stopped("before its next step")


def _keep(run: Run, evaluation: Evaluation | None) -> None:
    """A checkpoint, measured before it is written, so that the best one is known when the oldest is given up."""
    if evaluation:
        with _looking(run):
            evaluation.make()
    save(run)


def _training_peak(run: Run) -> int:
    """Bytes, on a GPU."""
    run.peak = max(run.peak, torch.cuda.max_memory_allocated())
    return run.peak


@contextlib.contextmanager
def _looking(run: Run) -> Iterator[None]:
    """What is held while looking at the model is not of its training."""
    cuda = run.accelerator.device.type == "cuda"
    if cuda:
        _training_peak(run)
    try:
        with run.result():
            yield
    finally:
        if cuda:
            torch.cuda.reset_peak_memory_stats()


def _launch(run: Run, batches: Iterator[Batch], stop: StopSignal) -> Launched:
    """Queue one optimizer step over all its micro-batches. No weight moves if a number is not finite, then or before."""
    config, state, schedule, device = run.config, run.state, run.state.schedule, run.accelerator.device
    # Decided once per optimizer step, from what all processes know alike.
    weight = schedule.weight(state.step) if schedule else 0.0
    measured = schedule is not None and schedule.needs_score(state.step)
    clock = StepClock(device)
    crepa = _crepa_term(run, weight, clock) if measured else None
    torch.manual_seed(keyed_generator("dropout", config.seed, state.step, run.accelerator.process_index).initial_seed())

    modules = [module for module in (run.transformer, run.crepa) if module is not None]
    sums, clips = StepSums(), []
    scores = arriving = None
    for micro in range(config.gradient_accumulation_steps):
        last = micro == config.gradient_accumulation_steps - 1
        with clock.waiting("data"):
            batch = next(batches).to(device)
        clips += batch.keys
        with no_sync(run.accelerator, modules, last=last):
            with clock.part("forward"), autocast(config, device):
                losses = training_loss(run.family, run.process, run.transformer, run.blocks, batch, crepa, run.layersync)
            sums.add(losses, batch.sigma)
            if last:
                scores = _over_processes(run, sums.packed(), stop)
                arriving = HostCopy(scores)
            with clock.part("backward"):
                run.accelerator.backward(losses.total / config.gradient_accumulation_steps)

    assert scores is not None
    assert arriving is not None
    with clock.part("optimizer"):
        norms = torch.stack([clip_gradients(learner.parameters, config.max_grad_norm) for learner in run.learners.values()])
    run.diverged = torch.maximum(run.diverged, 1 - torch.isfinite(torch.cat([scores, norms.to(scores)])).all().float())
    launched = Launched(
        step=state.step,
        weight=weight,
        measured=measured,
        cut_off=schedule is not None and schedule.is_off(state.step),
        learning_rate=run.learners["transformer"].learning_rate,
        clips=clips,
        scores=arriving,
        checks=HostCopy(torch.cat([norms, run.diverged.view(1).to(norms)])),
        clock=clock,
    )
    if not all(learner.guarded for learner in run.learners.values()):
        _expect_finite(run, launched)
    run.moving = True
    with clock.part("optimizer"):
        for learner in run.learners.values():
            learner.step(run.diverged)
        if run.average:
            run.average.update()
    run.moving = False
    state.step += 1
    state.samples_seen += run.sampler.unit
    return launched


def _crepa_term(run: Run, weight: float, clock: StepClock) -> CrepaTerm:
    assert run.crepa is not None
    assert run.teacher is not None
    return build.crepa_term(run.config, run.crepa, run.teacher, weight, timed=lambda: clock.part("crepa"))


def _over_processes(run: Run, scores: Tensor, stop: StopSignal) -> Tensor:
    """The means over all processes, and behind them whether any of these was asked to stop."""
    packed = torch.cat([scores, scores.new_full((1,), float(stop.requested))])
    if run.accelerator.num_processes == 1:
        return packed
    return cast("Tensor", run.accelerator.reduce(packed, reduction="mean"))


def _observe(run: Run, launched: Launched) -> bool:
    """Take a step's score into the schedule, before the next weight is decided; says whether any process was asked to stop.

    Waits for the step's forward alone: its backward and its optimizer are queued behind.
    """
    numbers, stopping = _numbers(run, launched)
    if run.state.schedule and launched.measured:
        score = numbers.self_similarity if run.config.crepa_threshold_metric == "self" else numbers.alignment
        assert score is not None
        if math.isfinite(score):  # otherwise _settle ends the run
            run.state.schedule.observe(score)
    return stopping


def _numbers(run: Run, launched: Launched) -> tuple[StepNumbers, bool]:
    *values, asked_to_stop = launched.scores.read()
    return StepNumbers.of(values, crepa=launched.measured, layersync=run.layersync is not None), asked_to_stop > 0


def _settle(run: Run, launched: Launched, view: TrainingView) -> None:
    """Take a step's numbers into the logging window, and log where one ends. One that is cut off goes on with the run.

    Raises:
        DivergedError: a number is not finite; no weight has moved since.
    """
    _expect_finite(run, launched)
    config, schedule, window = run.config, run.state.schedule, run.state.window
    numbers, _ = _numbers(run, launched)
    seconds = launched.clock.seconds()
    crepa_seconds = seconds.get("crepa", 0.0)
    window.add(
        loss=numbers.total(launched.weight, config.layersync_lambda),
        diffusion_loss=numbers.diffusion_loss,
        crepa_loss=launched.weight * (numbers.crepa_raw or 0.0) if schedule else None,
        crepa_alignment_score=numbers.alignment,
        crepa_similarity_self=numbers.self_similarity,
        layersync_loss=None if numbers.layersync_raw is None else config.layersync_lambda * numbers.layersync_raw,
        grad_norm=launched.checks.read()[0],
        data_seconds=seconds["data"],
        forward_seconds=seconds["forward"] - crepa_seconds,
        crepa_seconds=crepa_seconds if launched.measured else None,
        backward_seconds=seconds["backward"],
        optimizer_seconds=seconds["optimizer"],
    )
    for sigmas, (total, count) in zip(SIGMA_RANGES, numbers.by_sigma, strict=True):
        window.add_mean(f"{_OF_SIGMA}{sigmas}", total, count)
    done = launched.step + 1
    if done == run.total or done % config.logging_steps == 0:
        view.log(_log(run, launched))


def _expect_finite(run: Run, launched: Launched) -> None:
    *norms, diverged = launched.checks.read()
    if not diverged:
        return
    run.state.step = launched.step
    numbers, _ = _numbers(run, launched)
    loss = numbers.total(launched.weight, run.config.layersync_lambda)
    listed = ", ".join(f"{norm:g}" for norm in norms)
    raise DivergedError(
        f"step {launched.step + 1}: loss {loss:g}, gradient norms {listed}, on {', '.join(launched.clips)}",
        f"the weights were not changed; {run.last_good()}. Lower learning_rate, or look at those clips",
    )


def _log(run: Run, launched: Launched) -> dict[str, Any]:
    means = run.state.window.take()
    if "crepa_alignment_score" not in means:  # unmeasured: nothing of CREPA was in these losses
        means.pop("crepa_loss", None)
    schedule = run.state.schedule
    seconds = means["step_seconds"]
    cuda = run.accelerator.device.type == "cuda"
    line = {
        "step": launched.step + 1,
        "loss": means["loss"],
        "diffusion_loss": means["diffusion_loss"],
        "crepa_loss": means.get("crepa_loss"),
        "crepa_alignment_score": means.get("crepa_alignment_score"),
        "crepa_similarity_self": means.get("crepa_similarity_self"),
        "crepa_weight": launched.weight if schedule else None,
        "crepa_cutoff": launched.cut_off if schedule else None,
        "crepa_alignment_score_ema": schedule.ema if schedule else None,
        "learning_rate": launched.learning_rate,
        "grad_norm": means["grad_norm"],
        "sigma_loss": {name.removeprefix(_OF_SIGMA): mean for name, mean in sorted(means.items()) if name.startswith(_OF_SIGMA)},
        "step_seconds": seconds,
        **{f"{part}_seconds": means.get(f"{part}_seconds") for part in ("data", "forward", "crepa", "backward", "optimizer")},
        "samples_per_second": run.sampler.unit / seconds,
        "peak_memory_gib": _training_peak(run) / _GIB if cuda else None,
    }
    if "layersync_loss" in means:
        line["layersync_loss"] = means["layersync_loss"]
    run.folder.log(line)
    return line


def _closing_table(run: Run, screen: Screen) -> None:
    lines = [line for line in run.folder.lines() if "loss" in line]
    if not lines:
        return
    tenth = max(len(lines) // 10, 1)  # one step alone says more of its noise level than of the training
    parts = (lines[:tenth], lines[-tenth:])
    rows = [
        (name, *(_mean(part, key) for part in parts))
        for name, key in (
            ("loss", "loss"),
            ("diffusion loss", "diffusion_loss"),
            ("crepa_loss", "crepa_loss"),
            ("alignment", "crepa_alignment_score"),
            ("self-similarity", "crepa_similarity_self"),
        )
        if any(line.get(key) is not None for part in parts for line in part)
    ]
    starts = [0, *(line["step"] for line in lines)]  # a line stands for the steps since the one before
    spans = []
    for first, last in ((0, tenth), (len(lines) - tenth, len(lines))):
        begin, end = starts[first] + 1, starts[last]
        spans.append(f"steps {begin}-{end}" if begin < end else f"step {end}")
    screen.table("training, first -> last", ("mean of", *spans), rows)
    screen.rows(
        "result",
        [
            *_result(run),
            ("all numbers", str(run.folder.metrics)),
            ("train on", f"{_further(run.config)} and give the same command"),
        ],
    )


def _result(run: Run) -> list[tuple[str, str]]:
    """What the run made, and how to load it."""
    root, variant = run.folder.root, run.family.variant
    if run.config.model_type == "full":
        load = f'{run.family.spec.transformer_class}.from_pretrained("{root}", subfolder="{variant.transformer}")'
        return [("transformer", str(root / variant.transformer)), ("load it", load)]
    return [("adapter", str(root / ADAPTER_FILE)), ("load it", load_call(root, ADAPTER_FILE, variant.expert))]


def _mean(lines: Sequence[dict[str, Any]], key: str) -> str:
    values = [line[key] for line in lines if line.get(key) is not None]
    return f"{sum(values) / len(values):.4f}" if values else "-"
