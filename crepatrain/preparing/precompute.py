"""Fills the caches: text, latents, first frames, teacher features. One stage of models after the other."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crepatrain.alignment.encoders import VisionEncoder
from crepatrain.config.plan import Plan
from crepatrain.data.buckets import Bucket, Window
from crepatrain.data.cache import CacheStore, Kind, entry_key, pack_features
from crepatrain.data.frames import as_video
from crepatrain.data.loader import Sample
from crepatrain.errors import UserError
from crepatrain.families.base import Family
from crepatrain.placement.placing import free_memory, within_memory
from crepatrain.placement.precision import encoding_dtype
from crepatrain.preparing.context import Context
from crepatrain.preparing.entries import Entry, EntryForms, missing_entries
from crepatrain.preparing.preflight import Dataset, image_bytes, in_words, latents_bytes, teacher_bytes
from crepatrain.preparing.window_frames import frames_of, read_windows
from crepatrain.training.build import (
    build_encoder,
    build_family,
    build_image_encoder,
    build_vae,
    encoder_folder,
    model_folder,
    text_encoding,
)
from crepatrain.training.text_encoders import load_text_encoder

_CAPTIONS_AT_ONCE = 8
_DECODED_AHEAD = 2
_RESIZED = "bicubic, antialias"
# How frames are numbered; entries of an earlier way may hold other frames than the file shows.
_READ = "counted from the first"
_KEPT = "caches so far are kept"


@dataclass(frozen=True)
class Caches:
    """Where everything of a dataset is, or will be, in the store.

    Attributes:
        dataset: whose entries these are.
        text, latents, image, teacher: keys, of text by caption; image holds the windows that are conditioned on their first
            frame, teacher is empty where features are not cached.
        negative: key of what validation's videos shall not show; None where there are none.
        models: digests of what made them, by part.
        samples: one per window, in the dataset's order.
        teacher_grids: (rows, columns) of the teacher's patches, per bucket.
    """

    dataset: Dataset
    store: CacheStore
    text: Mapping[str, str]
    latents: Mapping[Window, str]
    image: Mapping[Window, str]
    teacher: Mapping[Window, str]
    negative: str | None
    models: Mapping[str, str]
    samples: tuple[Sample, ...]
    teacher_grids: Mapping[Bucket, tuple[int, int]]

    @property
    def of_windows(self) -> Mapping[Kind, Mapping[Window, str]]:
        """What is made of pixels."""
        return {"latents": self.latents, "image": self.image, "teacher": self.teacher}

    @property
    def empty_text(self) -> str:
        return self.text[""]


def plan_caches(context: Context, dataset: Dataset, *, teacher: bool) -> Caches:
    """Name every entry by all that its content depends on. Reads the models' files, and computes nothing.

    Args:
        teacher: whether CREPA's teacher will be asked.
    """
    plan, device = context.plan, context.device
    source = plan.config.crepa.crepa_feature_source if teacher else None
    models = _digests(context, dataset, encoder=source == "cached")
    windows = dataset.clips.windows
    text, negative = _text_keys(plan, dataset, models, device)
    latents = _latents_keys(plan, windows, models)
    image = _image_keys(plan, windows, models, device)
    features = _teacher_keys(plan, dataset, models, device) if source == "cached" else {}
    samples = tuple(
        Sample(
            name=window.name,
            bucket=window.bucket,
            latents=latents[window],
            text=text[window.clip.caption],
            image=image.get(window),
            teacher=features.get(window),
            pixels=replace(window, frames=_teacher_frames(dataset, window)) if source == "pixels" else None,
        )
        for window in windows
    )
    grids = {bucket: plan.teacher_grid(grid) for bucket, grid in dataset.grids.items()}
    store = CacheStore(Path(plan.config.data.cache_dir))
    return Caches(dataset, store, text, latents, image, features, negative, models, samples, grids)


def _digests(context: Context, dataset: Dataset, *, encoder: bool) -> dict[str, str]:
    plan = context.plan
    folders = {part: model_folder(plan) / part for part in plan.variant.parts}
    if encoder:
        folders["encoder"] = encoder_folder(plan)
    models = {}
    with context.screen.progress("identifying the models' files", len(folders)) as advance:
        for part, folder in folders.items():
            models[part] = dataset.digests.folder(folder)
            advance()
    dataset.digests.save()
    return models


def fill_caches(context: Context, caches: Caches) -> None:
    """Compute what is missing or damaged; what is there and whole is never written again.

    Raises:
        UserError: a model that can't be loaded, a clip that can't be decoded any more, a full disk or GPU.
        Stopped: a signal came; every entry written so far stays.
    """
    missing = missing_entries(context, caches.store, _entries(context.plan, caches))
    with within_memory(
        "while filling the caches; what was written is kept",
        "lower crepa_encoder_frames_batch_size, set text_encoder_offload to true, vae_dtype to bfloat16 or vae_tiling to true, "
        "or run `crepatrain cache` on a larger GPU",
    ):
        _fill_text(context, caches, missing)
        _fill_video(context, caches, missing)


def filled_caches(context: Context, dataset: Dataset, *, teacher: bool) -> Caches:
    """The caches of a dataset, with everything in them: named as by `plan_caches`, filled as by `fill_caches`."""
    caches = plan_caches(context, dataset, teacher=teacher)
    fill_caches(context, caches)
    return caches


def _text_keys(
    plan: Plan, dataset: Dataset, models: Mapping[str, str], device: torch.device
) -> tuple[dict[str, str], str | None]:
    """Of every caption and validation prompt, and of the negative prompt beside these."""
    prompts = plan.config.validation.validation_prompts or ()
    facts = {
        "family": plan.spec.name,
        "length": plan.spec.text_length_of(plan.variant),
        "models": {part: models[part] for part in plan.variant.text_parts},
        "dtype": str(encoding_dtype(device)),
        **_where_set("quantization", plan.config.loop.text_encoder_quantization, "none"),
    }
    captions = sorted({window.clip.caption for window in dataset.clips.windows} | {"", *prompts})
    negative = entry_key(kind="text", negative=plan.variant.sampling.negative_prompt, **facts) if prompts else None
    return {caption: entry_key(kind="text", caption=caption, **facts) for caption in captions}, negative


def _latents_keys(plan: Plan, windows: Sequence[Window], models: Mapping[str, str]) -> dict[Window, str]:
    facts = {
        "family": plan.spec.name,
        "vae": models[plan.variant.vae],
        "dtype": plan.config.diffusion.vae_dtype,
        **_where_set("tiled", plan.config.diffusion.vae_tiling, False),
    }
    return {window: entry_key(kind="latents", **_source(window, window.frames), **facts) for window in windows}


def _image_keys(plan: Plan, windows: Sequence[Window], models: Mapping[str, str], device: torch.device) -> dict[Window, str]:
    """Of clips; an image is trained as from text alone, as nothing would be left to learn beside it."""
    if plan.task != "i2v":
        return {}
    facts = {
        "family": plan.spec.name,
        "models": {part: models[part] for part in plan.variant.image_parts},
        "dtype": plan.config.diffusion.vae_dtype,
        "seen": str(encoding_dtype(device)) if plan.variant.folders("image_encoder") else None,
        **_where_set("tiled", plan.config.diffusion.vae_tiling, False),
    }
    return {
        window: entry_key(kind="image", length=len(window.frames), **_source(window, window.frames[:1]), **facts)
        for window in windows
        if len(window.frames) > 1
    }


def _teacher_keys(plan: Plan, dataset: Dataset, models: Mapping[str, str], device: torch.device) -> dict[Window, str]:
    return {
        window: entry_key(
            kind="teacher",
            **_source(window, _teacher_frames(dataset, window)),
            encoder=models["encoder"],
            input=plan.encoder_size(dataset.grids[window.bucket]),
            computed=str(encoding_dtype(device)),
            stored=plan.config.crepa.crepa_cache_dtype,
        )
        for window in dataset.clips.windows
    }


def _where_set(name: str, value: Any, default: Any) -> dict[str, Any]:
    """A fact that is no part of a key where it has its default: entries were made before it was there."""
    return {} if value == default else {name: value}


def _source(window: Window, frames: Sequence[int]) -> dict[str, Any]:
    """The pixels that an entry is made from."""
    return {
        "file": window.clip.digest,
        "frames": list(frames),
        "size": [window.bucket.height, window.bucket.width],
        "crop": f"{window.crop}, {_RESIZED}",
        "read": _READ,
    }


def _teacher_frames(dataset: Dataset, window: Window) -> tuple[int, ...]:
    """The file's frames that a teacher compares tokens with."""
    return tuple(window.frames[frame] for frame in dataset.grids[window.bucket].teacher_frames)


def _entries(plan: Plan, caches: Caches) -> list[Entry]:
    forms = EntryForms(plan, caches.dataset)
    of_window = {"latents": forms.latents, "image": forms.image, "teacher": forms.teacher}
    text = [*caches.text.values(), *([caches.negative] if caches.negative else [])]
    of_text = forms.text()
    return [
        *(Entry("text", key, of_text) for key in text),
        *(Entry(kind, key, of_window[kind](window)) for kind, keys in caches.of_windows.items() for window, key in keys.items()),
    ]


def _fill_text(context: Context, caches: Caches, without: Collection[tuple[Kind, str]]) -> None:
    plan, screen, device, store = context.plan, context.screen, context.device, caches.store
    missing = [caption for caption, key in caches.text.items() if ("text", key) in without]
    negative = caches.negative if caches.negative and ("text", caches.negative) in without else None
    if not missing and not negative:
        return
    family = build_family(plan)
    folder = model_folder(plan)
    screen.say(f"loading the text encoder for {len(missing) + bool(negative)} texts")
    encoder = load_text_encoder(family, folder, device, text_encoding(plan), screen)
    with screen.progress("encoding captions", len(missing)) as advance, torch.no_grad():
        for start in range(0, len(missing), _CAPTIONS_AT_ONCE):
            context.stop.check(_KEPT)
            captions = missing[start : start + _CAPTIONS_AT_ONCE]
            for caption, text in zip(captions, family.encode_text(encoder, captions), strict=True):
                store.write("text", caches.text[caption], text)
                advance()
        if negative:
            store.write("text", negative, family.encode_negative(encoder, plan.variant.sampling.negative_prompt))
    del encoder
    free_memory()


def _fill_video(context: Context, caches: Caches, without: Collection[tuple[Kind, str]]) -> None:
    """One pass over the clips: each is decoded once for all that is made of it."""
    stop, dataset, store = context.stop, caches.dataset, caches.store
    missing: dict[Kind, set[Window]] = {
        kind: {window for window, key in keys.items() if (kind, key) in without} for kind, keys in caches.of_windows.items()
    }
    windows = [window for window in dataset.clips.windows if any(window in some for some in missing.values())]
    if not windows:
        return
    _check_disk(context, caches, missing)
    encode = _Encoders.load(context, dataset, missing)
    progress = context.screen.progress("encoding clips", len(windows))
    with progress as advance:
        for window, reading in read_windows(windows, at_once=1 + _DECODED_AHEAD):
            stop.check(_KEPT)
            frames = frames_of(window, reading)
            if window in missing["latents"]:
                store.write("latents", caches.latents[window], encode.latents(frames))
            if window in missing["image"]:
                store.write("image", caches.image[window], encode.image(frames))
            if window in missing["teacher"]:
                store.write("teacher", caches.teacher[window], encode.teacher(frames, window.bucket))
            advance()
    del encode
    free_memory()


@dataclass(frozen=True, eq=False)
class _Encoders:
    """What makes entries of a clip's frames [F, 3, H, W] uint8; a model that no entry needs is not loaded."""

    plan: Plan
    dataset: Dataset
    device: torch.device
    family: Family
    vae: Any
    image_encoder: Any
    vision: VisionEncoder | None

    @classmethod
    def load(cls, context: Context, dataset: Dataset, missing: Mapping[Kind, Collection[Window]]) -> "_Encoders":
        plan, device = context.plan, context.device
        family = build_family(plan)
        return cls(
            plan,
            dataset,
            device,
            family,
            vae=build_vae(plan, family, device) if missing["latents"] or missing["image"] else None,
            image_encoder=build_image_encoder(plan, family, device) if missing["image"] else None,
            vision=build_encoder(plan, device) if missing["teacher"] else None,
        )

    @torch.no_grad()
    def latents(self, frames: Tensor) -> dict[str, Tensor]:
        return {"latents": self.family.encode_video(self.vae, as_video(frames.to(self.device)))[0]}

    @torch.no_grad()
    def image(self, frames: Tensor) -> dict[str, Tensor]:
        first = as_video(frames[:1].to(self.device))
        made = self.family.encode_image(self.vae, self.image_encoder, first, len(frames))
        return {name: tensor[0] for name, tensor in made.items()}

    def teacher(self, frames: Tensor, bucket: Bucket) -> dict[str, Tensor]:
        assert self.vision is not None
        grid = self.dataset.grids[bucket]
        seen = frames[list(grid.teacher_frames)].to(self.device).unsqueeze(0)
        features = self.vision(seen, self.plan.encoder_size(grid))
        return pack_features(features.values[0], self.plan.config.crepa.crepa_cache_dtype)


def _check_disk(context: Context, caches: Caches, missing: Mapping[Kind, Collection[Window]]) -> None:
    plan, dataset, root = context.plan, caches.dataset, caches.store.root
    latents = sum(latents_bytes(plan, window.bucket) for window in missing["latents"])
    image = sum(image_bytes(plan, window.bucket) for window in missing["image"])
    teacher = sum(teacher_bytes(plan, dataset.grids[window.bucket]) for window in missing["teacher"])
    first = f", first frames {in_words(image)}" if image else ""
    context.screen.say(f"caching in {root}: latents {in_words(latents)}{first}, teacher features {in_words(teacher)}")
    root.mkdir(parents=True, exist_ok=True)
    needed, free = latents + image + teacher, shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"cache_dir={root}: {in_words(needed)} are needed and {in_words(free)} are free",
            'set cache_dir to a larger disk, or a smaller crepa_encoder_image_size ("grid")',
        )
