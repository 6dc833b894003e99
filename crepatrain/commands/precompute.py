"""Fills the caches: text, latents, teacher features. One model stage after the other, each freed before the next."""

import gc
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crepatrain.commands.preflight import Dataset, latents_bytes, size, teacher_bytes
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
class Prepared:
    """A dataset whose caches are full.

    Attributes:
        samples: one per window, in the dataset's order.
        empty_text: key of the empty caption.
        teacher_grids: (rows, columns) of the teacher's patches, per bucket.
        digest: of all samples; another one is another dataset.
    """

    samples: tuple[Sample, ...]
    store: CacheStore
    empty_text: str
    teacher_grids: Mapping[Bucket, tuple[int, int]]
    digest: str


def fill_caches(
    plan: Plan, dataset: Dataset, screen: Screen, device: torch.device, stop: StopSignal, *, teacher: bool
) -> Prepared:
    """Compute what is missing; what is there is never written again.

    Args:
        teacher: whether CREPA's teacher will be asked.

    Raises:
        UserError: a model that can't be loaded, a clip that can't be decoded any more, a full disk.
        Stopped: a signal came; every entry written so far stays.
    """
    assert plan.config.cache_dir is not None
    store = CacheStore(Path(plan.config.cache_dir))
    captions = sorted({window.clip.caption for window in dataset.cut.windows} | {""})
    text_keys = _text_keys(plan, dataset, device, captions)
    latents_keys = _latents_keys(plan, dataset)
    source = plan.config.crepa_feature_source if teacher else None
    teacher_keys = _teacher_keys(plan, dataset, device) if source == "cached" else {}
    dataset.digests.save()
    _fill_text(plan, store, text_keys, screen, device, stop)
    _fill_video(plan, dataset, store, latents_keys, teacher_keys, screen, device, stop)

    samples = tuple(
        Sample(
            name=window.name,
            bucket=window.bucket,
            latents=latents_keys[window],
            text=text_keys[window.clip.caption],
            teacher=teacher_keys.get(window),
            pixels=(window.path, _teacher_frames(dataset, window)) if source == "pixels" else None,
        )
        for window in dataset.cut.windows
    )
    facts = "\n".join(f"{sample.latents} {sample.text}" for sample in samples)
    return Prepared(
        samples=samples,
        store=store,
        empty_text=text_keys[""],
        teacher_grids={bucket: plan.teacher_grid(grid) for bucket, grid in dataset.grids.items()},
        digest=hashlib.sha256(facts.encode()).hexdigest(),
    )


def _text_keys(plan: Plan, dataset: Dataset, device: torch.device, captions: Sequence[str]) -> dict[str, str]:
    folder = model_folder(plan)
    facts = {
        "family": plan.spec.name,
        "length": plan.spec.text_length,
        "encoder": dataset.digests.folder(folder / "text_encoder"),
        "tokenizer": dataset.digests.folder(folder / "tokenizer"),
        "dtype": str(encoding_dtype(device)),
    }
    return {caption: entry_key(kind="text", caption=caption, **facts) for caption in captions}


def _latents_keys(plan: Plan, dataset: Dataset) -> dict[Window, str]:
    facts = {
        "family": plan.spec.name,
        "vae": dataset.digests.folder(model_folder(plan) / "vae"),
        "dtype": plan.config.vae_dtype,
    }
    return {window: entry_key(kind="latents", **_source(window, window.frames), **facts) for window in dataset.cut.windows}


def _teacher_keys(plan: Plan, dataset: Dataset, device: torch.device) -> dict[Window, str]:
    encoder = dataset.digests.folder(encoder_folder(plan))
    return {
        window: entry_key(
            kind="teacher",
            **_source(window, _teacher_frames(dataset, window)),
            encoder=encoder,
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


def _fill_text(
    plan: Plan, store: CacheStore, keys: Mapping[str, str], screen: Screen, device: torch.device, stop: StopSignal
) -> None:
    missing = [caption for caption, key in keys.items() if not store.has("text", key)]
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
                store.write("text", keys[caption], text)
                advance()
    del encoder
    free_memory()


def _fill_video(
    plan: Plan,
    dataset: Dataset,
    store: CacheStore,
    latents_keys: Mapping[Window, str],
    teacher_keys: Mapping[Window, str],
    screen: Screen,
    device: torch.device,
    stop: StopSignal,
) -> None:
    """One pass over the clips: each is decoded once for its latents and its features."""
    no_latents = {window for window, key in latents_keys.items() if not store.has("latents", key)}
    no_teacher = {window for window, key in teacher_keys.items() if not store.has("teacher", key)}
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
                store.write("latents", latents_keys[window], {"latents": latents[0]})
            if window in no_teacher:
                assert encoder is not None
                grid = dataset.grids[window.bucket]
                seen = frames[list(grid.teacher_frames)].to(device)
                features = encoder(seen.unsqueeze(0), plan.encoder_size(grid))
                store.write("teacher", teacher_keys[window], pack_features(features.values[0], plan.config.crepa_cache_dtype))
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
    screen.say(f"caching in {root}: latents {size(latents)}, teacher features {size(teacher)}")
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if latents + teacher > free:
        raise UserError(
            f"cache_dir={root}: {size(latents + teacher)} are needed and {size(free)} are free",
            'set cache_dir to a larger disk, or a smaller crepa_encoder_image_size ("grid")',
        )


def free_memory() -> None:
    """Give back what the last stage held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
