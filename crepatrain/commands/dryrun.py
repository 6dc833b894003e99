"""What is known of a run before its weights are loaded: what it trains, and the GPU memory that it needs."""

from collections.abc import Sequence

import torch

from crepatrain.config.plan import Plan
from crepatrain.data.buckets import Bucket
from crepatrain.memory.cards import CARDS, usable
from crepatrain.memory.choosing import choose_memory, what_would_fit
from crepatrain.memory.estimate import Estimate, estimate_memory, largest_bucket
from crepatrain.memory.stages import GIB, empty_trained
from crepatrain.placement.host_memory import pinnable_memory
from crepatrain.placement.processes import local_processes
from crepatrain.preparing import preflight
from crepatrain.preparing.context import Context
from crepatrain.preparing.preflight import Dataset
from crepatrain.records.continuing import keep_begun
from crepatrain.screen import Screen
from crepatrain.stopping import StopSignal
from crepatrain.training.lora import trainable_parameters


def dry_run(plan: Plan, screen: Screen, stop: StopSignal) -> Dataset:
    """Look at the clips, build the modules on the meta device, and print what a run would use.

    Raises:
        UserError: what `fit` would refuse before it loads weights.
    """
    context = Context(plan, screen, torch.device("cpu"), stop)
    dataset, _ = preflight.read_datasets(context, download=False)
    trained = empty_trained(plan)
    trainable = {name: sum(p.numel() for p in trainable_parameters(module)) for name, module in trained.items()}
    if plan.config.model.model_type == "lora":
        trainable = {"adapter": trainable.pop("transformer")} | trainable
    preflight.describe(context, dataset, trainable)
    return dataset


def estimate_vram(
    plan: Plan, dataset: Dataset, screen: Screen, *, gigabytes: float | None = None, everything: bool = False
) -> Estimate:
    """Estimate the memory of a run on this dataset, and print it.

    Args:
        gigabytes: of the card that it is for, and that `memory: auto` chooses for; None: this machine's.
        everything: every teacher source and every remedy, also those that can't need less.

    Raises:
        UserError: the model's step can't run on fake tensors.
    """
    screen.say("estimating GPU memory: the step itself, on tensors without values")
    buckets = list(dataset.clips.buckets)
    host = pinnable_memory(local_processes()) if gigabytes is None else None
    plan = choose_memory(keep_begun(plan), largest_bucket(plan, buckets), _room(gigabytes), host, screen)
    estimate = estimate_memory(plan, buckets, screen, what="estimating GPU memory", everything=everything)
    owners = dict.fromkeys(owner for stage in estimate.stages.values() for owner in stage.by_owner)
    stages = estimate.stages.values()
    rows = [(owner, *(_gib(stage.by_owner[owner]) if owner in stage.by_owner else "-" for stage in stages)) for owner in owners]
    rows.append(("margin: CUDA context, allocator", *(_gib(stage.margin) for stage in stages)))
    rows.append(("peak", *(_gib(stage.peak) for stage in stages)))
    screen.table("GPU memory at its fullest, in GiB", ("", *estimate.stages), rows)
    training = estimate.stages["training"]
    lines = [
        ("needed", f"{_gib(estimate.peak)} GiB, while {estimate.largest}; not calibrated on CUDA: the margin is a guess"),
        ("training's peak", f"after {training.op}"),
        ("fits", ", ".join(f"{card} GB {'yes' if estimate.peak <= room * GIB else 'no'}" for card, room in CARDS.items())),
    ]
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        verdict = "yes" if estimate.peak <= card.total_memory else "no"
        lines.append(("this machine", f"{card.name} of {_gib(card.total_memory)} GiB: {verdict}"))
    if estimate.on_host:
        lines.append(("host memory", f"{_gib(estimate.on_host)} GiB, pinned by each process"))
    for number, (source, share) in enumerate(estimate.crepa.items()):
        lines.append((f"CREPA, {source}", f"{_gib(share)} GiB of training's peak{'' if number else ', as configured'}"))
    lines += [(change, f"{_gib(peak)} GiB in training") for change, peak in estimate.remedies]
    lines += [(change, "no less in training") for change in estimate.without_use]
    if estimate.largest == "caching text":
        less = "" if plan.config.loop.text_encoder_offload else "set text_encoder_offload to auto, or "
        words = f"{less}fill the cache once on a larger GPU: `crepatrain cache` with the same cache_dir"
        lines.append(("caching text", words))
    elif estimate.largest == "caching clips" and not plan.config.diffusion.vae_tiling:
        lines.append(("caching clips", "vae_tiling: true encodes frames in tiles"))
    if plan.config.crepa.crepa_enabled and plan.config.crepa.crepa_feature_source == "cached":
        lines.append(
            ("a smaller crepa_encoder", "changes nothing in training, as its features are cached; it does while caching")
        )
    screen.rows("what it means, and what would change it", lines)
    return estimate


def fits(plan: Plan, buckets: Sequence[Bucket], estimate: Estimate, gigabytes: float, screen: Screen) -> bool:
    """Print and return whether a run fits on a card of so many GB; where training does not, with which settings it would."""
    room = usable(gigabytes)
    fitting = estimate.peak <= room
    screen.say(f"{_gib(estimate.peak)} GiB {'fit' if fitting else 'do not fit'} into {gigabytes:g} GB")
    if estimate.stages["training"].peak > room:
        choice = what_would_fit(plan, largest_bucket(plan, buckets), room)
        verdict = "" if choice.fits else ", which is the least"
        screen.rows(f"for {gigabytes:g} GB", [*choice.rows(), ("needed", f"{_gib(choice.peak)} GiB in training{verdict}")])
    return fitting


def _room(gigabytes: float | None) -> int | None:
    if gigabytes is not None:
        return usable(gigabytes)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
