"""What a run needs in GPU memory: its stages, CREPA's share of them, and what would make them smaller."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from crepatrain.config.plan import Plan, make_plan
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.data.buckets import Bucket
from crepatrain.errors import UserError
from crepatrain.memory.account import allocated_bytes
from crepatrain.memory.stages import GIB, Stage, caching_stage, empty_trained, sampling_stage, text_stage, training_stage
from crepatrain.placement.states import empty_states
from crepatrain.quiet import quiet_libraries
from crepatrain.training.lora import trainable_parameters

# Where the first estimate takes longer, the others run in processes of their own.
_SLOW_SECONDS = 2.0

_STAGES: Mapping[str, Callable[[Plan, Bucket], Stage]] = {"caching": caching_stage, "sampling": sampling_stage}


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Attributes:
        stages: `caching text`, `caching clips`, `training`, and `sampling` where the run makes validation videos.
        crepa: bytes that CREPA adds to the training step with each teacher source, beginning with the config's own.
        remedies: changes to the config that make the training step's peak smaller, each with the bytes that are left; best first.
    """

    stages: Mapping[str, Stage]
    crepa: Mapping[str, int]
    remedies: Sequence[tuple[str, int]]

    @property
    def peak(self) -> int:
        """Bytes of the largest stage."""
        return self.stages[self.largest].peak

    @property
    def largest(self) -> str:
        """The name of the stage that needs most."""
        return max(self.stages, key=lambda name: self.stages[name].peak)

    def as_json(self) -> dict[str, Any]:
        """Plain values for other programs, in GiB. `caching` is the larger of its two parts, and lists both."""
        stages = {name: _plain(stage) for name, stage in self.stages.items()}
        parts = {name: stages[f"caching {name}"] for name in ("text", "clips")}
        caching = max(parts.values(), key=lambda part: part["peak_gib"]) | {"parts": parts}
        return {
            "stages": {"training": stages["training"], "caching": caching, "sampling": stages.get("sampling")},
            "peak_gib": self.peak / GIB,
            "calibrated": False,
            "crepa": {source: size / GIB for source, size in self.crepa.items()},
            "remedies": [{"change": change, "peak_gib": peak / GIB} for change, peak in self.remedies],
        }


def _plain(stage: Stage) -> dict[str, Any]:
    return {
        "peak_gib": stage.peak / GIB,
        "allocated_gib": stage.allocated / GIB,
        "by_owner": {owner: size / GIB for owner, size in stage.by_owner.items()} | {"margin": stage.margin / GIB},
        "peak_op": stage.op,
    }


def largest_bucket(plan: Plan, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose clips have the most tokens: its step needs most memory."""
    return max(buckets, key=lambda bucket: plan.geometry.token_grid(bucket.frames, bucket.height, bucket.width).tokens)


def estimate_memory(plan: Plan, buckets: Sequence[Bucket]) -> Estimate:
    """The stages of a run, CREPA's share of training, and what would make it smaller; every number comes from a step of its own.

    Args:
        buckets: of the dataset; the step is that of the one with the most tokens.

    Raises:
        UserError: the model's step can't run on fake tensors.
    """
    largest = largest_bucket(plan, buckets)
    config = plan.config
    began = time.perf_counter()
    training = training_stage(plan, largest)
    slow = time.perf_counter() - began > _SLOW_SECONDS
    jobs = {("caching", "caching"): (config, largest)}
    if config.validation.validation_prompts:
        jobs["sampling", "sampling"] = (config, Bucket(plan.size[0], plan.size[1], plan.size[2]))
    jobs |= {("crepa", name): (changed, largest) for name, changed in _crepa_variants(plan).items()}
    jobs |= {("remedy", name): job for name, job in _smaller(plan, largest).items()}
    with _workers(2 if slow else 0) as run_all:
        found = dict(zip(jobs, run_all(_job, [(name[0], *job) for name, job in jobs.items()]), strict=True))
    stages = {"caching text": text_stage(plan), "caching clips": found["caching", "caching"], "training": training}
    stages |= {"sampling": found["sampling", "sampling"]} if config.validation.validation_prompts else {}
    peaks = {name: stage.peak for name, stage in found.items() if stage is not None}
    crepa = {}
    if config.crepa.crepa_enabled:
        without = peaks["crepa", "off"]
        crepa = {config.crepa.crepa_feature_source: training.peak - without}
        crepa |= {name: peak - without for (kind, name), peak in peaks.items() if kind == "crepa" and name != "off"}
    remedies = [(name, peak) for (kind, name), peak in peaks.items() if kind == "remedy"]
    remedies += [
        (f"crepa_feature_source: {name}" if name != "off" else "crepa_enabled: false", peak)
        for (kind, name), peak in peaks.items()
        if kind == "crepa"
    ]
    remedies.append(("optimizer: adamw8bit", _with_8bit_states(plan, training).peak))
    smaller = sorted(((name, peak) for name, peak in remedies if peak < training.peak), key=lambda item: item[1])
    return Estimate(stages, crepa, smaller)


def _crepa_variants(plan: Plan) -> dict[str, ResolvedConfig]:
    """The config without CREPA, and with each other teacher source."""
    config = plan.config
    if not config.crepa.crepa_enabled:
        return {}
    variants = {"off": config.changed(crepa_enabled=False)}
    deeper = config.crepa.crepa_teacher_block_index or min(config.crepa.block + 8, plan.geometry.depth - 1)
    for source in ("cached", "pixels", "latents", "backbone"):
        possible = source != "backbone" or deeper > config.crepa.block
        if source != config.crepa.crepa_feature_source and possible and (plan.encoder or source == "backbone"):
            update = {"crepa_feature_source": source, "crepa_use_backbone_features": source == "backbone"}
            update |= {"crepa_teacher_block_index": deeper} if source == "backbone" else {}
            variants[source] = config.changed(**update)
    return variants


def _smaller(plan: Plan, bucket: Bucket) -> dict[str, tuple[ResolvedConfig, Bucket]]:
    """Configs and buckets whose training needs less memory, by the change that they are."""
    config, found = plan.config, {}
    if not config.loop.gradient_checkpointing:
        found["gradient_checkpointing: true"] = (config.changed(gradient_checkpointing=True), bucket)
    if config.loop.train_batch_size > 1:
        half = config.loop.train_batch_size // 2
        found[f"train_batch_size: {half}"] = (config.changed(train_batch_size=half), bucket)
    frames = next((n for n in range(bucket.frames // 2 + 1, 0, -1) if plan.geometry.legal_frames(n)), bucket.frames)
    if frames < bucket.frames:
        found[f"num_frames: {frames}"] = (config, replace(bucket, frames=frames))
    return found


def _job(job: tuple[str, ResolvedConfig, Bucket]) -> Stage | None:
    """One estimate, in this process or another; None where a changed config can't be estimated."""
    kind, config, bucket = job
    quiet_libraries()
    try:
        plan = make_plan(config, online=False)
        return _STAGES.get(kind, training_stage)(plan, bucket)
    except UserError:
        if kind in _STAGES:
            raise
        return None


@contextlib.contextmanager
def _workers(count: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` that runs over so many processes, or within this one for 0."""
    if count == 0:
        yield map
        return
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def _with_8bit_states(plan: Plan, stage: Stage) -> Stage:
    """The stage with the states of an 8-bit AdamW in the place of those of AdamW, which is all that it changes."""
    if plan.config.optim.optimizer != "adamw":
        return stage
    parameters = [parameter for module in empty_trained(plan).values() for parameter in trainable_parameters(module)]
    before, after = (allocated_bytes(empty_states(optimizer, parameters)) for optimizer in ("adamw", "adamw8bit"))
    return replace(stage, by_owner={**stage.by_owner, "optimizer": stage.by_owner["optimizer"] - before + after})
