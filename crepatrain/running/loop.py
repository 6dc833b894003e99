"""The loop of optimizer steps: each is launched, observed and settled; between two of them comes what is due.

A step is launched without waiting for the device. As soon as its forward is done its score is observed, which the next step's
weight depends on. It is settled, its numbers checked and logged, only after the next one is launched, so that the device never
waits for the host.
"""

import copy
import math
import time
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from crepatrain.config.plan import Plan
from crepatrain.data.loader import keyed_generator
from crepatrain.errors import DivergedError, UserError
from crepatrain.placement.placing import free_memory
from crepatrain.placement.precision import autocast
from crepatrain.placement.processes import no_sync
from crepatrain.records.events import StepDone
from crepatrain.records.runfolder import RunFolder
from crepatrain.running.divergence import draws_of, keep_batches
from crepatrain.running.evaluation import Evaluation
from crepatrain.running.events import BatchReady, StepBegins, StepLaunched
from crepatrain.running.rehearsal import SMALLER
from crepatrain.running.saving import save
from crepatrain.running.session import Run
from crepatrain.running.start import RunStart
from crepatrain.running.validation import Validation
from crepatrain.stopping import Stopped
from crepatrain.tensors import Batch
from crepatrain.training import build
from crepatrain.training.clock import StepClock
from crepatrain.training.metrics import HOW_TO_READ, SIGMA_RANGES, HostCopy, StepNumbers, StepSums
from crepatrain.training.optim import clip_gradients
from crepatrain.training.step import CrepaTerm, training_loss

_GIB = 1 << 30
_STOP = "asked to stop"
_DIVERGED = "diverged"


@dataclass(frozen=True)
class Due:
    """What is done between two optimizer steps, in this order."""

    evaluate: bool = False
    checkpoint: bool = False
    validate: bool = False


@dataclass(frozen=True, eq=False)
class Launched:
    """An optimizer step that the device may still be working on.

    Attributes:
        step: its number, from 0.
        measured: whether CREPA's score was, for its weight may be 0.
        batches: as they were read, without what a teacher looks at.
        scores: means over micro-batches and processes, and whether any process was asked to stop. Copied after the last forward:
            reading them does not wait for backward.
        checks: the gradient norm of each model, and whether any number was not finite, in this step or before.
        clock: of its parts.
    """

    step: int
    weight: float
    measured: bool
    cut_off: bool
    learning_rate: float
    batches: list[Batch]
    scores: HostCopy
    checks: HostCopy
    clock: StepClock


def train(run: Run, validation: Validation, evaluation: Evaluation | None, before: Due) -> None:
    """Do every optimizer step that is left of a run.

    Args:
        evaluation: None where no clips are held out.
        before: what is done before the first of these steps.

    Raises:
        UserError: something that the user can repair; the steps so far are saved where that is possible.
        DivergedError: a loss or gradient that is not finite; the weights are those before it.
        Stopped: a signal came; the step that was under way is saved.
    """
    if not _do(run, before, validation, evaluation):
        raise Stopped("before its next step")
    state, schedule = run.state, run.state.schedule
    if schedule is not None:
        run.context.screen.say(HOW_TO_READ)
    with _Batches(run) as batches:
        _steps(run, batches, validation, evaluation)
    if state.step < run.total:
        raise Stopped(f"saved at step {state.step}; the same command continues from there")


def _steps(run: Run, batches: "_Batches", validation: Validation, evaluation: Evaluation | None) -> None:
    """Every step until the run is complete or asked to stop, and what is due between them."""
    state, schedule = run.state, run.state.schedule
    unsettled: Launched | None = None
    failure: UserError | None = None
    stopping = False
    while state.step < run.total and not stopping:
        began = time.perf_counter()
        was_off = schedule is not None and schedule.cutoff
        launched = _launch_or_rescue(run, batches, unsettled)
        if unsettled:
            failure = _settle(run, unsettled)
        stopping = _observe(run, launched) or failure is not None
        if schedule is not None and schedule.cutoff != was_off:
            batches.open()
        if run.teacher is not None and not state.asks_teacher:
            run.teacher = None
            free_memory()
        seconds = time.perf_counter() - began
        state.window.add(step_seconds=seconds)
        run.events.emit(StepDone(state.step, seconds))
        run.folder.beat(state.step)
        wanted, unsettled = due(run, stopping=stopping), launched
        if wanted != Due():
            failure = failure or _settle(run, launched)
            unsettled = None
            try:
                stopping = not _do(run, wanted, validation, evaluation) or stopping
            except UserError as error:
                raise failure or error from error
        if failure:
            raise failure


class _Batches:
    """The stream of micro-batches from the step that a run is at; its reader processes end with the context."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stream: Generator[Batch] | None = None

    def __enter__(self) -> "_Batches":
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def open(self) -> None:
        """Open the stream anew."""
        self.__exit__()
        self._stream = self._run.open_batches(self._run.state.step)

    def __next__(self) -> Batch:
        assert self._stream is not None
        return next(self._stream)


def due(run: Run, *, stopping: bool) -> Due:
    """What is due behind the optimizer step that a run has reached."""
    step, config = run.state.step, run.config
    checkpoint = stopping or step == run.total or step % config.loop.checkpointing_steps == 0
    # Measured before it is saved, so that the best checkpoint is known when the oldest is given up.
    return Due(
        evaluate=checkpoint and not stopping,
        checkpoint=checkpoint,
        validate=not stopping and Validation.wanted(config.validation, step, run.total),
    )


def due_before(plan: Plan, folder: RunFolder, start: RunStart) -> Due:
    """What is due before the next optimizer step: the base, or videos that a kill after the last checkpoint has cost."""
    step = start.state.step
    return Due(evaluate=step == 0, validate=Validation.owed(plan, folder, step, start.total))


def _do(run: Run, wanted: Due, validation: Validation, evaluation: Evaluation | None) -> bool:
    """Do what is due.

    Returns:
        Whether the run goes on: a signal may end a validation.
    """
    if wanted.evaluate and evaluation:
        try:
            evaluation.evaluate()
        except torch.OutOfMemoryError as error:
            _give_back(run, error)
            if run.state.step > run.saved and not run.several:
                save(run)
            raise UserError("out of GPU memory while the held-out clips were measured", SMALLER) from error
    if wanted.checkpoint:
        save(run)
    if not wanted.validate:
        return True
    made = False
    try:
        made = validation.validate()
    finally:
        if not made and run.state.step > run.saved and not run.several:
            save(run)
    return made


def _launch_or_rescue(run: Run, batches: _Batches, unsettled: Launched | None) -> Launched:
    """Launch a step. If it can't be done, keep the steps before it, unless an optimizer was at work."""
    run.events.emit(StepBegins(run))
    try:
        launched = _launch(run, batches)
    except (UserError, torch.OutOfMemoryError) as error:
        if not run.several and not run.moving:
            _give_back(run, error)
            if unsettled:
                _settle(run, unsettled)
            if run.state.step > run.saved:
                save(run)
        raise  # of several processes the others are within the step, and none can wait for them
    run.events.emit(StepLaunched(run))
    return launched


def _give_back(run: Run, error: BaseException) -> None:
    """Give back the memory of what could not be done."""
    traceback.clear_frames(error.__traceback__)  # which hold the step's graph
    for model in run.models.values():
        model.optimizer.optimizer.zero_grad(set_to_none=True)
    free_memory()


def _launch(run: Run, batches: _Batches) -> Launched:
    """Queue one optimizer step over all its micro-batches. No weight moves if a number is not finite, then or before."""
    config, state, schedule, device = run.config, run.state, run.state.schedule, run.context.device
    # Decided once per optimizer step, from what all processes know alike.
    weight = schedule.weight(state.step) if schedule else 0.0
    measured = schedule is not None and schedule.needs_score(state.step)
    clock = StepClock(device)
    crepa = _crepa_term(run, weight, clock) if measured else None
    torch.manual_seed(keyed_generator("dropout", config.loop.seed, state.step, run.accelerator.process_index).initial_seed())

    wrappers = [model.wrapper for model in run.models.values()]
    sums, read = StepSums(), []
    scores = arriving = None
    for micro in range(config.loop.gradient_accumulation_steps):
        last = micro == config.loop.gradient_accumulation_steps - 1
        with clock.waiting("data"):
            read.append(draws_of(following := next(batches)))
            batch = following.to(device)
        run.events.emit(BatchReady(batch))
        with no_sync(run.accelerator, wrappers, last=last):
            with clock.part("forward"), autocast(config.loop, device):
                losses = training_loss(run.family, run.process, run.transformer.wrapper, run.blocks, batch, crepa, run.layersync)
            sums.add(losses, batch.sigma)
            if last:
                scores = _over_processes(run, sums.packed())
                arriving = HostCopy((*StepSums.names, _STOP), scores)
            with clock.part("backward"):
                run.accelerator.backward(losses.total / config.loop.gradient_accumulation_steps)

    assert scores is not None
    assert arriving is not None
    optimizers = {name: model.optimizer for name, model in run.models.items()}
    with clock.part("optimizer"):
        norms = torch.stack(
            [clip_gradients(optimizer.parameters, config.optim.max_grad_norm) for optimizer in optimizers.values()]
        )
    run.diverged = torch.maximum(run.diverged, 1 - torch.isfinite(torch.cat([scores, norms.to(scores)])).all().float())
    launched = Launched(
        step=state.step,
        weight=weight,
        measured=measured,
        cut_off=schedule is not None and schedule.is_off(state.step),
        learning_rate=run.transformer.optimizer.learning_rate,
        batches=read,
        scores=arriving,
        checks=HostCopy((*optimizers, _DIVERGED), torch.cat([norms, run.diverged.view(1).to(norms)])),
        clock=clock,
    )
    if not all(optimizer.guarded for optimizer in optimizers.values()):
        _expect_finite(run, launched)
    run.moving = True
    with clock.part("optimizer"):
        for model in run.models.values():
            model.optimizer.step(run.diverged)
        for model in run.models.values():
            if model.average:
                model.average.update()
    run.moving = False
    state.step += 1
    state.samples_seen += run.sampler.unit
    return launched


def _crepa_term(run: Run, weight: float, clock: StepClock) -> CrepaTerm:
    assert run.teacher is not None
    return build.crepa_term(
        run.config.crepa, run.models["projector"].wrapper, run.teacher, weight, timed=lambda: clock.part("crepa")
    )


def _over_processes(run: Run, scores: Tensor) -> Tensor:
    """The means over all processes, and behind them whether any of these was asked to stop."""
    packed = torch.cat([scores, scores.new_full((1,), float(run.context.stop.requested))])
    return cast("Tensor", run.accelerator.reduce(packed, reduction="mean")) if run.several else packed


def _observe(run: Run, launched: Launched) -> bool:
    """Pass a step's score to the schedule, before the next weight is decided.

    Waits for the step's forward alone: its backward and its optimizer are queued behind.

    Returns:
        Whether the run is to stop after this step.
    """
    found = launched.scores.read()
    if run.state.schedule and launched.measured:
        numbers = _numbers(run, launched)
        score = numbers.self_similarity if run.config.crepa.crepa_threshold_metric == "self" else numbers.alignment
        assert score is not None
        if math.isfinite(score):  # otherwise _settle ends the run
            run.state.schedule.observe(score)
    # Several processes stop together, by what all of them have read; one alone by what it has heard since.
    return found[_STOP] > 0 or (not run.several and run.context.stop.requested)


def _numbers(run: Run, launched: Launched) -> StepNumbers:
    return StepNumbers.of(launched.scores.read(), crepa=launched.measured, layersync=run.layersync is not None)


def _settle(run: Run, launched: Launched) -> UserError | None:
    """Take a step's numbers into the logging window, and log where one ends. One that is cut off goes on with the run.

    Returns:
        Why nothing could be logged, after which a run ends at the next moment when nothing is lost.

    Raises:
        DivergedError: a number is not finite; no weight has moved since.
    """
    _expect_finite(run, launched)
    config, window, numbers = run.config, run.state.window, _numbers(run, launched)
    seconds = launched.clock.seconds()
    crepa_seconds = seconds.get("crepa", 0.0)
    window.add(
        loss=numbers.total(launched.weight, config.layersync.layersync_lambda),
        diffusion_loss=numbers.diffusion_loss,
        crepa_loss=launched.weight * (numbers.crepa_raw or 0.0) if run.state.schedule else None,
        crepa_alignment_score=numbers.alignment,
        crepa_similarity_self=numbers.self_similarity,
        layersync_loss=None if numbers.layersync_raw is None else config.layersync.layersync_lambda * numbers.layersync_raw,
        grad_norm=launched.checks.read()["transformer"],
        data_seconds=seconds["data"],
        forward_seconds=seconds["forward"] - crepa_seconds,
        crepa_seconds=crepa_seconds if launched.measured else None,
        backward_seconds=seconds["backward"],
        optimizer_seconds=seconds["optimizer"],
    )
    for sigmas, (total, count) in numbers.by_sigma.items():
        window.add_mean(f"sigma_loss {sigmas}", total, count)
    done = launched.step + 1
    if done < run.total and done % config.loop.logging_steps:
        return None
    unlogged = copy.deepcopy(window)
    try:
        run.log(_line(run, launched))
    except UserError as error:
        if run.several:
            raise  # the others know nothing of it
        run.state.window = unlogged
        return error
    return None


def _expect_finite(run: Run, launched: Launched) -> None:
    norms = launched.checks.read()
    if not norms.pop(_DIVERGED):
        return
    run.state.step = launched.step
    loss = _numbers(run, launched).total(launched.weight, run.config.layersync.layersync_lambda)
    listed, step = ", ".join(f"{norm:g}" for norm in norms.values()), launched.step + 1
    clips = ", ".join(name for batch in launched.batches for name in batch.keys)
    kept = keep_batches(run.folder, step, launched.batches, run.accelerator.process_index if run.several else None)
    raise DivergedError(
        f"step {step}: loss {loss:g}, gradient norms {listed}, on {clips}",
        f"the weights were not changed; {run.last_good()}; {kept}. Lower learning_rate, or check those clips",
    )


def _line(run: Run, launched: Launched) -> dict[str, Any]:
    """The line of metrics.jsonl that ends a logging window: what is logged is what was optimised."""
    means = run.state.window.take()
    if "crepa_alignment_score" not in means:  # unmeasured: nothing of CREPA was in these losses
        means.pop("crepa_loss", None)
    schedule, seconds, peak = run.state.schedule, means["step_seconds"], run.measure_peak()
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
        "sigma_loss": {sigmas: means[f"sigma_loss {sigmas}"] for sigmas in SIGMA_RANGES if f"sigma_loss {sigmas}" in means},
        "step_seconds": seconds,
        **{f"{part}_seconds": means.get(f"{part}_seconds") for part in ("data", "forward", "crepa", "backward", "optimizer")},
        "samples_per_second": run.sampler.unit / seconds,
        "peak_memory_gib": None if peak is None else peak / _GIB,
    }
    if "layersync_loss" in means:
        line["layersync_loss"] = means["layersync_loss"]
    return line
