"""Is the GPU large enough? Tried before the first step, and compared with the estimate after the last."""

import contextlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from crepatrain.data.buckets import Bucket
from crepatrain.errors import UserError
from crepatrain.memory.estimate import estimate_memory, largest_bucket
from crepatrain.memory.stages import GIB, training_stage
from crepatrain.placement.placing import free_memory
from crepatrain.placement.precision import autocast
from crepatrain.placement.states import empty_states, empty_temporaries
from crepatrain.preparing.context import Context
from crepatrain.running.session import Run
from crepatrain.training import build
from crepatrain.training.step import training_loss

SMALLER = "set memory to auto, or lower num_frames, height and width, train_batch_size or lora_rank; checkpoints are kept"
"""What a user can do where a step does not fit."""


def rehearse(run: Run, buckets: Sequence[Bucket]) -> None:
    """One forward and backward on the largest clips. No weight, no optimizer and no random number of the run is touched.

    Raises:
        UserError: it does not fit; with what would.
    """
    plan = run.context.plan
    largest = largest_bucket(plan, buckets)
    run.context.screen.say(f"rehearsing a step on the largest clips, {largest}")
    try:
        with torch.random.fork_rng(devices=_random_devices(run)):
            _step(run, largest)
    except torch.OutOfMemoryError:
        _give_back(run)
        raise _does_not_fit(run, largest) from None
    _give_back(run)
    if run.config.validation.validation_prompts:
        _rehearse_decoding(run)


def _random_devices(run: Run) -> list[torch.device]:
    return [run.context.device] if run.context.device.type == "cuda" else []


def _rehearse_decoding(run: Run) -> None:
    """The decoding of a validation video, which may hold more than a step.

    Raises:
        UserError: it does not fit.
    """
    plan, device, frames = run.context.plan, run.context.device, run.context.plan.size
    latent = (1, plan.geometry.latent_channels, *plan.geometry.latent_shape(*frames))
    run.context.screen.say("rehearsing the decoding of a validation video")
    try:
        vae = build.build_vae(plan, run.family, device)
        with torch.random.fork_rng(devices=_random_devices(run)), torch.no_grad(), autocast(run.config.loop, device):
            run.family.decode_latents(vae, torch.zeros(latent, device=device))
    except torch.OutOfMemoryError:
        raise UserError(
            f"validation_prompts: out of GPU memory while a video of {frames[0]} x {frames[1]} x {frames[2]} was decoded",
            "set vae_dtype to bfloat16, lower num_frames, height and width, or leave validation_prompts out; "
            "nothing was trained yet",
        ) from None
    finally:
        free_memory()


def _step(run: Run, bucket: Bucket) -> None:
    config, schedule, device = run.config, run.state.schedule, run.context.device
    step = _step_of(run, bucket)
    states = [] if run.state.step else _room_for_states(run)
    with contextlib.closing(run.open_batches(step)) as batches:
        batch = next(batches).to(device)
    crepa = None
    if run.teacher is not None and schedule is not None and schedule.needs_score(step):
        crepa = build.crepa_term(config.crepa, run.models["projector"].wrapper, run.teacher, config.crepa.crepa_lambda)
    with autocast(config.loop, device):
        losses = training_loss(run.family, run.process, run.transformer.wrapper, run.blocks, batch, crepa, run.layersync)
    run.accelerator.backward(losses.total)
    del losses
    _held_in_step = [empty_temporaries(run.config.optim.optimizer, model.optimizer.parameters) for model in run.models.values()]
    del states


def _step_of(run: Run, bucket: Bucket) -> int:
    """A step with clips of that size, of the next two epochs one that asks the teacher where there is one."""
    schedule, begin = run.state.schedule, run.state.step
    steps = (step for step in itertools.count(begin) if run.sampler.bucket(step) == bucket)
    first = next(steps)  # clips of a small weight come in a later epoch
    near = itertools.takewhile(lambda step: step < begin + 2 * run.sampler.steps_per_epoch, itertools.chain([first], steps))
    return next((step for step in near if schedule is not None and schedule.needs_score(step)), first)


def _room_for_states(run: Run) -> list[Tensor]:
    """As much memory as the optimizers will take when they first move."""
    parameters = [parameter for model in run.models.values() for parameter in model.optimizer.parameters]
    return empty_states(run.config.optim.optimizer, parameters)


def _give_back(run: Run) -> None:
    for model in run.models.values():
        model.optimizer.optimizer.zero_grad(set_to_none=True)
    free_memory()


def _does_not_fit(run: Run, bucket: Bucket) -> UserError:
    """What to raise. Working it out takes a while, so what is wrong is said before."""
    context = run.context
    what = f"out of GPU memory on the largest clips, {bucket}"
    context.screen.note(f"{what}; nothing was trained yet")
    try:
        estimate = estimate_memory(context.plan, [bucket], context.screen, what="working out what would fit", stop=context.stop)
    except UserError:  # no estimate for this model
        return UserError(
            what,
            "set block_offload or checkpoint_offload, or lower num_frames, height and width, or train_batch_size; "
            "nothing was trained yet",
        )
    training = estimate.stages["training"]
    remedies = "; ".join(f"{change} ({peak / GIB:.1f} GiB)" for change, peak in estimate.remedies)
    return UserError(
        f"{what}: training takes about {training.peak / GIB:.1f} GiB",
        f"any of: {remedies}; nothing was trained yet" if remedies else "use a larger GPU; nothing was trained yet",
    )


def compare_memory(context: Context, buckets: Sequence[Bucket], measured: int) -> None:
    """Say the estimate beside what was measured, in bytes."""
    plan, screen = context.plan, context.screen
    try:
        estimated = training_stage(plan, largest_bucket(plan, buckets)).allocated
    except UserError as error:
        screen.note(error.problems[0].what)
        return
    screen.say(
        f"GPU memory of training: estimated {estimated / GIB:.2f} GiB, measured {measured / GIB:.2f} GiB, "
        f"ratio {estimated / measured:.3f}"
    )
