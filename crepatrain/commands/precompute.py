"""Fills the caches: text, latents, teacher features. One model stage after the other, each freed before the next."""

import gc
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crepatrain.commands.preflight import Dataset, in_words, latents_bytes, teacher_bytes
from crepatrain.commands.stopping import StopSignal
from crepatrain.config.plan import Plan
from crepatrain.console import Screen
from crepatrain.data.buckets import Bucket, Window
from crepatrain.data.cache import CacheStore, entry_key, pack_features
from crepatrain.data.decode import Unreadable, read_frames
from crepatrain.data.loader import Sample
from crepatrain.errors import UserError
from crepatrain.families import get_family
from crepatrain.training.build import build_encoder, build_vae, encoder_folder, encoding_dtype, loading, model_folder

_CAPTIONS_AT_ONCE = 8
_DECODED_AHEAD = 2
_CROP = "centre, bicubic, antialias"
_KEPT = "caches so far are kept"


@dataclass(frozen=True)
class Caches:
    """Where everything of a dataset is, or will be, in the store.

    Attributes:
        text, latents, teacher: keys; teacher is empty where features are not cached.
        models: digests of what made them, by part.
        samples: one per window, in the dataset's order.
        teacher_grids: (rows, columns) of the teacher's patches, per bucket.
    """

    store: CacheStore
    text: Mapping[str, str]
    latents: Mapping[Window, str]
    teacher: Mapping[Window, str]
    models: Mapping[str, str]
    samples: tuple[Sample, ...]
    teacher_grids: Mapping[Bucket, tuple[int, int]]

    @property
    def empty_text(self) -> str:
        return self.text[""]


def plan_caches(plan: Plan, dataset: Dataset, screen: Screen, device: torch.device, *, teacher: bool) -> Caches:
    """Name every entry by all that its content depends on. Reads the models' files, and computes nothing.

    Args:
        teacher: whether CREPA's teacher will be asked.
    """
    assert plan.config.cache_dir is not None
    source = plan.config.crepa_feature_source if teacher else None
    models = _digests(plan, dataset, screen, encoder=source == "cached")
    windows = dataset.cut.windows
    text = _text_keys(plan, dataset, models, device)
    latents = _latents_keys(plan, windows, models)
    features = _teacher_keys(plan, dataset, models, device) if source == "cached" else {}
    samples = tuple(
        Sample(
            name=window.name,
            bucket=window.bucket,
            latents=latents[window],
            text=text[window.clip.caption],
            teacher=features.get(window),
            pixels=(window.path, _teacher_frames(dataset, window)) if source == "pixels" else None,
        )
        for window in windows
    )
    grids = {bucket: plan.teacher_grid(grid) for bucket, grid in dataset.grids.items()}
    return Caches(CacheStore(Path(plan.config.cache_dir)), text, latents, features, models, samples, grids)


def _digests(plan: Plan, dataset: Dataset, screen: Screen, *, encoder: bool) -> dict[str, str]:
    folders = {part: model_folder(plan) / part for part in plan.spec.parts}
    if encoder:
        folders["encoder"] = encoder_folder(plan)
    models = {}
    with screen.progress("identifying the models' files", len(folders)) as advance:
        for part, folder in folders.items():
            models[part] = dataset.digests.folder(folder)
            advance()
    dataset.digests.save()
    return models


def fill_caches(plan: Plan, dataset: Dataset, caches: Caches, screen: Screen, device: torch.device, stop: StopSignal) -> None:
    """Compute what is missing; what is there is never written again.

    Raises:
        UserError: a model that can't be loaded, a clip that can't be decoded any more, a full disk or GPU.
        Stopped: a signal came; every entry written so far stays.
    """
    try:
        _fill_text(plan, caches, screen, device, stop)
        _fill_video(plan, dataset, caches, screen, device, stop)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of GPU memory while filling the caches; what was written is kept",
            "lower crepa_encoder_frames_batch_size, set vae_dtype to bfloat16, or run `crepatrain cache` on a larger GPU",
        ) from error


def _text_keys(plan: Plan, dataset: Dataset, models: Mapping[str, str], device: torch.device) -> dict[str, str]:
    facts = {
        "family": plan.spec.name,
        "length": plan.spec.text_length,
        "encoder": models["text_encoder"],
        "tokenizer": models["tokenizer"],
        "dtype": str(encoding_dtype(device)),
    }
    captions = sorted({window.clip.caption for window in dataset.cut.windows} | {""})
    return {caption: entry_key(kind="text", caption=caption, **facts) for caption in captions}


def _latents_keys(plan: Plan, windows: Sequence[Window], models: Mapping[str, str]) -> dict[Window, str]:
    facts = {"family": plan.spec.name, "vae": models["vae"], "dtype": plan.config.vae_dtype}
    return {window: entry_key(kind="latents", **_source(window, window.frames), **facts) for window in windows}


def _teacher_keys(plan: Plan, dataset: Dataset, models: Mapping[str, str], device: torch.device) -> dict[Window, str]:
    return {
        window: entry_key(
            kind="teacher",
            **_source(window, _teacher_frames(dataset, window)),
            encoder=models["encoder"],
            input=plan.encoder_size(dataset.grids[window.bucket]),
            computed=str(encoding_dtype(device)),
            stored=plan.config.crepa_cache_dtype,
        )
        for window in dataset.cut.windows
    }


def _source(window: Window, frames: Sequence[int]) -> dict[str, Any]:
    """The pixels that an entry is made from."""
    return {
        "file": window.clip.digest,
        "frames": list(frames),
        "size": [window.bucket.height, window.bucket.width],
        "crop": _CROP,
    }


def _teacher_frames(dataset: Dataset, window: Window) -> tuple[int, ...]:
    """The file's frames that a teacher compares tokens with."""
    return tuple(window.frames[frame] for frame in dataset.grids[window.bucket].teacher_frames)


def _fill_text(plan: Plan, caches: Caches, screen: Screen, device: torch.device, stop: StopSignal) -> None:
    missing = [caption for caption, key in caches.text.items() if not caches.store.has("text", key)]
    if not missing:
        return
    family = get_family(plan.config.model_family)
    folder = model_folder(plan)
    screen.say(f"loading the text encoder for {len(missing)} captions")
    with loading("text_encoder", folder):
        encoder = family.load_text_encoder(str(folder), encoding_dtype(device)).to(device)
    with screen.progress("encoding captions", len(missing)) as advance, torch.no_grad():
        for start in range(0, len(missing), _CAPTIONS_AT_ONCE):
            stop.check(_KEPT)
            captions = missing[start : start + _CAPTIONS_AT_ONCE]
            for caption, text in zip(captions, family.encode_text(encoder, captions), strict=True):
                caches.store.write("text", caches.text[caption], text)
                advance()
    del encoder
    free_memory()


def _fill_video(plan: Plan, dataset: Dataset, caches: Caches, screen: Screen, device: torch.device, stop: StopSignal) -> None:
    """One pass over the clips: each is decoded once for its latents and its features."""
    store = caches.store
    no_latents = {window for window, key in caches.latents.items() if not store.has("latents", key)}
    no_teacher = {window for window, key in caches.teacher.items() if not store.has("teacher", key)}
    windows = [window for window in dataset.cut.windows if window in no_latents | no_teacher]
    if not windows:
        return
    _check_disk(plan, dataset, store.root, no_latents, no_teacher, screen)
    family = get_family(plan.config.model_family)
    vae = build_vae(plan, family, device) if no_latents else None
    encoder = build_encoder(plan, device) if no_teacher else None
    with ThreadPoolExecutor(max_workers=_DECODED_AHEAD) as pool, screen.progress("encoding clips", len(windows)) as advance:
        ahead = [pool.submit(_read_window, window) for window in windows[:_DECODED_AHEAD]]
        for number, window in enumerate(windows):
            if stop.requested:
                pool.shutdown(cancel_futures=True)
                stop.check(_KEPT)
            frames = ahead.pop(0).result()
            if number + _DECODED_AHEAD < len(windows):
                ahead.append(pool.submit(_read_window, windows[number + _DECODED_AHEAD]))
            if window in no_latents:
                with torch.no_grad():
                    latents = family.encode_video(vae, as_video(frames.to(device)))
                store.write("latents", caches.latents[window], {"latents": latents[0]})
            if window in no_teacher:
                assert encoder is not None
                grid = dataset.grids[window.bucket]
                seen = frames[list(grid.teacher_frames)].to(device)
                features = encoder(seen.unsqueeze(0), plan.encoder_size(grid))
                store.write("teacher", caches.teacher[window], pack_features(features.values[0], plan.config.crepa_cache_dtype))
            advance()
    del vae, encoder
    free_memory()


def _read_window(window: Window) -> Tensor:
    try:
        return read_frames(window.path, window.frames, (window.bucket.height, window.bucket.width))
    except Unreadable as error:
        raise UserError(f"{window.path}: {error}", "mend or remove it") from error


def as_video(frames: Tensor) -> Tensor:
    """Frames [F, 3, H, W] uint8 -> [1, 3, F, H, W] in [-1, 1], as a VAE takes them."""
    return (frames.float() / 127.5 - 1).transpose(0, 1).unsqueeze(0)


def _check_disk(
    plan: Plan, dataset: Dataset, root: Path, no_latents: set[Window], no_teacher: set[Window], screen: Screen
) -> None:
    latents = sum(latents_bytes(plan, window.bucket) for window in no_latents)
    teacher = sum(teacher_bytes(plan, dataset.grids[window.bucket]) for window in no_teacher)
    screen.say(f"caching in {root}: latents {in_words(latents)}, teacher features {in_words(teacher)}")
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if latents + teacher > free:
        raise UserError(
            f"cache_dir={root}: {in_words(latents + teacher)} are needed and {in_words(free)} are free",
            'set cache_dir to a larger disk, or a smaller crepa_encoder_image_size ("grid")',
        )


def free_memory() -> None:
    """Give back what the last stage held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
