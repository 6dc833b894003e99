"""Training, from a plan to an adapter."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import accelerate
import diffusers
import peft
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import crepatrain
from crepatrain.alignment.crepa import Crepa
from crepatrain.alignment.teachers import Teacher
from crepatrain.commands.export import write_adapter
from crepatrain.commands.precompute import Prepared, fill_caches, free_memory
from crepatrain.commands.preflight import Dataset, build_sampler, look_at_clips, total_steps
from crepatrain.commands.runfolder import ADAPTER_FILE, RunFolder
from crepatrain.commands.stopping import Stopped, StopSignal
from crepatrain.config.plan import Plan
from crepatrain.config.sections import RunConfig
from crepatrain.console import Screen
from crepatrain.data.loader import MicroBatches, StepSampler, TrainingSet, build_loader, keyed_generator
from crepatrain.errors import DivergedError, UserError
from crepatrain.families import get_family
from crepatrain.families.base import Family
from crepatrain.tensors import Batch
from crepatrain.training import build
from crepatrain.training.build import Learner
from crepatrain.training.checkpoint import read_plain, read_tensors, read_tree, rotate, write_checkpoint
from crepatrain.training.diffusion import FlowMatching
from crepatrain.training.lora import adapter_state, load_adapter_state
from crepatrain.training.metrics import StepNumbers, StepSums, Window
from crepatrain.training.optim import clip_gradients
from crepatrain.training.state import TrainState
from crepatrain.training.step import CrepaTerm, training_loss

_GIB = 1 << 30
_SMALLER = (
    "set gradient_checkpointing, or lower num_frames, height and width, train_batch_size or lora_rank; checkpoints are kept"
)


@dataclass(eq=False)
class Run:
    """Everything that one run holds.

    Attributes:
        transformer, crepa: as the forward calls them, wrapped where there are several processes; crepa is None where it is off.
        blocks, adapted, projector: of the bare modules.
        teacher: None where CREPA is off, or over for good.
        learners: the transformer's, and the projector's where there is one.
    """

    config: RunConfig
    family: Family
    process: FlowMatching
    accelerator: Accelerator
    folder: RunFolder
    fingerprint: dict[str, Any]
    transformer: nn.Module
    adapted: nn.Module
    blocks: nn.ModuleList
    crepa: nn.Module | None
    projector: Crepa | None
    teacher: Teacher | None
    learners: dict[str, Learner]
    state: TrainState
    sampler: StepSampler
    open_batches: Callable[[int], Iterator[Batch]]
    total: int
    window: Window = field(default_factory=Window)


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
            prepared = fill_caches(plan, dataset, screen, accelerator.device, stop)
        step = int(read_plain(resume, "state")["step"]) if resume else 0
        folder.claim(step)
        run = None
        try:
            run = _build(plan, screen, accelerator, folder, dataset, prepared, resume)
            _train(run, screen, stop)
        except Stopped as stopped:
            folder.status("stopped", run.state.step if run else step, str(stopped))
            raise
        except torch.OutOfMemoryError as error:
            reached = run.state.step if run else step
            folder.status("failed", reached, "out of GPU memory")
            raise UserError(f"out of GPU memory at step {reached + 1}", _SMALLER) from error
        except BaseException as error:
            folder.status("failed", run.state.step if run else step, f"{type(error).__name__}: {error}".splitlines()[0])
            raise
        folder.status("completed", run.state.step)
    _closing_table(run, screen)


def _build(
    plan: Plan,
    screen: Screen,
    accelerator: Accelerator,
    folder: RunFolder,
    dataset: Dataset,
    prepared: Prepared,
    resume: Path | None,
) -> Run:
    """The modules, and what a checkpoint says of them."""
    config = plan.config
    device = accelerator.device
    sampler = build_sampler(plan, dataset, accelerator.num_processes)
    total = total_steps(plan, sampler)
    state = TrainState(schedule=build.build_schedule(config, total))
    fingerprint = {
        "transformer": dataset.digests.folder(build.model_folder(plan) / "transformer"),
        "samples": prepared.digest,
        "unit": sampler.unit,
        "versions": _versions(),
    }
    dataset.digests.save()
    if resume:
        folder.check_fingerprint(read_plain(resume, "fingerprint"), fingerprint)
        state.load_state_dict(read_plain(resume, "state"))

    screen.say(f"loading the transformer of {config.pretrained_model_name_or_path}")
    family = get_family(config.model_family)
    torch.manual_seed(config.seed)
    adapted = build.build_transformer(plan, family, device)
    learners = {"transformer": build.build_learner(config, adapted, config.learning_rate, total)}
    crepa, projector, teacher = None, None, None
    if state.schedule:
        torch.manual_seed(config.seed + 1)  # the projector's own: the adapter begins the same with and without CREPA
        projector = build.build_crepa(plan).to(device)
        assert config.crepa_projector_lr is not None
        learners["projector"] = build.build_learner(config, projector, config.crepa_projector_lr, total)
        crepa = accelerator.prepare_model(projector)
        if not state.schedule.is_over(state.step):
            teacher = build.build_teacher(plan, family, device)
    run = Run(
        config=config,
        family=family,
        process=build.build_process(config),
        accelerator=accelerator,
        folder=folder,
        fingerprint=fingerprint,
        transformer=accelerator.prepare_model(adapted),
        adapted=adapted,
        blocks=family.blocks(adapted),
        crepa=crepa,
        projector=projector,
        teacher=teacher,
        learners=learners,
        state=state,
        sampler=sampler,
        open_batches=_batch_source(plan, dataset, prepared, sampler, state, accelerator),
        total=total,
    )
    if resume:
        _restore(run, resume)
        screen.say(f"going on from {resume} at step {state.step} of {total}")
    return run


def _versions() -> dict[str, str]:
    modules = (crepatrain, torch, diffusers, peft, accelerate)
    return {module.__name__: str(module.__version__) for module in modules}


def _batch_source(
    plan: Plan, dataset: Dataset, prepared: Prepared, sampler: StepSampler, state: TrainState, accelerator: Accelerator
) -> Callable[[int], Iterator[Batch]]:
    """What opens a stream of micro-batches at a step.

    The stream reads features for the steps whose score is needed, as far as is known when it is opened, so it is opened anew when
    CREPA is cut off or comes back.
    """
    config = plan.config
    family = get_family(config.model_family)
    process = build.build_process(config)
    assert config.fps is not None

    def open_batches(step: int) -> Iterator[Batch]:
        schedule = copy.deepcopy(state.schedule)
        training_set = TrainingSet(
            samples=prepared.samples,
            store=prepared.store,
            empty_text=prepared.empty_text,
            caption_dropout=config.caption_dropout,
            seed=config.seed,
            fps=config.fps or 0.0,
            draw_sigma=process.draw_sigma,
            collate_text=family.collate_text,
            grids=dataset.grids,
            teacher_grids=prepared.teacher_grids,
            needs_teacher=schedule.needs_score if schedule else _never,
        )
        batches = MicroBatches(
            sampler,
            start=step,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            batch_size=config.train_batch_size,
        )
        workers = config.dataloader_num_workers
        loader = build_loader(training_set, batches, workers=workers, pin_memory=accelerator.device.type == "cuda")
        return iter(loader)

    return open_batches


def _never(_step: int) -> bool:
    return False


def _train(run: Run, screen: Screen, stop: StopSignal) -> None:
    """The loop."""
    state = run.state
    if state.step >= run.total:
        screen.say(f"this run is complete: {state.step} steps. Raise max_train_steps to go on")
        return
    batches = run.open_batches(state.step)
    saved_at = state.step
    with screen.training(state.step, run.total) as view:
        while state.step < run.total:
            began = time.perf_counter()
            was_off = state.schedule is not None and state.schedule.cutoff
            line, stopping = _optimizer_step(run, batches, stop)
            if state.schedule is not None and state.schedule.cutoff != was_off:
                _cut_or_return(run)
                batches = run.open_batches(state.step)
            run.window.add(step_seconds=time.perf_counter() - began)
            last = stopping or state.step == run.total
            if state.step % run.config.logging_steps == 0 or last:
                view.log(_log(run, line))
            view.step(state.step)
            if state.step % run.config.checkpointing_steps == 0 or last:
                _save(run)
                saved_at = state.step
            if stopping:
                break
    if stop.requested:
        raise Stopped(f"saved at step {saved_at}; the same command goes on from there")


def _optimizer_step(run: Run, batches: Iterator[Batch], stop: StopSignal) -> tuple[dict[str, Any], bool]:
    """One optimizer step over all its micro-batches; nothing moves if a number is not finite.

    Returns:
        What only the last step of a logging window tells, and whether any process was asked to stop.
    """
    config, state, schedule = run.config, run.state, run.state.schedule
    weight = schedule.weight(state.step) if schedule else 0.0
    measured = schedule is not None and schedule.needs_score(state.step)
    layersync = build.build_layersync(config)
    rank = run.accelerator.process_index
    torch.manual_seed(keyed_generator("dropout", config.seed, state.step, rank).initial_seed())

    term = None
    if measured:
        assert run.crepa is not None
        assert run.teacher is not None
        assert config.crepa_block_index is not None
        term = CrepaTerm(run.crepa, run.teacher, config.crepa_block_index, weight)
    sums, clips = StepSums(), []
    for micro in range(config.gradient_accumulation_steps):
        batch = next(batches)
        clips += batch.keys
        batch = batch.to(run.accelerator.device)
        with _gradients_shared_at_the_end(run, last=micro == config.gradient_accumulation_steps - 1):
            with build.autocast(config, run.accelerator.device):
                losses = training_loss(run.family, run.process, run.transformer, run.blocks, batch, term, layersync)
            run.accelerator.backward(losses.total / config.gradient_accumulation_steps)
        sums.add(losses)

    norms = [clip_gradients(learner.parameters, config.max_grad_norm) for learner in run.learners.values()]
    numbers, norm_values, stopping = _read(run, sums, norms, stop, measured=measured, layersync=layersync is not None)
    loss = numbers.total(weight, config.layersync_lambda)
    if not all(map(math.isfinite, (loss, *norm_values))):
        raise DivergedError(_diverged(run, loss, norm_values, clips))
    last = {
        "learning_rate": run.learners["transformer"].learning_rate,
        "crepa_weight": weight if schedule else None,
        "crepa_cutoff": schedule.is_off(state.step) if schedule else None,
    }
    for learner in run.learners.values():
        learner.step()
    if schedule and measured:
        score = numbers.self_similarity if config.crepa_threshold_metric == "self" else numbers.alignment
        assert score is not None
        schedule.observe(score)
    run.window.add(
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


@contextlib.contextmanager
def _gradients_shared_at_the_end(run: Run, *, last: bool) -> Iterator[None]:
    """Several processes exchange gradients in the last micro-batch only."""
    with contextlib.ExitStack() as stack:
        for module in (run.transformer, run.crepa):
            if module is not None and not last:
                stack.enter_context(run.accelerator.no_sync(module))
        yield


def _read(
    run: Run, sums: StepSums, norms: list[Tensor], stop: StopSignal, *, measured: bool, layersync: bool
) -> tuple[StepNumbers, list[float], bool]:
    """Every number of a step over all processes, in one packed copy from the device."""
    packed = sums.packed()
    asked = packed.new_tensor([float(stop.requested)])
    packed = torch.cat([packed, torch.stack(norms).to(packed), asked])
    if run.accelerator.num_processes > 1:
        packed = cast("Tensor", run.accelerator.reduce(packed, reduction="mean"))
    values = packed.tolist()
    count = len(values) - 1 - len(norms)
    numbers = StepNumbers.of(values[:count], crepa=measured, layersync=layersync)
    return numbers, values[count:-1], values[-1] > 0


def _diverged(run: Run, loss: float, norms: Sequence[float], clips: Sequence[str]) -> str:
    saved = sorted(run.folder.checkpoints.glob("step-*[0-9]"))
    good = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    listed = ", ".join(f"{norm:g}" for norm in norms)
    return (
        f"step {run.state.step + 1}: loss {loss:g}, gradient norms {listed}, on {', '.join(clips)}.\n"
        f"  -> The weights were not changed; {good}. Lower learning_rate, or look at those clips."
    )


def _cut_or_return(run: Run) -> None:
    """After the cutoff has changed: let go of a teacher that will not be asked again."""
    schedule = run.state.schedule
    assert schedule is not None
    if schedule.is_over(run.state.step) and run.teacher is not None:
        run.teacher = None
        free_memory()


def _log(run: Run, last: dict[str, Any]) -> dict[str, Any]:
    means = run.window.take()
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


def _save(run: Run) -> None:
    """A checkpoint, its small adapter, and the run's last adapter."""
    if run.accelerator.is_main_process:
        step = run.state.step
        tensors = {"adapter": adapter_state(run.adapted)}
        if run.projector:
            tensors["projector"] = run.projector.state_dict()
        write_checkpoint(
            run.folder.checkpoints / f"step-{step:06d}",
            tensors,
            trees={f"{name}_learner": learner.state_dict() for name, learner in run.learners.items()},
            plain={"state": run.state.state_dict(), "fingerprint": run.fingerprint},
        )
        rotate(run.folder.checkpoints, run.config.checkpoints_total_limit)
        small = run.folder.adapters / f"{run.config.output_name}-{step:06d}.safetensors"
        for path in (small, run.folder.root / ADAPTER_FILE):
            write_adapter(path, run.family, run.adapted, step)
        run.folder.status("running", step)
    run.accelerator.wait_for_everyone()


def _restore(run: Run, checkpoint: Path) -> None:
    load_adapter_state(run.adapted, read_tensors(checkpoint, "adapter"))
    if run.projector:
        run.projector.load_state_dict(read_tensors(checkpoint, "projector"))
    for name, learner in run.learners.items():
        learner.load_state_dict(read_tree(checkpoint, f"{name}_learner"))


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
