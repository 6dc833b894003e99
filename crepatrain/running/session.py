"""One run in memory: put together from a plan, taken up from a checkpoint, saved to one."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import crepatrain
from crepatrain.adapters.checks import adapter_to_begin_with
from crepatrain.adapters.writing import write_result
from crepatrain.alignment.crepa import Crepa
from crepatrain.alignment.teachers import Teacher
from crepatrain.config.plan import Plan
from crepatrain.config.sections import RunConfig
from crepatrain.data.loader import MicroBatches, StepSampler, TrainingSet, read_batches
from crepatrain.families.base import Family
from crepatrain.placement.placing import place
from crepatrain.placement.processes import wrap
from crepatrain.preparing.precompute import Caches
from crepatrain.preparing.preflight import Dataset, build_sampler, samples_digest, total_steps
from crepatrain.records.reading import read_best
from crepatrain.records.runfolder import RunFolder
from crepatrain.screen import Screen
from crepatrain.tensors import Batch
from crepatrain.training import build
from crepatrain.training.checkpoint import (
    EMA_FILE,
    TRAINED_FILE,
    checkpoints,
    read_plain,
    read_tensors,
    read_tree,
    readable,
    rotate,
    write_checkpoint,
)
from crepatrain.training.diffusion import FlowMatching
from crepatrain.training.ema import WeightAverage
from crepatrain.training.lora import begin_with, load_trained_state, trained_state
from crepatrain.training.optim import ScheduledOptimizer, build_scheduled_optimizer
from crepatrain.training.state import TrainState
from crepatrain.training.step import LayerSyncTerm


@dataclass(frozen=True, eq=False)
class Start:
    """Where a run begins.

    Attributes:
        resume: the checkpoint to go on from; None: from the beginning.
        total: optimizer steps of the whole run.
        adapter: lora_A and lora_B by layer, of init_adapter; None: a fresh one, or a checkpoint's.
    """

    sampler: StepSampler
    state: TrainState
    resume: Path | None
    total: int
    adapter: Mapping[str, tuple[Tensor, Tensor]] | None


def prepare_start(plan: Plan, dataset: Dataset, world: int, device: torch.device, resume: Path | None) -> Start:
    """What can be known of a run's beginning before any model is read.

    Raises:
        UserError: a target of the adapter that is no layer of a block, a model that this device can't train, or an init_adapter
            of another model or kind.
    """
    config, family = plan.config, build.build_family(plan)
    empty = build.expect_trainable(plan, family, device)
    begins = config.init_adapter if config.model_type == "lora" and not resume else None
    adapter = adapter_to_begin_with(Path(begins), family, empty) if begins else None
    sampler = build_sampler(plan, dataset, world)
    total = total_steps(plan, sampler)
    state = TrainState(schedule=build.build_schedule(config, total))
    if resume:
        with readable(resume):
            state.load_state_dict(read_plain(resume, "state"))
    return Start(sampler, state, resume, total, adapter)


def take_fingerprint(dataset: Dataset, caches: Caches, start: Start) -> dict[str, Any]:
    """What a run is made from, beside its config."""
    packages = ("torch", "diffusers", "peft", "accelerate", "transformers")
    return {
        "models": dict(caches.models),
        "samples": samples_digest(dataset),
        "unit": start.sampler.unit,
        "windows": len(dataset.cut.windows),
        "total": start.total,
        "versions": {"crepatrain": crepatrain.__version__} | {package: version(package) for package in packages},
    }


@dataclass(eq=False)
class Run:
    """Everything that one run holds.

    Attributes:
        transformer, crepa: as the forward calls them, wrapped where there are several processes; crepa is None where it is off.
        adapted, blocks, projector: of the bare modules.
        teacher: None where CREPA is off, or over for good.
        learners: the transformer's, and the projector's where there is one.
        open_batches: opens the endless stream of micro-batches at an optimizer step.
        average: of the transformer's trained weights; None without use_ema.
        peak: bytes that training held at most, of what was looked at on the way apart.
        moving: whether the optimizers are at work, so that the weights are between two steps.
        diverged: scalar on the device, 1 from the first number on that was not finite: no optimizer moves a weight then.
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
    layersync: LayerSyncTerm | None
    learners: dict[str, ScheduledOptimizer]
    state: TrainState
    sampler: StepSampler
    open_batches: Callable[[int], Iterator[Batch]]
    total: int
    diverged: Tensor
    average: WeightAverage | None = None
    peak: int = 0
    moving: bool = False

    def last_good(self) -> str:
        """Where the last weights are whose numbers were finite, in words."""
        saved = checkpoints(self.folder.checkpoints)
        return f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"

    @contextlib.contextmanager
    def result(self) -> Iterator[None]:
        """Within it the transformer has the weights that the run hands out: their average where there is one."""
        with self.average.in_place() if self.average else contextlib.nullcontext():
            yield


def build_run(
    plan: Plan,
    screen: Screen,
    accelerator: Accelerator,
    folder: RunFolder,
    dataset: Dataset,
    caches: Caches,
    start: Start,
    fingerprint: dict[str, Any],
) -> Run:
    """Load the modules, and put a checkpoint's tensors into them."""
    config, state, device = plan.config, start.state, accelerator.device
    screen.say(f"loading the transformer of {config.pretrained_model_name_or_path}")
    family = build.build_family(plan)
    process = build.build_process(plan)
    torch.manual_seed(config.seed)
    adapted = build.load_transformer(plan, family)
    build.adapt(plan, family, adapted)
    if start.adapter:
        begin_with(adapted, start.adapter)
        screen.say(f"beginning with {config.init_adapter}")
    place(config, adapted, family.blocks(adapted), device)
    transformer = wrap(accelerator, adapted)
    learners = {"transformer": build_scheduled_optimizer(config, adapted, config.learning_rate, start.total)}
    if config.compile:
        screen.note(
            "the blocks are compiled in the first step, and once more for a second bucket: that takes minutes, the rest is faster"
        )
    projector = crepa = None
    if state.schedule:
        torch.manual_seed(config.seed + 1)  # the projector's own: the adapter begins the same with and without CREPA
        projector = build.build_crepa(plan).to(device)
        crepa = wrap(accelerator, projector)
        assert config.crepa_projector_lr is not None
        learners["projector"] = build_scheduled_optimizer(config, projector, config.crepa_projector_lr, start.total)
    average = WeightAverage(learners["transformer"].parameters, config.ema_decay) if config.use_ema else None
    if start.resume:
        restore(start.resume, config, adapted, projector, learners)
        if average:
            with average.in_place():
                load_trained_state(adapted, read_tensors(start.resume, EMA_FILE))
        screen.say(f"going on from {start.resume} at step {state.step} of {start.total}")
    return Run(
        config=config,
        family=family,
        process=process,
        accelerator=accelerator,
        folder=folder,
        fingerprint=fingerprint,
        transformer=transformer,
        adapted=adapted,
        blocks=family.blocks(adapted),
        crepa=crepa,
        projector=projector,
        teacher=build.build_teacher(plan, family, device) if state.asks_teacher else None,
        layersync=build.build_layersync(config),
        learners=learners,
        state=state,
        sampler=start.sampler,
        open_batches=_batch_source(plan, family, process, dataset, caches, start, accelerator),
        total=start.total,
        diverged=torch.zeros((), device=device),
        average=average,
    )


def _batch_source(
    plan: Plan,
    family: Family,
    process: FlowMatching,
    dataset: Dataset,
    caches: Caches,
    start: Start,
    accelerator: Accelerator,
) -> Callable[[int], Iterator[Batch]]:
    """What opens a stream of micro-batches at a step.

    A stream reads features for the steps whose score is needed, as far as is known when it is opened; so it is opened anew when
    CREPA is cut off or comes back.
    """
    config = plan.config

    def open_batches(step: int) -> Iterator[Batch]:
        schedule = copy.deepcopy(start.state.schedule)
        training_set = build_training_set(plan, family, process, dataset, caches, schedule.needs_score if schedule else _never)
        batches = MicroBatches(
            start.sampler,
            start=step,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            batch_size=config.train_batch_size,
        )
        cuda = accelerator.device.type == "cuda"
        return read_batches(training_set, batches, workers=config.dataloader_num_workers, pin_memory=cuda)

    return open_batches


def _never(_step: int) -> bool:
    return False


def build_training_set(
    plan: Plan,
    family: Family,
    process: FlowMatching,
    dataset: Dataset,
    caches: Caches,
    needs_teacher: Callable[[int], bool],
) -> TrainingSet:
    """What reads the samples of a run as training sees them."""
    config = plan.config
    assert config.fps is not None
    return TrainingSet(
        samples=caches.samples,
        store=caches.store,
        empty_text=caches.empty_text,
        caption_dropout=config.caption_dropout,
        captions_drop_together=not plan.spec.text_is_padded,
        image_dropout=config.i2v_dropout,
        seed=config.seed,
        fps=config.fps,
        draw_sigma=process.draw_sigma,
        collate_text=family.collate_text,
        grids=dataset.grids,
        teacher_grids=caches.teacher_grids,
        needs_teacher=needs_teacher,
    )


def save(run: Run) -> None:
    """A checkpoint, its small adapter, and the run's last adapter."""
    if run.accelerator.is_main_process:
        step = run.state.step
        # The result first: a kill in between then leaves no checkpoint without it.
        tensors = {TRAINED_FILE[run.config.model_type]: trained_state(run.adapted)}
        with run.result():
            write_result(run.folder, run.config, run.family, run.fingerprint, run.adapted, step)
            if run.average:
                tensors[EMA_FILE] = {name: tensor.clone() for name, tensor in trained_state(run.adapted).items()}
        if run.projector:
            tensors["projector"] = run.projector.state_dict()
        write_checkpoint(
            run.folder.checkpoints / f"step-{step:06d}",
            tensors,
            trees={f"{name}_learner": learner.state_dict() for name, learner in run.learners.items()},
            plain={"state": run.state.state_dict(), "fingerprint": run.fingerprint},
        )
        rotate(run.folder.checkpoints, run.config.checkpoints_total_limit, keep=read_best(run.folder.root).get("step"))
        run.folder.status("running", step)
    run.accelerator.wait_for_everyone()


def restore(
    checkpoint: Path, config: RunConfig, adapted: nn.Module, projector: Crepa | None, learners: Mapping[str, ScheduledOptimizer]
) -> None:
    """Put a checkpoint's tensors into modules and optimizers that are built."""
    with readable(checkpoint):
        load_trained_state(adapted, read_tensors(checkpoint, TRAINED_FILE[config.model_type]))
        if projector:
            projector.load_state_dict(read_tensors(checkpoint, "projector"))
        for name, learner in learners.items():
            learner.load_state_dict(read_tree(checkpoint, f"{name}_learner"))
