"""One run in memory: its modules, their optimizers and state, put together from a plan and a start."""

import contextlib
import copy
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from crepatrain.alignment.crepa import Crepa
from crepatrain.alignment.teachers import Teacher
from crepatrain.config.plan import Plan
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.data.loader import MicroBatches, StepSampler, TrainingSet
from crepatrain.data.readers import read_batches
from crepatrain.families.base import Family
from crepatrain.placement.placing import place, set_attention
from crepatrain.placement.processes import wrap
from crepatrain.preparing.context import Context
from crepatrain.preparing.precompute import Caches
from crepatrain.records.events import Events, Logged
from crepatrain.records.layout import checkpoints
from crepatrain.records.runfolder import RunFolder
from crepatrain.running.start import RunStart
from crepatrain.tensors import Batch
from crepatrain.training import build
from crepatrain.training.checkpoint import optimizer_file, weights_file
from crepatrain.training.checkpoint_content import read_optimizer, read_trained, read_weights
from crepatrain.training.diffusion import FlowMatching
from crepatrain.training.ema import WeightAverage
from crepatrain.training.lora import copy_into_adapter, load_trained_state
from crepatrain.training.optim import build_scheduled_optimizer
from crepatrain.training.state import TrainState
from crepatrain.training.step import LayerSyncTerm
from crepatrain.training.trained import Trained


@dataclass(eq=False)
class Run:
    """Everything that one run holds.

    Attributes:
        models: what is trained, by the name that its files have in a checkpoint: the transformer, and CREPA's projector where
            CREPA is on.
        teacher: None where CREPA is off, or over for good.
        open_batches: opens the endless stream of micro-batches at an optimizer step.
        total: optimizer steps of the whole run.
        saved: the optimizer step of the last checkpoint.
        diverged: scalar on the device, 1 from the first number on that was not finite: no optimizer moves a weight then.
        peak: bytes that training held at most; what is held between two steps, as for a video, does not count.
        moving: whether the optimizers are at work, so that the weights are between two steps.
    """

    context: Context
    accelerator: Accelerator
    folder: RunFolder
    events: Events
    fingerprint: Mapping[str, Any]
    family: Family
    process: FlowMatching
    models: dict[str, Trained]
    teacher: Teacher | None
    layersync: LayerSyncTerm | None
    state: TrainState
    sampler: StepSampler
    open_batches: Callable[[int], Generator[Batch]]
    total: int
    saved: int
    diverged: Tensor
    peak: int = 0
    moving: bool = False

    @property
    def config(self) -> ResolvedConfig:
        return self.context.plan.config

    @property
    def transformer(self) -> Trained:
        return self.models["transformer"]

    @property
    def blocks(self) -> nn.ModuleList:
        """Of the transformer."""
        assert self.transformer.blocks is not None
        return self.transformer.blocks

    @property
    def projector(self) -> Crepa | None:
        """Bare; None where CREPA is off."""
        return cast("Crepa", self.models["projector"].module) if "projector" in self.models else None

    @property
    def several(self) -> bool:
        """Whether several processes train together, and have to do everything alike."""
        return self.accelerator.num_processes > 1

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, and pass it on to the subscribers."""
        self.folder.log(line)
        self.events.emit(Logged(line))

    def last_good(self) -> str:
        """A sentence that names the last checkpoint before the numbers were no longer finite."""
        saved = checkpoints(self.folder.checkpoints)
        return f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"

    @contextlib.contextmanager
    def apart_from_training(self) -> Iterator[None]:
        """Within it the weights are the run's result, with use_ema their average; memory held does not count as training's."""
        self.measure_peak()
        try:
            with contextlib.ExitStack() as stack:
                for model in self.models.values():
                    if model.average:
                        stack.enter_context(model.average.in_place())
                yield
        finally:
            if self.context.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()

    def measure_peak(self) -> int | None:
        """Bytes that training has held at most so far; None where there is no GPU."""
        if self.context.device.type != "cuda":
            return None
        self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        return self.peak


def build_run(context: Context, accelerator: Accelerator, folder: RunFolder, events: Events, start: RunStart) -> Run:
    """Load the modules, adapt and place them, give them optimizers, and put a checkpoint's tensors into all of these."""
    plan, config, state, screen = context.plan, context.plan.config, start.state, context.screen
    screen.say(f"loading the transformer of {config.model.pretrained_model_name_or_path}")
    family = build.build_family(plan)
    process = build.build_process(plan)
    torch.manual_seed(config.loop.seed)
    transformer = build.load_transformer(plan, family, context.device)
    build.adapt(plan, family, transformer)
    if start.adapter:
        copy_into_adapter(transformer, start.adapter)
        screen.say(f"starting from the adapter {config.lora.init_adapter}")
    set_attention(config.loop, family, transformer)
    place(config.loop, family, transformer, context.device)
    if config.loop.compile:
        screen.note(
            "the blocks are compiled in the first step, and once more for a second bucket: that takes minutes, the rest is faster"
        )
    models = {"transformer": _trained(context, accelerator, transformer, config.optim.learning_rate, start.total)}
    models["transformer"].blocks = family.blocks(transformer)
    if config.optim.use_ema:
        models["transformer"].average = WeightAverage(models["transformer"].optimizer.parameters, config.optim.ema_decay)
    if state.schedule:
        torch.manual_seed(config.loop.seed + 1)  # the projector's own: the adapter begins the same with and without CREPA
        projector = build.build_crepa(plan).to(context.device)
        models["projector"] = _trained(context, accelerator, projector, config.crepa.projector_lr, start.total)
    if start.resume:
        _restore(start.resume, models)
        screen.say(f"continuing from {start.resume} at step {state.step} of {start.total}")
    return Run(
        context=context,
        accelerator=accelerator,
        folder=folder,
        events=events,
        fingerprint=start.fingerprint,
        family=family,
        process=process,
        models=models,
        teacher=build.build_teacher(plan, family, context.device) if state.asks_teacher else None,
        layersync=build.build_layersync(config.layersync),
        state=state,
        sampler=start.sampler,
        open_batches=_batch_source(plan, family, start, accelerator),
        total=start.total,
        saved=state.step,
        diverged=torch.zeros((), device=context.device),
    )


def _trained(context: Context, accelerator: Accelerator, module: nn.Module, learning_rate: float, total: int) -> Trained:
    """Wrap a module that is placed, then give what of it is trained an optimizer."""
    wrapper = wrap(accelerator, module)
    return Trained(module, wrapper, build_scheduled_optimizer(context.plan.config.optim, module, learning_rate, total))


def restore_modules(checkpoint: Path, transformer: nn.Module, projector: nn.Module | None, *, average: bool = False) -> None:
    """Put a checkpoint's tensors into modules that are built.

    Args:
        transformer: adapted where an adapter is trained.
        projector: None where CREPA is off.
        average: whether the transformer gets the average of its weights rather than the weights.

    Raises:
        UserError: the checkpoint is damaged, or of another run.
    """
    load_trained_state(transformer, read_trained(checkpoint, transformer, average=average))
    if projector:
        projector.load_state_dict(read_weights(checkpoint, weights_file("projector"), projector))


def _restore(checkpoint: Path, models: Mapping[str, Trained]) -> None:
    """Put a checkpoint's tensors into modules, optimizers and averages that are built."""
    transformer = models["transformer"]
    restore_modules(checkpoint, transformer.module, models["projector"].module if "projector" in models else None)
    for name, model in models.items():
        own = model.optimizer
        own.load_state_dict(read_optimizer(checkpoint, optimizer_file(name), own.optimizer, own.lr_scheduler))
    if transformer.average:
        with transformer.average.in_place():
            load_trained_state(transformer.module, read_trained(checkpoint, transformer.module, average=True))


def _batch_source(plan: Plan, family: Family, start: RunStart, accelerator: Accelerator) -> Callable[[int], Generator[Batch]]:
    """What opens a stream of micro-batches at a step.

    A stream reads features for the steps whose score is needed, as far as is known when it is opened; so it is opened anew when
    CREPA is cut off or comes back.
    """
    config = plan.config

    def open_batches(step: int) -> Generator[Batch]:
        schedule = copy.deepcopy(start.state.schedule)
        training_set = build_training_set(plan, family, start.caches, schedule.needs_score if schedule else _never)
        batches = MicroBatches(
            start.sampler,
            start=step,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            batch_size=config.loop.train_batch_size,
        )
        cuda = accelerator.device.type == "cuda"
        return read_batches(training_set, batches, workers=config.data.dataloader_num_workers, pin_memory=cuda)

    return open_batches


def _never(_step: int) -> bool:
    return False


def build_training_set(
    plan: Plan, family: Family, caches: Caches, needs_teacher: Callable[[int], bool], *, drops: bool = True
) -> TrainingSet:
    """What reads the samples of a run.

    Args:
        needs_teacher: whether the teacher's features are read for an optimizer step.
        drops: whether captions and first frames are dropped as often as the config asks for; False: never.
    """
    config = plan.config
    return TrainingSet(
        samples=caches.samples,
        store=caches.store,
        empty_text=caches.empty_text,
        caption_dropout=config.data.caption_dropout if drops else 0.0,
        captions_drop_together=not plan.spec.text_is_padded,
        image_dropout=config.data.i2v_dropout if drops else 0.0,
        seed=config.loop.seed,
        fps=plan.fps,
        draw_sigma={bucket: build.build_process(plan, grid.tokens).draw_sigma for bucket, grid in caches.dataset.grids.items()},
        collate_text=family.collate_text,
        grids=caches.dataset.grids,
        teacher_grids=caches.teacher_grids,
        needs_teacher=needs_teacher,
    )
