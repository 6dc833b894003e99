"""Where a run begins: what is known of it before any model is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

import crepatrain
from crepatrain.adapters.loading import load_initial_adapter
from crepatrain.data.loader import StepSampler
from crepatrain.errors import UserError
from crepatrain.preparing.context import Context
from crepatrain.preparing.precompute import Caches, fill_caches, filled_caches, plan_caches
from crepatrain.preparing.preflight import Dataset, build_sampler, read_datasets, samples_digest, total_steps
from crepatrain.records.layout import step_of
from crepatrain.records.same_run import expect_same_fingerprint
from crepatrain.records.whole import expect_whole, resume_from
from crepatrain.training import build
from crepatrain.training.checkpoint_content import read_fingerprint, read_state
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
    """

    sampler: StepSampler
    state: TrainState
    resume: Path | None
    total: int
    adapter: Mapping[str, tuple[Tensor, Tensor]] | None
    caches: Caches
    held: Dataset | None
    fingerprint: Mapping[str, Any]

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
    state = TrainState(schedule=build.build_schedule(config.crepa, total))
    if resume:
        state.load_state_dict(read_state(resume, step=step_of(resume), crepa=state.schedule is not None))
    caches = plan_caches(context, dataset, teacher=state.asks_teacher)
    fingerprint = _fingerprint(caches, held, sampler, total)
    if resume:
        _compare(fingerprint, resume, context, goes_on=state.step < total)
    return RunStart(sampler, state, resume, total, adapter, caches, held, fingerprint)


def fill_all_caches(context: Context, start: RunStart) -> Caches | None:
    """Compute what is missing of the caches of what is trained on, and of what is held out.

    Returns:
        The caches of the held-out clips; None where none are.

    Raises:
        UserError: a model or a clip that can't be read, or a full disk or GPU.
        Stopped: a signal came; every entry written so far stays.
    """
    fill_caches(context, start.caches)
    return None if start.held is None else filled_caches(context, start.held, teacher=start.state.asks_teacher)


def _fingerprint(caches: Caches, held: Dataset | None, sampler: StepSampler, total: int) -> dict[str, Any]:
    return {
        "models": dict(caches.models),
        "samples": samples_digest(caches.dataset),
        "held_out": held and samples_digest(held),
        "unit": sampler.unit,
        "windows": len(caches.dataset.clips.windows),
        "total": total,
        "versions": {"crepatrain": crepatrain.__version__} | {package: version(package) for package in _PACKAGES},
    }


def _compare(fingerprint: Mapping[str, Any], resume: Path, context: Context, *, goes_on: bool) -> None:
    """Hold what the checkpoint was made from against what there is now."""
    before = read_fingerprint(resume)
    _compare_held_out(fingerprint, before, context)
    expect_same_fingerprint(before, fingerprint)
    total = before["total"]
    if goes_on and total != fingerprint["total"]:
        context.screen.note(
            f"the run's length changed from {total} to {fingerprint['total']} steps: "
            "learning rate and CREPA weight, where they decay until the end, follow the new length from here on"
        )


def _compare_held_out(fingerprint: Mapping[str, Any], before: Mapping[str, Any], context: Context) -> None:
    """What is held out may change where it comes from eval_data; but then the losses of before and after do not compare."""
    validation, held = context.plan.config.validation, fingerprint["held_out"]
    if held is None:
        return
    if "held_out" not in before:  # an earlier version wrote it
        if validation.eval_share and before["samples"] != fingerprint["samples"]:
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
        context.screen.note(
            "the held-out clips changed since this run's checkpoint: eval_loss does not compare with what was measured before, "
            "and best.json may name a checkpoint of before"
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
