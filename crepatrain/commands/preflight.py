"""Looks at every clip before anything is computed: what the dataset holds, what of it is used, what it will cost."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crepatrain.commands.stopping import StopSignal
from crepatrain.config.plan import Plan
from crepatrain.console import Screen
from crepatrain.data.buckets import Bucket, Cut, cut_clips
from crepatrain.data.digests import FileDigests
from crepatrain.data.index import ClipIndex, Refusal, choose_captions, list_clips, refusal_error
from crepatrain.data.loader import StepSampler
from crepatrain.errors import UserError
from crepatrain.geometry import TokenGrid

_FP16_BYTES = 2
_FP32_BYTES = 4


@dataclass(frozen=True)
class Dataset:
    """A dataset that can be trained on.

    Attributes:
        grids: the token grid of every bucket.
        refused: files that are left out, and why.
    """

    cut: Cut
    grids: Mapping[Bucket, TokenGrid]
    refused: tuple[Refusal, ...]
    digests: FileDigests


def look_at_clips(plan: Plan, screen: Screen, stop: StopSignal) -> Dataset:
    """Find, caption, decode and cut the clips of a plan.

    Raises:
        UserError: clips that can't be used, all of them at once; or none that can.
        Stopped: a signal came; what was learnt of the clips is kept.
    """
    config = plan.config
    assert config.cache_dir is not None
    assert config.fps is not None
    captioned, refused = choose_captions(list_clips(Path(config.train_data)), config.missing_captions)
    root = Path(config.cache_dir)
    digests = FileDigests(root / "digests.json")
    with screen.progress("looking at clips", len(captioned)) as advance:

        def looked() -> None:
            advance()
            stop.check("what was learnt of the clips is kept")

        clips, unreadable = ClipIndex(root / "index", digests).read(captioned, advance=looked)
    cut = cut_clips(
        clips,
        size=plan.size,
        fps=config.fps,
        multiple=plan.geometry.size_multiple,
        aspect_buckets=config.aspect_buckets,
        max_windows_per_clip=config.max_windows_per_clip,
    )
    unusable = [*unreadable, *cut.refused]
    if unusable and config.unusable_clips == "error":
        raise refusal_error(unusable)
    refused = [*refused, *unusable]
    for refusal in refused:
        screen.note(f"{refusal.path} is left out: {refusal.reason}")
    for path, factor in cut.slower:
        screen.note(f"{path} is slower than fps={config.fps:g}: taken frame by frame, so it runs {factor:.2g} times as fast")
    if not cut.windows:
        raise UserError(f"train_data={config.train_data}: no clip of it can be used", "add clips, or lower num_frames")
    grids = {bucket: plan.geometry.token_grid(bucket.frames, bucket.height, bucket.width) for bucket in cut.buckets}
    return Dataset(cut, grids, tuple(refused), digests)


def samples_digest(dataset: Dataset) -> str:
    """Of all windows and their captions: with another one it is another dataset."""
    facts = [[w.clip.digest, w.frames, w.bucket.height, w.bucket.width, w.clip.caption] for w in dataset.cut.windows]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def build_sampler(plan: Plan, dataset: Dataset, world: int) -> StepSampler:
    """The data order of a run on that many processes."""
    config = plan.config
    unit = config.train_batch_size * config.gradient_accumulation_steps * world
    return StepSampler([window.bucket for window in dataset.cut.windows], unit, config.seed)


def total_steps(plan: Plan, sampler: StepSampler) -> int:
    """Optimizer steps of a whole run."""
    config = plan.config
    if config.max_train_steps is not None:
        return config.max_train_steps
    assert config.num_train_epochs is not None
    return config.num_train_epochs * sampler.steps_per_epoch


def latents_bytes(plan: Plan, bucket: Bucket) -> int:
    """On disk, of one window."""
    t, h, w = plan.geometry.latent_shape(bucket.frames, bucket.height, bucket.width)
    return plan.geometry.latent_channels * t * h * w * _FP32_BYTES


def teacher_bytes(plan: Plan, grid: TokenGrid) -> int:
    """On disk, of one window; 0 where features are not cached."""
    if not plan.config.crepa_enabled or plan.config.crepa_feature_source != "cached":
        return 0
    assert plan.encoder is not None
    rows, columns = plan.teacher_grid(grid)
    patches = grid.t * rows * columns
    if plan.config.crepa_cache_dtype == "int8":
        return patches * (plan.encoder.width + _FP16_BYTES)
    return patches * plan.encoder.width * _FP16_BYTES


def describe(plan: Plan, dataset: Dataset, screen: Screen, trainable: Mapping[str, int]) -> None:
    """The table of a dry run.

    Args:
        trainable: parameters that will be trained, by part.
    """
    cut = dataset.cut
    sampler = build_sampler(plan, dataset, world=1)
    used = sum(len(window.frames) for window in cut.windows)
    buckets = cut.buckets
    latents = sum(latents_bytes(plan, bucket) * count for bucket, count in buckets.items())
    teacher = sum(teacher_bytes(plan, dataset.grids[bucket]) * count for bucket, count in buckets.items())
    screen.table(
        "dataset",
        ("bucket (frames x height x width)", "windows", "token grid", "tokens", "teacher grid"),
        [
            (
                str(bucket),
                str(count),
                str(dataset.grids[bucket]),
                str(dataset.grids[bucket].tokens),
                "x".join(map(str, plan.teacher_grid(dataset.grids[bucket]))) if plan.config.crepa_enabled else "-",
            )
            for bucket, count in buckets.items()
        ],
    )
    repeats = f", {sampler.repeats_per_epoch} repeated to fill the last steps" if sampler.repeats_per_epoch else ""
    total = total_steps(plan, sampler)
    screen.rows(
        "run",
        [
            ("clips", f"{len({window.path for window in cut.windows})} used, {len(dataset.refused)} left out"),
            ("frames", f"{used} used, {cut.dropped_frames} dropped (the ends that fill no window)"),
            ("windows", f"{len(cut.windows)}{repeats}"),
            ("steps per epoch", f"{sampler.steps_per_epoch} of {sampler.unit} windows"),
            ("steps", f"{total}, {total / sampler.steps_per_epoch:.1f} epochs"),
            ("trainable parameters", ", ".join(f"{part} {count:,}" for part, count in trainable.items())),
            ("cache on disk", f"latents {in_words(latents)}, teacher features {in_words(teacher)}, in {plan.config.cache_dir}"),
        ],
    )


def in_words(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
