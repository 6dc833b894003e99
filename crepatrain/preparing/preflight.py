"""Reads every clip before anything is computed: what the dataset holds, what of it is used, what it will cost."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from crepatrain.config.checks import maximum_score
from crepatrain.config.datasets import dataset_at
from crepatrain.config.plan import Plan
from crepatrain.data.buckets import Bucket, ClipWindows, Window
from crepatrain.data.clip import Clip
from crepatrain.data.cutting import Cutting, cut_clips
from crepatrain.data.digests import FileDigests
from crepatrain.data.frames import CENTRE
from crepatrain.data.index import ClipIndex
from crepatrain.data.listing import Refusal, refusal_error
from crepatrain.data.lists import Part
from crepatrain.data.loader import StepSampler
from crepatrain.errors import Problem, UserError
from crepatrain.geometry import TokenGrid
from crepatrain.preparing.captions import note_captions, read_captions, rule_of
from crepatrain.preparing.context import Context
from crepatrain.preparing.decisions import decision_notes, decisions, dropped_in_words
from crepatrain.preparing.held_out import hold_out, shares_in_words
from crepatrain.preparing.window_rows import WindowRow, window_rows
from crepatrain.screen import Screen
from crepatrain.training.build import count_caption_tokens

_FP16_BYTES = 2
_FP32_BYTES = 4


@dataclass(frozen=True)
class Dataset:
    """A dataset that can be trained on.

    Attributes:
        clips: cut into windows.
        grids: the token grid of every bucket.
        refused: files that are left out, and why.
    """

    clips: ClipWindows
    grids: Mapping[Bucket, TokenGrid]
    refused: tuple[Refusal, ...]
    digests: FileDigests


def read_dataset(context: Context, key: Literal["train_data", "eval_data"] = "train_data", *, download: bool = True) -> Dataset:
    """Find, caption, decode and cut the clips that a key of the config names.

    Args:
        download: whether the tokenizers, which count long captions, may be downloaded.

    Raises:
        UserError: clips that can't be used, all of them at once; or none that can.
        Stopped: a signal came; what was read of the clips is kept.
    """
    plan, screen, config = context.plan, context.screen, context.plan.config
    datasets = plan.datasets
    if key == "eval_data":
        assert config.validation.eval_data is not None
        datasets = (dataset_at(config.validation.eval_data),)
    found = [(each, *read_captions(plan, each, key)) for each in datasets]
    captioned = [(clip, rule_of(plan, each, clip.part)) for each, _, captions in found for clip in captions.clips]
    problems = [problem for _, listed, _ in found for problem in listed.problems]
    problems += [each.about(problem) for each, _, captions in found for problem in captions.problems]
    refused = [refusal for _, _, captions in found for refusal in captions.refused]
    root = Path(config.data.cache_dir)
    digests = FileDigests(root / "digests.json")
    with screen.progress("reading clips", len(captioned)) as advance:

        def after_each() -> None:
            advance()
            context.stop.check("what was read of the clips is kept")

        probed, unreadable = ClipIndex(root / "index", digests).read(
            [(clip.path, clip.caption, rule) for clip, rule in captioned], advance=after_each
        )
    clips = cut_clips(probed, plan.fps, _cutting(plan))
    unusable = [*(refusal for _, listed, _ in found for refusal in listed.refused), *unreadable, *clips.refused]
    if unusable and config.data.unusable_clips == "error":
        problems += refusal_error(unusable).problems
    if problems:
        raise UserError.of(problems)
    refused += unusable
    for each, listed, _ in found:
        for note in listed.notes:
            screen.note(": ".join(filter(None, [each.where if key == "train_data" else key, note])))
    for refusal in refused:
        screen.note(f"{refusal.path} is left out: {refusal.reason}")
    for note in decision_notes(clips, config.data, [each.path for each in datasets]):
        screen.note(note)
    if not clips.windows:
        lower = f"set num_frames to {clips.fitting_frames}" if clips.fitting_frames else "lower num_frames"
        raise UserError(
            f"{key}={', '.join(str(each.path) for each in datasets)}: no clip of it can be used", f"add clips, or {lower}"
        )
    used = {window.path for window in clips.windows}
    note_captions(context, [clip for clip, _ in captioned if clip.path in used], key, download=download)
    if config.loop.train_batch_size > 1 and not plan.spec.text_is_padded:
        clips = _one_caption_length_per_bucket(plan, clips)
    _check_threshold(plan, clips, screen)
    grids = {bucket: plan.geometry.token_grid(bucket.frames, bucket.height, bucket.width) for bucket in clips.buckets}
    return Dataset(clips, grids, tuple(refused), digests)


def read_datasets(context: Context, *, download: bool = True) -> tuple[Dataset, Dataset | None]:
    """What is trained on, and what is held out; None where nothing is.

    Args:
        download: whether the tokenizers, which count long captions, may be downloaded.

    Raises:
        UserError: clips that can't be used; or nothing would be left of one of the two.
        Stopped: a signal came; what was read of the clips is kept.
    """
    config = context.plan.config
    if not config.validation.eval_data:
        dataset = read_dataset(context, download=download)
    else:
        dataset, held_out = _read_both(context, download=download)
        trained = {window.clip.digest for window in dataset.clips.windows}
        both = sorted({str(window.path) for window in held_out.clips.windows if window.clip.digest in trained})
        if both:
            raise UserError(
                f"eval_data: {both[0]} is in train_data too ({len(both)} in all)", "keep them apart, or use eval_share"
            )
        return dataset, held_out
    if not config.validation.eval_share:
        return dataset, None
    share = config.validation.eval_share
    trained, held = hold_out(dataset.clips, share)
    context.screen.note(f"eval_share={share:g}: {shares_in_words(held, dataset.clips)} are held out")
    return replace(dataset, clips=trained), replace(dataset, clips=held)


def _read_both(context: Context, *, download: bool) -> tuple[Dataset, Dataset]:
    """What is trained on and what is measured.

    Raises:
        UserError: what is wrong with either.
    """
    read: list[Dataset] = []
    problems: list[Problem] = []
    for key in ("train_data", "eval_data"):
        try:
            read.append(read_dataset(context, key, download=download))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError.of(problems)
    return read[0], read[1]


def _cutting(plan: Plan) -> Cutting:
    data = plan.config.data
    aspects, lengths = data.aspect_buckets, data.frame_buckets
    return Cutting(
        multiple=plan.geometry.size_multiple,
        legal_frames=plan.geometry.legal_frames,
        aspects=[(height, width) for height, width in aspects] if isinstance(aspects, list) else aspects,
        lengths=lengths,
        most=data.max_windows_per_clip,
        crop=data.crop,
        seed=plan.config.loop.seed,
        sees_fps=plan.spec.sees_fps,
        no_images=_no_images(plan),
    )


def _no_images(plan: Plan) -> str | None:
    """Why images can't be used; None where they can."""
    if not plan.variant.images:
        return f"{plan.variant.title} is trained on clips only"
    return None if plan.geometry.legal_frames(1) else f"{plan.spec.title} takes {plan.geometry.frames_rule} frames"


def _one_caption_length_per_bucket(plan: Plan, clips: ClipWindows) -> ClipWindows:
    """A transformer that knows no padded text takes captions of one length in a batch."""
    captions = sorted({window.clip.caption for window in clips.windows})
    tokens = dict(zip(captions, count_caption_tokens(plan, captions), strict=True))
    windows = [
        replace(window, bucket=replace(window.bucket, caption_tokens=tokens[window.clip.caption])) for window in clips.windows
    ]
    return replace(clips, windows=tuple(windows))


def _check_threshold(plan: Plan, clips: ClipWindows, screen: Screen) -> None:
    """Images have no neighbours, so their alignment score ends at 1."""
    config, threshold = plan.config, plan.config.crepa.crepa_similarity_threshold
    frames = {bucket.frames for bucket in clips.buckets}
    if not config.crepa.crepa_enabled or threshold is None or config.crepa.crepa_threshold_metric == "self" or 1 not in frames:
        return
    if frames != {1} and maximum_score(config.crepa, plan.grid.t) > 1:
        screen.note("images score at most 1 and clips more, so the EMA depends on their mix; set crepa_threshold_metric to self")
    elif frames == {1} and threshold > 1:
        raise UserError(
            f"crepa_similarity_threshold={threshold:g}: the score of images can't exceed 1, and there are no clips",
            "use 1 or less",
        )


def samples_digest(dataset: Dataset) -> str:
    """Of all windows and their captions: with another one it is another dataset."""
    facts = [[w.clip.digest, *_cut_of(w), w.clip.caption] for w in dataset.clips.windows]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _cut_of(window: Window) -> list[Any]:
    """What is taken of a window's file, as plain values; what is as always is left out, as earlier versions did not know it."""
    rule, bucket = window.clip.rule, window.bucket
    rest = {"crop": str(window.crop), "fps": bucket.fps, "weight": rule.weight}
    usual = {"crop": str(CENTRE), "fps": None, "weight": 1.0}
    other = {key: value for key, value in rest.items() if value != usual[key]}
    return [window.frames, bucket.height, bucket.width, *([other] if other else [])]


def listed_clips(plan: Plan, dataset: Dataset) -> list[dict[str, str]]:
    """Every clip as a run's folder lists it, so that another dataset can be compared clip by clip."""
    windows: dict[Clip, list[Any]] = {}
    for window in dataset.clips.windows:
        windows.setdefault(window.clip, []).append(_cut_of(window))
    names = Counter[str]()
    return [
        {
            "file": _name_of(plan, clip, names),
            "content": clip.digest,
            "caption": _digest(clip.caption),
            "cut": _digest(cut),
        }
        for clip, cut in windows.items()
    ]


def _name_of(plan: Plan, clip: Clip, names: Counter[str]) -> str:
    """Of a clip in the list: its path, from the dataset's folder where there is one alone, and which part or copy of it."""
    path, rule = clip.path.absolute(), clip.rule
    if len(plan.datasets) == 1:
        source = plan.datasets[0].path.absolute()
        folder = source if source.is_dir() else source.parent
        path = path.relative_to(folder) if path.is_relative_to(folder) else path
    name = f"{path}{Part(rule.start, rule.end)}"
    names[name] += 1
    return name if names[name] == 1 else f"{name} ({names[name]})"


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def build_sampler(plan: Plan, dataset: Dataset, world: int) -> StepSampler:
    """The data order of a run on that many processes."""
    config = plan.config
    unit = config.loop.train_batch_size * config.loop.gradient_accumulation_steps * world
    windows = dataset.clips.windows
    weights = [window.clip.rule.weight for window in windows]
    return StepSampler([window.bucket for window in windows], unit, config.loop.seed, weights)


def total_steps(plan: Plan, sampler: StepSampler) -> int:
    """Optimizer steps of a whole run."""
    config = plan.config
    if config.loop.max_train_steps is not None:
        return config.loop.max_train_steps
    assert config.loop.num_train_epochs is not None
    return sampler.steps_until(config.loop.num_train_epochs)


def latents_bytes(plan: Plan, bucket: Bucket) -> int:
    """On disk, of one window."""
    t, h, w = plan.geometry.latent_shape(bucket.frames, bucket.height, bucket.width)
    return plan.geometry.latent_channels * t * h * w * _FP32_BYTES


def image_bytes(plan: Plan, bucket: Bucket) -> int:
    """On disk, at most, of what one window's first frame adds; 0 where nothing is conditioned on it."""
    return latents_bytes(plan, bucket) if plan.task == "i2v" and bucket.frames > 1 else 0


def teacher_bytes(plan: Plan, grid: TokenGrid) -> int:
    """On disk, of one window; 0 where features are not cached."""
    if not plan.config.crepa.crepa_enabled or plan.config.crepa.crepa_feature_source != "cached":
        return 0
    assert plan.encoder is not None
    rows, columns = plan.teacher_grid(grid)
    patches = grid.t * rows * columns
    if plan.config.crepa.crepa_cache_dtype == "int8":
        return patches * (plan.encoder.width + _FP16_BYTES)
    return patches * plan.encoder.width * _FP16_BYTES


def describe(context: Context, dataset: Dataset, trainable: Mapping[str, int]) -> None:
    """The table of a dry run.

    Args:
        trainable: parameters that will be trained, by part.
    """
    plan, screen, clips = context.plan, context.screen, dataset.clips
    sampler = build_sampler(plan, dataset, world=1)
    used = sum(len(window.frames) for window in clips.windows)
    buckets = clips.buckets
    latents = sum((latents_bytes(plan, bucket) + image_bytes(plan, bucket)) * count for bucket, count in buckets.items())
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
                "x".join(map(str, plan.teacher_grid(dataset.grids[bucket]))) if plan.config.crepa.crepa_enabled else "-",
            )
            for bucket, count in buckets.items()
        ],
    )
    repeats = f", {sampler.repeats_per_epoch} repeated to fill the last steps" if sampler.repeats_per_epoch else ""
    total = total_steps(plan, sampler)
    epoch, position, length = sampler.place(total)
    screen.rows(
        "run",
        [
            ("clips", f"{len({window.path for window in clips.windows})} used, {len(dataset.refused)} left out"),
            ("frames", f"{used} used, {dropped_in_words(clips)}"),
            ("windows", f"{len(clips.windows)}{repeats}"),
            ("steps per epoch", f"{sampler.steps_per_epoch} of {sampler.unit} windows"),
            ("steps", f"{total}, {epoch + position / length:.1f} epochs"),
            ("trainable parameters", ", ".join(f"{part} {count:,}" for part, count in trainable.items())),
            (
                "cache on disk",
                f"latents {in_words(latents)}, teacher features {in_words(teacher)}, in {plan.config.data.cache_dir}",
            ),
        ],
    )


def dataset_facts(plan: Plan, dataset: Dataset, sampler: StepSampler) -> dict[str, Any]:
    """What a run trains on, for its folder: plain values."""
    clips = dataset.clips
    windows = Counter(window.clip for window in clips.windows)
    teacher_grids = {bucket: "x".join(map(str, plan.teacher_grid(grid))) for bucket, grid in dataset.grids.items()}
    return {
        "train_data": ", ".join(str(each.path) for each in plan.datasets),
        "clips": len(windows),
        "windows": len(clips.windows),
        "left_out": len(dataset.refused),
        "frames": {
            "used": sum(len(window.frames) for window in clips.windows),
            "dropped_at_ends": clips.ends,
            "dropped_by_max_windows_per_clip": clips.passed_over,
            "dropped_by_clip_mode": clips.elsewhere,
        },
        "decided": decisions(clips),
        "unit": sampler.unit,
        "steps_per_epoch": sampler.steps_per_epoch,
        "steps": total_steps(plan, sampler),
        "buckets": [
            {
                "bucket": str(bucket),
                "windows": count,
                "grid": str(dataset.grids[bucket]),
                "tokens": dataset.grids[bucket].tokens,
                "teacher_grid": teacher_grids[bucket] if plan.config.crepa.crepa_enabled else None,
            }
            for bucket, count in clips.buckets.items()
        ],
        "each": [_window_facts(row) for row in window_rows(clips)],
        "captions": [{"file": clip.path.name, "windows": count, "caption": clip.caption} for clip, count in windows.items()],
    }


def _window_facts(row: WindowRow) -> dict[str, Any]:
    """A window for a run's folder, where captions stand by clip and files by name."""
    return {"file": Path(row.clip).name} | {key: value for key, value in row.plain().items() if key not in {"clip", "caption"}}


def in_words(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
