"""Where a run begins: what is known of it before any model is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

import crepatrain
from crepatrain.adapters.loading import load_initial_adapter
from crepatrain.config.sections import LoopConfig
from crepatrain.data.loader import StepSampler
from crepatrain.errors import UserError
from crepatrain.leftovers import remove_abandoned
from crepatrain.preparing.context import Context
from crepatrain.preparing.precompute import Caches, fill_caches, filled_caches, plan_caches
from crepatrain.preparing.preflight import Dataset, build_sampler, listed_clips, read_datasets, samples_digest, total_steps
from crepatrain.records.clip_lists import ListedClip, read_clip_list
from crepatrain.records.layout import RunLayout, step_of
from crepatrain.records.same_run import expect_same_fingerprint, split_of
from crepatrain.records.whole import expect_whole, resume_from
from crepatrain.training import build
from crepatrain.training.checkpoint_content import read_fingerprint, read_state
from crepatrain.training.schedule import build_schedule
from crepatrain.training.state import TrainState

_PACKAGES = ("torch", "diffusers", "peft", "accelerate", "transformers")


@dataclass(frozen=True, eq=False)
class RunStart:
    """Where a run begins, and on what.

    Attributes:
        resume: the checkpoint to go on from; None: from the beginning.
        total: optimizer steps of the whole run.
        adapter: lora_A and lora_B by layer, of init_adapter; None: a fresh one, or a checkpoint's.
        caches: of the clips that are trained on.
        held: the clips that are held out; None where none are.
        fingerprint: what the run is made from, beside its config.
        clips: every clip that is trained on, as the run's folder lists it.
        changed: what is different about the clips since the checkpoint, where that is allowed.
    """

    sampler: StepSampler
    state: TrainState
    resume: Path | None
    total: int
    adapter: Mapping[str, tuple[Tensor, Tensor]] | None
    caches: Caches
    held: Dataset | None
    fingerprint: Mapping[str, Any]
    clips: Sequence[Mapping[str, str]]
    changed: Sequence[str]

    @property
    def complete(self) -> bool:
        """Whether every optimizer step is done already."""
        return self.state.step >= self.total


def prepare_start(context: Context, processes: int, resume: Path | None) -> RunStart:
    """Read the clips and the checkpoint's plain files, and name every cache entry. Loads no model.

    Args:
        processes: that train together.
        resume: the checkpoint to go on from; None: from the beginning.

    Raises:
        UserError: clips that can't be used, a target of the adapter that is no layer of a block, a model that this device can't
            train, an init_adapter of another model or kind, or a checkpoint that is damaged or of another run.
        Stopped: a signal came.
    """
    plan, config = context.plan, context.plan.config
    if resume:
        expect_whole(resume, resume_from)
    dataset, held = read_datasets(context)
    family = build.build_family(plan)
    empty = build.expect_trainable(plan, family, context.device)
    initial = config.lora.init_adapter if config.model.model_type == "lora" and not resume else None
    adapter = load_initial_adapter(Path(initial), family, empty) if initial else None
    sampler = build_sampler(plan, dataset, processes)
    total = total_steps(plan, sampler)
    state = TrainState(schedule=build_schedule(config.crepa, total))
    if resume:
        state.load_state_dict(read_state(resume, step=step_of(resume), crepa=state.schedule is not None))
    caches = plan_caches(context, dataset, teacher=state.asks_teacher)
    fingerprint = _fingerprint(caches, held, sampler, total, _split(config.loop, processes))
    clips = listed_clips(plan, dataset)
    changed = _compare(fingerprint, resume, context, clips, state.step, sampler) if resume else []
    return RunStart(sampler, state, resume, total, adapter, caches, held, fingerprint, clips, changed)


def fill_all_caches(context: Context, start: RunStart) -> Caches | None:
    """Compute what is missing of the caches of what is trained on, and of what is held out.

    Returns:
        The caches of the held-out clips; None where none are.

    Raises:
        UserError: a model or a clip that can't be read, or a full disk or GPU.
        Stopped: a signal came; every entry written so far stays.
    """
    remove_abandoned(start.caches.store.root)
    fill_caches(context, start.caches)
    return None if start.held is None else filled_caches(context, start.held, teacher=start.state.asks_teacher)


def _split(config: LoopConfig, processes: int) -> dict[str, int]:
    return {
        "processes": processes,
        "train_batch_size": config.train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
    }


def _fingerprint(
    caches: Caches, held: Dataset | None, sampler: StepSampler, total: int, split: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "models": dict(caches.models),
        "samples": samples_digest(caches.dataset),
        "held_out": held and samples_digest(held),
        "unit": sampler.unit,
        "split": split,
        "windows": len(caches.dataset.clips.windows),
        "total": total,
        "versions": {"crepatrain": crepatrain.__version__} | {package: version(package) for package in _PACKAGES},
    }


def _compare(
    fingerprint: Mapping[str, Any],
    resume: Path,
    context: Context,
    clips: Sequence[Mapping[str, str]],
    step: int,
    sampler: StepSampler,
) -> list[str]:
    """Hold what the checkpoint was made from against what there is now.

    Returns:
        What is different about the clips, where that is allowed.
    """
    config, screen, before = context.plan.config, context.screen, read_fingerprint(resume)
    _compare_held_out(fingerprint, before, context)
    layout = RunLayout(Path(config.loop.output_dir))
    changed = expect_same_fingerprint(
        before,
        fingerprint,
        clips_before=read_clip_list(layout.clip_list(before["samples"])),
        clips_now=[ListedClip.model_validate(clip) for clip in clips],
        allowed=config.loop.allow_changes,
    )
    if changed:
        epoch, position, steps = sampler.place(step)
        screen.note(
            f"the clips or captions changed: {'; '.join(changed)}. The order of the data is that of the new ones from here on: "
            f"step {step} is step {position + 1} of {steps} of epoch {epoch + 1}, in which some clips may come "
            "twice and others not at all"
        )
    if config.lora.lora_dropout and split_of(before) not in (None, split_of(fingerprint)):
        screen.note(
            "the samples of a step are split otherwise than before: lora_dropout is drawn for every process and forward pass, so "
            "it is another one from here on"
        )
    total = before["total"]
    if step < fingerprint["total"] != total:
        screen.note(
            f"the run's length changed from {total} to {fingerprint['total']} steps: "
            "learning rate and CREPA weight, where they decay until the end, follow the new length from here on"
        )
    return changed


def _compare_held_out(fingerprint: Mapping[str, Any], before: Mapping[str, Any], context: Context) -> None:
    """What is held out may change where it comes from eval_data; but then the losses of before and after do not compare."""
    validation, held = context.plan.config.validation, fingerprint["held_out"]
    if held is None:
        return
    if "held_out" not in before:  # an earlier version wrote it
        if (
            validation.eval_share
            and before["samples"] != fingerprint["samples"]
            and "train_data" not in context.plan.config.loop.allow_changes
        ):
            raise UserError(
                f"eval_share={validation.eval_share:g}: the clips that are trained on are not those of this run's checkpoint. An "
                "earlier version wrote it, which held out other clips (this one takes exactly that share of them)",
                "give a new output_dir, or continue this run with the version that began it",
            )
        context.screen.note(
            f"the noise on held-out clips is that of eval_seed={validation.eval_seed} from here on: eval_loss does not compare "
            "with what an earlier version measured in this run, and best.json may name a checkpoint of before"
        )
    elif before["held_out"] not in (None, held):
        trained = "; clips that were trained on may be among them" if validation.eval_share else ""
        context.screen.note(
            "the held-out clips changed since this run's checkpoint: eval_loss does not compare with what was measured before, "
            f"and best.json may name a checkpoint of before{trained}"
        )


def expect_one_start(start: RunStart, accelerator: Accelerator) -> None:
    """All processes begin at the same step; those that share no disk may not.

    Raises:
        UserError: they don't.
    """
    steps = gather_object([start.state.step]) if accelerator.num_processes > 1 else [start.state.step]
    if len(set(steps)) > 1:
        raise UserError(
            f"the processes see checkpoints of steps {sorted(set(steps))}", "put output_dir on a disk that all nodes share"
        )
