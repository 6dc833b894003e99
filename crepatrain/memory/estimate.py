"""What a run needs in GPU memory: its stages, CREPA's share of them, and what would make them smaller."""

import contextlib
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

from crepatrain.config.plan import Plan, make_plan
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.config.sections import LoopConfig
from crepatrain.data.buckets import Bucket
from crepatrain.errors import UserError
from crepatrain.memory.account import allocated_bytes
from crepatrain.memory.beside import begin_beside
from crepatrain.memory.offload import BlockSizes, inputs_on_host
from crepatrain.memory.stages import GIB, Stage, caching_stage, empty_trained, sampling_stage, text_stage, training_stage
from crepatrain.placement.states import empty_states
from crepatrain.screen import Screen
from crepatrain.specs import ENCODERS
from crepatrain.stopping import StopSignal
from crepatrain.training.lora import trainable_parameters

# Where the first estimate takes longer, a second process helps with the others.
_SLOW_SECONDS = 2.0

_STAGES: Mapping[str, Callable[[Plan, Bucket], Stage]] = {"caching": caching_stage, "sampling": sampling_stage}
# Of teacher features, by what training holds for them: the later ones never less than the earlier ones.
_SOURCES = ("cached", "backbone", "pixels", "latents")

_Jobs = dict[tuple[str, str], tuple[ResolvedConfig, Bucket]]


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Attributes:
        stages: `caching text`, `caching clips`, `training`, and `sampling` where the run makes validation videos.
        crepa: bytes that CREPA adds to the training step with a teacher source, beginning with the config's own.
        remedies: changes to the config that make the training step's peak smaller, each with the bytes that are left; best first.
        without_use: changes that were tried, and make it no smaller.
        on_host: bytes of pinned host memory that block_offload and checkpoint_offload take.
    """

    stages: Mapping[str, Stage]
    crepa: Mapping[str, int]
    remedies: Sequence[tuple[str, int]]
    without_use: Sequence[str] = ()
    on_host: int = 0

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
            "pinned_host_gib": self.on_host / GIB,
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


def estimate_memory(
    plan: Plan, buckets: Sequence[Bucket], screen: Screen, *, what: str, everything: bool = False, stop: StopSignal | None = None
) -> Estimate:
    """The stages of a run, CREPA's share of training, and what would make it smaller; every number comes from a step of its own.

    Args:
        buckets: of the dataset; the step is that of the one with the most tokens.
        what: the words of the progress.
        everything: also what can't be smaller than the config as it is, and steps that are rarely wanted.
        stop: looked at between two steps.

    Raises:
        UserError: the model's step can't run on fake tensors.
        Stopped: by a signal.
    """
    largest, config = largest_bucket(plan, buckets), plan.config
    needed: _Jobs = {("caching", "caching"): (config, largest)}
    if config.validation.validation_prompts:
        needed["sampling", "sampling"] = (config, Bucket(plan.size[0], plan.size[1], plan.size[2]))
    offered = remedies_of(plan, largest, everything=everything)
    crepa = _crepa_variants(plan, everything=everything)
    wanted: _Jobs = {("crepa", name): (changed, largest) for name, changed in crepa.items()}
    wanted |= {("remedy", name): job for name, job in offered.items()}
    with screen.progress(what, 1 + len(needed) + len(wanted)) as advance:

        def done() -> None:
            advance()
            if stop is not None:
                stop.check(what)

        began = time.perf_counter()
        training = training_stage(plan, largest)
        slow = time.perf_counter() - began > _SLOW_SECONDS
        done()
        found, lost = _run_all(needed, wanted, done, beside=slow)
    if lost:
        screen.note("a process that worked out what would fit has ended; one of its numbers may be missing")
    stages = {"caching text": text_stage(plan), "caching clips": found["caching", "caching"], "training": training}
    stages |= {"sampling": found["sampling", "sampling"]} if config.validation.validation_prompts else {}
    peaks = {name: stage.peak for name, stage in found.items()}
    shares = {}
    if ("crepa", "off") in peaks:
        without = peaks["crepa", "off"]
        shares = {config.crepa.crepa_feature_source: training.peak - without}
        shares |= {name: peak - without for (kind, name), peak in peaks.items() if kind == "crepa" and name != "off"}
    remedies = [(name, peak) for (kind, name), peak in peaks.items() if kind == "remedy"]
    remedies += [
        (f"crepa_feature_source: {name}" if name != "off" else "crepa_enabled: false", peak)
        for (kind, name), peak in peaks.items()
        if kind == "crepa"
    ]
    remedies.append(("optimizer: adamw8bit", _with_8bit_states(plan, training).peak))
    sizes = BlockSizes.of(plan)
    checkpointed = training if config.loop.gradient_checkpointing else found.get(("remedy", "gradient_checkpointing: true"))
    if config.model.model_type == "lora" and checkpointed:
        remedies += _offloads(plan, checkpointed, found, sizes)
    smaller = sorted(((name, peak) for name, peak in remedies if peak < training.peak), key=lambda item: item[1])
    without_use = tuple(name for name in offered if peaks.get(("remedy", name), 0) >= training.peak)
    count = config.loop.block_offload
    on_host = inputs_on_host(plan, largest) + (sizes.on_host(count) if isinstance(count, int) else 0)
    return Estimate(stages, shares, smaller, without_use, on_host)


def _offloads(
    plan: Plan, checkpointed: Stage, found: Mapping[tuple[str, str], Stage], sizes: BlockSizes
) -> list[tuple[str, int]]:
    """Half of the blocks and all of them in host memory, each with its peak.

    Args:
        checkpointed: the step where gradients are checkpointed.
        found: other steps by their names. All blocks are tried with all that saves activations too.
    """
    before, depth = plan.config.loop.block_offload, plan.geometry.depth
    assert isinstance(before, int), "auto is chosen before anything is estimated"
    also = "" if plan.config.loop.gradient_checkpointing else "gradient_checkpointing: true, "
    numbers = [count for count in (depth // 2, depth) if count > before]
    offloads = [(f"{also}block_offload: {count}", sizes.changed(checkpointed, before, count).peak) for count in numbers]
    words = keys_in_words(_least_activations(plan.config.loop))
    if numbers and ("remedy", words) in found:
        offloads.append((f"{words}, block_offload: {depth}", sizes.changed(found["remedy", words], before, depth).peak))
    return offloads


def _least_activations(loop: LoopConfig) -> dict[str, Any]:
    """The changes that leave as few activations on the GPU as possible."""
    least: dict[str, Any] = {"checkpoint_offload": True}
    if not loop.compile:
        least |= {"nested_checkpointing": True, "gradient_checkpointing": True}
    elif not loop.gradient_checkpointing:
        least["gradient_checkpointing"] = True
    values = dict(loop)
    return {key: value for key, value in least.items() if values[key] != value}


def keys_in_words(changes: Mapping[str, Any]) -> str:
    """Keys with their values, as a config has them."""
    return ", ".join(f"{key}: {str(value).lower()}" for key, value in changes.items())


def _crepa_variants(plan: Plan, *, everything: bool) -> dict[str, ResolvedConfig]:
    """The config without CREPA, and with another teacher source: by default those that hold less than the config's own."""
    config = plan.config
    if not config.crepa.crepa_enabled:
        return {}
    variants = {"off": config.changed(crepa_enabled=False)}
    own = config.crepa.crepa_feature_source
    sources = _SOURCES if everything else _SOURCES[: _SOURCES.index(own)]
    deeper = config.crepa.crepa_teacher_block_index or min(config.crepa.block + 8, plan.geometry.depth - 1)
    for source in sources:
        possible = source != "backbone" or deeper > config.crepa.block
        if source != own and possible and (plan.encoder or source == "backbone"):
            update = {"crepa_feature_source": source, "crepa_use_backbone_features": source == "backbone"}
            update |= {"crepa_teacher_block_index": deeper} if source == "backbone" else {}
            variants[source] = config.changed(**update)
    return variants


def remedies_of(plan: Plan, bucket: Bucket, *, everything: bool = False) -> dict[str, tuple[ResolvedConfig, Bucket]]:
    """Configs and buckets whose training may need less memory, by the change that they are."""
    config, found = plan.config, dict[str, tuple[ResolvedConfig, Bucket]]()

    def offer(**changes: Any) -> None:
        found[keys_in_words(changes)] = (config.changed(**changes), bucket)

    for less in {False: ("selective", True), "selective": (True,), True: ()}[config.loop.gradient_checkpointing]:
        offer(gradient_checkpointing=less)
    any_checkpointing = {} if config.loop.gradient_checkpointing else {"gradient_checkpointing": True}
    if config.model.model_type == "lora" and config.loop.base_quantization == "none":
        offer(base_quantization="int8", **any_checkpointing)
    least = _least_activations(config.loop)
    if "checkpoint_offload" in least:
        offer(checkpoint_offload=True, **any_checkpointing)
    if "nested_checkpointing" in least:
        offer(**{key: value for key, value in least.items() if key != "checkpoint_offload"})
    if least:
        offer(**least)
    if config.loop.train_batch_size > 1:
        offer(train_batch_size=config.loop.train_batch_size // 2)
    frames = next((n for n in range(bucket.frames // 2 + 1, 0, -1) if plan.geometry.legal_frames(n)), bucket.frames)
    if frames < bucket.frames:
        found[f"num_frames: {frames}"] = (config, replace(bucket, frames=frames))
    height, width = (
        _three_quarters(size, step) for size, step in zip((bucket.height, bucket.width), plan.geometry.size_multiple, strict=True)
    )
    if (height, width) != (bucket.height, bucket.width):
        found[f"height: {height}, width: {width}"] = (config, replace(bucket, height=height, width=width))
    crepa = config.crepa
    if crepa.crepa_enabled and (crepa.crepa_feature_source != "cached" or everything):
        found |= {change: (config.changed(**values), bucket) for change, values in _smaller_crepa(plan).items()}
    return found


def _three_quarters(size: int, step: int) -> int:
    """The largest multiple of a step that is no more than 3/4 of a size; the size itself where there is none."""
    return size * 3 // 4 // step * step or size


def _smaller_crepa(plan: Plan) -> dict[str, dict[str, Any]]:
    """What the method can do without, by the words of the change: patch on patch, a large teacher, a block deep inside."""
    crepa, found = plan.config.crepa, {}
    if crepa.crepa_spatial_align:
        plain = {"crepa_projector": "linear"} if crepa.crepa_projector != "linear" else {}
        values = {"crepa_spatial_align": False} | plain
        found[", ".join(f"{key}: {str(value).lower()}" for key, value in values.items())] = values
    if plan.encoder is not None and crepa.crepa_feature_source != "backbone":
        names = [name for name, spec in ENCODERS.items() if spec.width < plan.encoder.width and not name.endswith("_reg")]
        if names:  # from small to large
            found[f"crepa_encoder: {names[-1]}"] = {"crepa_encoder": names[-1]}
    if crepa.block > 1:
        found[f"crepa_block_index: {crepa.block // 2}"] = {"crepa_block_index": crepa.block // 2}
    return found


def _job(job: tuple[str, ResolvedConfig, Bucket]) -> Stage | None:
    """One estimate, in this process or another; None where a changed config can't be estimated."""
    kind, config, bucket = job
    try:
        plan = make_plan(config, online=False)
        return _STAGES.get(kind, training_stage)(plan, bucket)
    except UserError:
        if kind in _STAGES:
            raise
        return None


def _run_all(needed: _Jobs, wanted: _Jobs, done: Callable[[], None], *, beside: bool) -> tuple[dict[tuple[str, str], Stage], int]:
    """The stages of all jobs, and how many of the wanted ones were lost with a process.

    Args:
        done: called behind each.
        beside: another process works from the other end, while this one works from the first job on.
    """
    waiting = deque((name, (name[0], *job)) for name, job in (needed | wanted).items())
    found: dict[tuple[str, str], Stage | None] = {}
    lost, given, future = 0, None, None
    with _other_process() if beside else contextlib.nullcontext() as pool:
        while waiting or given:
            # One at a time: a pool that breaks in Python 3.11 never answers for the others once one of them was cancelled.
            if pool and not lost and given is None and len(waiting) > 1:
                given = waiting.pop()
                future = pool.submit(_job, given[1])
            if waiting:
                name, job = waiting.popleft()
                found[name] = _job(job)
                done()
            if given and future and (future.done() or not waiting):
                try:
                    found[given[0]] = future.result()
                except BrokenProcessPool:
                    lost += 1
                    if given[0] in needed:
                        found[given[0]] = _job(given[1])
                given = None
                done()
    return {name: stage for name, stage in found.items() if stage is not None}, lost


@contextlib.contextmanager
def _other_process() -> Iterator[ProcessPoolExecutor]:
    """A process for jobs, which ends with this context, however that ends."""
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=begin_beside)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False)
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
            child.join()


def _with_8bit_states(plan: Plan, stage: Stage) -> Stage:
    """The stage with the states of an 8-bit AdamW in the place of those of AdamW, which is all that it changes."""
    if plan.config.optim.optimizer != "adamw":
        return stage
    parameters = [parameter for module in empty_trained(plan).values() for parameter in trainable_parameters(module)]
    before, after = (allocated_bytes(empty_states(optimizer, parameters)) for optimizer in ("adamw", "adamw8bit"))
    return replace(stage, by_owner={**stage.by_owner, "optimizer": stage.by_owner["optimizer"] - before + after})
