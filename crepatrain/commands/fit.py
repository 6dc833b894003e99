"""Training, from a plan to an adapter."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from crepatrain.commands.precompute import fill_caches, free_memory
from crepatrain.commands.preflight import look_at_clips
from crepatrain.commands.runfolder import ADAPTER_FILE, RunFolder
from crepatrain.commands.session import Run, Start, build_run, prepare_start, save
from crepatrain.commands.stopping import Stopped, StopSignal
from crepatrain.config.plan import Plan
from crepatrain.console import Screen
from crepatrain.data.loader import keyed_generator
from crepatrain.errors import DivergedError, UserError
from crepatrain.tensors import Batch
from crepatrain.training import build
from crepatrain.training.checkpoint import checkpoints
from crepatrain.training.metrics import StepNumbers, StepSums
from crepatrain.training.optim import clip_gradients
from crepatrain.training.step import CrepaTerm, training_loss

_GIB = 1 << 30
_SMALLER = (
    "set gradient_checkpointing, or lower num_frames, height and width, train_batch_size or lora_rank; checkpoints are kept"
)


def fit(plan: Plan, screen: Screen) -> None:
    """Train a plan to its end, from the beginning or from its last checkpoint.

    Raises:
        UserError: something that the user can mend, before or between steps.
        DivergedError: a loss or gradient that is not finite; the weights are those before it.
        Stopped: a signal came; the step that was under way is saved.
    """
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    folder = RunFolder(plan.config)
    with StopSignal() as stop:
        resume = folder.look()
        with accelerator.main_process_first():
            dataset = look_at_clips(plan, screen)
            start = prepare_start(plan, dataset, accelerator.num_processes, resume)
            prepared = fill_caches(plan, dataset, screen, accelerator.device, stop, teacher=start.state.asks_teacher)
        start.expect_same_data(prepared)
        if start.state.step >= start.total:
            screen.say(f"this run is complete: {start.state.step} steps. Raise max_train_steps to go on")
            return
        folder.claim(start.state.step)
        with _status(folder, start):
            run = build_run(plan, screen, accelerator, folder, dataset, prepared, start)
            _train(run, screen, stop)
    _closing_table(run, screen)


@contextlib.contextmanager
def _status(folder: RunFolder, start: Start) -> Iterator[None]:
    """However the training ends, status.json says it."""
    state = start.state
    try:
        yield
    except Stopped as stopped:
        folder.status("stopped", state.step, str(stopped))
        raise
    except torch.OutOfMemoryError as error:
        folder.status("failed", state.step, "out of GPU memory")
        raise UserError(f"out of GPU memory at step {state.step + 1}", _SMALLER) from error
    except BaseException as error:
        folder.status("failed", state.step, f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    folder.status("completed", state.step)


def _train(run: Run, screen: Screen, stop: StopSignal) -> None:
    """The loop."""
    state, schedule = run.state, run.state.schedule
    batches = run.open_batches(state.step)
    with screen.training(state.step, run.total) as view:
        while state.step < run.total:
            began = time.perf_counter()
            was_off = schedule is not None and schedule.cutoff
            last, stopping = _optimizer_step(run, batches, stop)
            run.state.window.add(step_seconds=time.perf_counter() - began)
            if schedule is not None and schedule.cutoff != was_off:
                batches = run.open_batches(state.step)
            if run.teacher is not None and not state.asks_teacher:
                run.teacher = None
                free_memory()
            ending = stopping or state.step == run.total
            if state.step % run.config.logging_steps == 0 or ending:
                view.log(_log(run, last))
            view.step(state.step)
            if state.step % run.config.checkpointing_steps == 0 or ending:
                save(run)
            if stopping and state.step < run.total:
                raise Stopped(f"saved at step {state.step}; the same command goes on from there")


def _optimizer_step(run: Run, batches: Iterator[Batch], stop: StopSignal) -> tuple[dict[str, Any], bool]:
    """One optimizer step over all its micro-batches; nothing moves if a number is not finite.

    Returns:
        What only the last step of a logging window tells, and whether any process was asked to stop.
    """
    config, state, schedule, device = run.config, run.state, run.state.schedule, run.accelerator.device
    # Decided once per optimizer step, from what all processes know alike.
    weight = schedule.weight(state.step) if schedule else 0.0
    measured = schedule is not None and schedule.needs_score(state.step)
    crepa = _crepa_term(run, weight) if measured else None
    torch.manual_seed(keyed_generator("dropout", config.seed, state.step, run.accelerator.process_index).initial_seed())

    sums, clips = StepSums(), []
    for micro in range(config.gradient_accumulation_steps):
        batch = next(batches).to(device)
        clips += batch.keys
        with _gradients_shared_at_the_end(run, last=micro == config.gradient_accumulation_steps - 1):
            with build.autocast(config, device):
                losses = training_loss(run.family, run.process, run.transformer, run.blocks, batch, crepa, run.layersync)
            run.accelerator.backward(losses.total / config.gradient_accumulation_steps)
        sums.add(losses)

    norms = [clip_gradients(learner.parameters, config.max_grad_norm) for learner in run.learners.values()]
    numbers, norm_values, stopping = _read(run, sums, norms, stop, measured=measured)
    loss = numbers.total(weight, config.layersync_lambda)
    if not all(map(math.isfinite, (loss, *norm_values))):
        raise DivergedError(_diverged(run, loss, norm_values, clips))
    last = {
        "crepa_weight": weight if schedule else None,
        "crepa_cutoff": schedule.is_off(state.step) if schedule else None,
        "learning_rate": run.learners["transformer"].learning_rate,
    }
    for learner in run.learners.values():
        learner.step()
    if schedule and measured:
        score = numbers.self_similarity if config.crepa_threshold_metric == "self" else numbers.alignment
        assert score is not None
        schedule.observe(score)
    run.state.window.add(
        loss=loss,
        diffusion_loss=numbers.diffusion_loss,
        crepa_loss=weight * (numbers.crepa_raw or 0.0) if schedule else None,
        crepa_alignment_score=numbers.alignment,
        crepa_similarity_self=numbers.self_similarity,
        layersync_loss=None if numbers.layersync_raw is None else config.layersync_lambda * numbers.layersync_raw,
        grad_norm=norm_values[0],
    )
    state.step += 1
    state.samples_seen += run.sampler.unit
    return last, stopping


def _crepa_term(run: Run, weight: float) -> CrepaTerm:
    assert run.crepa is not None
    assert run.teacher is not None
    assert run.config.crepa_block_index is not None
    return CrepaTerm(run.crepa, run.teacher, run.config.crepa_block_index, weight)


@contextlib.contextmanager
def _gradients_shared_at_the_end(run: Run, *, last: bool) -> Iterator[None]:
    """Several processes exchange gradients in the last micro-batch only."""
    with contextlib.ExitStack() as stack:
        for module in (run.transformer, run.crepa):
            if module is not None and not last:
                stack.enter_context(run.accelerator.no_sync(module))
        yield


def _read(
    run: Run, sums: StepSums, norms: list[Tensor], stop: StopSignal, *, measured: bool
) -> tuple[StepNumbers, list[float], bool]:
    """Every number of a step over all processes, in one packed copy from the device."""
    packed = sums.packed()
    asked = packed.new_tensor([float(stop.requested)])
    packed = torch.cat([packed, torch.stack(norms).to(packed), asked])
    if run.accelerator.num_processes > 1:
        packed = cast("Tensor", run.accelerator.reduce(packed, reduction="mean"))
    values = packed.tolist()
    count = len(values) - 1 - len(norms)
    numbers = StepNumbers.of(values[:count], crepa=measured, layersync=run.layersync is not None)
    return numbers, values[count:-1], values[-1] > 0


def _diverged(run: Run, loss: float, norms: Sequence[float], clips: Sequence[str]) -> str:
    saved = checkpoints(run.folder.checkpoints)
    good = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    listed = ", ".join(f"{norm:g}" for norm in norms)
    return (
        f"step {run.state.step + 1}: loss {loss:g}, gradient norms {listed}, on {', '.join(clips)}.\n"
        f"  -> The weights were not changed; {good}. Lower learning_rate, or look at those clips."
    )


def _log(run: Run, last: dict[str, Any]) -> dict[str, Any]:
    means = run.state.window.take()
    if "crepa_alignment_score" not in means:  # unmeasured: nothing of CREPA was in these losses
        means.pop("crepa_loss", None)
    schedule = run.state.schedule
    seconds = means["step_seconds"]
    cuda = run.accelerator.device.type == "cuda"
    line = {
        "step": run.state.step,
        "loss": means["loss"],
        "diffusion_loss": means["diffusion_loss"],
        "crepa_loss": means.get("crepa_loss"),
        "crepa_alignment_score": means.get("crepa_alignment_score"),
        "crepa_similarity_self": means.get("crepa_similarity_self"),
        "crepa_weight": last["crepa_weight"],
        "crepa_cutoff": last["crepa_cutoff"],
        "crepa_alignment_score_ema": schedule.ema if schedule else None,
        "learning_rate": last["learning_rate"],
        "grad_norm": means["grad_norm"],
        "step_seconds": seconds,
        "samples_per_second": run.sampler.unit / seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / _GIB if cuda else None,
    }
    if "layersync_loss" in means:
        line["layersync_loss"] = means["layersync_loss"]
    if run.accelerator.is_main_process:
        run.folder.log(line)
    return line


def _closing_table(run: Run, screen: Screen) -> None:
    lines = run.folder.lines()
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
    spans = [f"steps {part[0]['step']}-{part[-1]['step']}" if tenth > 1 else f"step {part[0]['step']}" for part in parts]
    screen.table("training, first -> last", ("mean of", *spans), rows)
    root = run.folder.root
    screen.rows(
        "result",
        [
            ("adapter", str(root / ADAPTER_FILE)),
            ("load it", f'pipeline.load_lora_weights("{root}", weight_name="{ADAPTER_FILE}")'),
            ("all numbers", str(run.folder.metrics)),
            ("train on", "the same command with a larger --max_train_steps"),
        ],
    )


def _mean(lines: Sequence[dict[str, Any]], key: str) -> str:
    values = [line[key] for line in lines if line.get(key) is not None]
    return f"{sum(values) / len(values):.4f}" if values else "-"
