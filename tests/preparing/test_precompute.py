"""What the caches' entries are called, and what is in those of first frames."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import context_of

from crepatrain.config.plan import Plan, read_plan
from crepatrain.data.cache import entry_key
from crepatrain.data.decode import FrameReader
from crepatrain.preparing.precompute import Caches, fill_caches, plan_caches
from crepatrain.preparing.preflight import Dataset, read_dataset
from crepatrain.training.build import build_family, build_image_encoder, build_vae

CPU = torch.device("cpu")


@pytest.fixture
def planned(config_file, clips_and_images, tiny_checkpoint) -> Callable[..., tuple[Plan, Dataset, Caches]]:
    def command(family: str = "wan", size: str = "tiny", *, device: str = "cpu", **changes: Any) -> tuple[Plan, Dataset, Caches]:
        of = {"model_family": family, "pretrained_model_name_or_path": str(tiny_checkpoint(family, size))}
        common = {"train_data": str(clips_and_images), "crepa_enabled": False, "unusable_clips": "skip"}
        plan = read_plan(config_file(**{**common, **of, **changes}))
        context = context_of(plan, device=device)
        dataset = read_dataset(context)
        return plan, dataset, plan_caches(context, dataset, teacher=False)

    return command


def names(caches: Caches) -> tuple[list[str], dict[str, str]]:
    """Of the latents' entries, and of the captions'."""
    return list(caches.latents.values()), dict(caches.text)


def test_only_clips_of_an_image_to_video_run_have_first_frames(planned):
    _, _, caches = planned("ltxvideo")
    assert caches.image == {}
    assert {sample.image for sample in caches.samples} == {None}
    _, dataset, caches = planned("ltxvideo", task="i2v")
    assert set(caches.image) == {window for window in dataset.clips.windows if len(window.frames) > 1}
    assert len(set(caches.image.values())) == len(caches.image) > 0
    for window, sample in zip(dataset.clips.windows, caches.samples, strict=True):
        assert sample.image == caches.image.get(window)
        assert (sample.image is None) == (sample.bucket.frames == 1)


def test_both_tasks_share_latents_and_captions(planned):
    *_, text = planned("ltxvideo")
    *_, image = planned("ltxvideo", task="i2v")
    assert names(text) == names(image)


def test_both_experts_share_everything(planned):
    *_, high = planned(size="tiny-i2v-a14b", wan_expert="high")
    *_, low = planned(size="tiny-i2v-a14b", wan_expert="low")
    assert names(high) == names(low)
    assert list(high.image.values()) == list(low.image.values())
    assert high.models.keys() ^ low.models.keys() == {"transformer", "transformer_2"}


def test_other_models_precisions_and_lengths_have_other_entries(planned):
    keys = [
        set(planned("wan", "tiny-i2v")[2].image.values()),
        set(planned("wan", "tiny-i2v", num_frames=5)[2].image.values()),  # its condition spans the clip
        set(planned("wan", "tiny-i2v-a14b", wan_expert="low")[2].image.values()),
        set(planned("wan", "tiny-ti2v", task="i2v")[2].image.values()),
        set(planned("ltxvideo", task="i2v")[2].image.values()),
        set(planned("ltxvideo", task="i2v", vae_dtype="bfloat16")[2].image.values()),
        set(planned("ltxvideo", task="i2v", height=32)[2].image.values()),
    ]
    assert len(set().union(*keys)) == sum(map(len, keys))


def test_what_changes_an_entry_is_in_its_name_and_what_does_not_is_not(planned):
    of = {"family": "wan", "size": "tiny-i2v"}
    *_, plain = planned(**of)
    *_, offloaded = planned(**of, text_encoder_offload=True)
    assert names(offloaded) == names(plain)
    *_, quantized = planned(**of, text_encoder_quantization="int8")
    *_, further = planned(**of, text_encoder_quantization="nf4")
    for one, other in ((quantized, plain), (further, plain), (quantized, further)):
        assert set(one.text.values()).isdisjoint(other.text.values())
    assert names(quantized)[0] == names(plain)[0]
    *_, tiled = planned(**of, vae_tiling=True)
    assert dict(tiled.text) == dict(plain.text)
    assert set(tiled.latents.values()).isdisjoint(plain.latents.values())
    assert set(tiled.image.values()).isdisjoint(plain.image.values())


def test_an_encoder_in_host_memory_fills_the_same_cache(planned, tmp_path):
    stored = []
    for offload in (False, True):
        plan, _, caches = planned(cache_dir=str(tmp_path / str(offload)), text_encoder_offload=offload, max_windows_per_clip=1)
        fill_caches(context_of(plan), caches)
        stored.append({caption: caches.store.read("text", key) for caption, key in caches.text.items()})
    resident, away = stored
    assert resident.keys() == away.keys()
    for caption, text in resident.items():
        assert all(torch.equal(away[caption][name], tensor) for name, tensor in text.items())


def test_what_an_image_encoder_saw_in_another_precision_is_another_entry(planned):
    """As captions are: encoders run in bf16 on a GPU and in fp32 on a CPU."""
    *_, here = planned("wan", "tiny-i2v")
    *_, there = planned("wan", "tiny-i2v", device="cuda")
    assert set(here.text.values()).isdisjoint(there.text.values())
    assert set(here.image.values()).isdisjoint(there.image.values())


def test_a_vaes_entries_are_the_same_on_every_device(planned):
    *_, here = planned("ltxvideo", task="i2v")
    *_, there = planned("ltxvideo", task="i2v", device="cuda")
    assert list(here.latents.values()) == list(there.latents.values())
    assert list(here.image.values()) == list(there.image.values())


@pytest.mark.parametrize(
    ("family", "size", "names"),
    [
        ("wan", "tiny-i2v", {"condition", "image_embeds"}),
        ("wan", "tiny-ti2v", {"first_frame"}),
        ("kandinsky5_video", "tiny", {"first_frame"}),
    ],
)
def test_an_entry_holds_what_the_family_makes_of_the_first_frame(planned, tmp_path, family, size, names):
    plan, _, caches = planned(family, size, task="i2v", cache_dir=str(tmp_path / "cache"), max_windows_per_clip=1, fps=16)
    fill_caches(context_of(plan), caches)
    family_ = build_family(plan)
    vae, encoder = build_vae(plan, family_, CPU), build_image_encoder(plan, family_, CPU)
    assert len(caches.image) == 3
    for window, key in caches.image.items():
        entry = caches.store.read("image", key)
        assert entry.keys() == names
        frame = FrameReader().read(window.clip, window.frames[:1], (window.bucket.height, window.bucket.width))
        pixels = (frame.float() / 127.5 - 1).permute(1, 0, 2, 3)[None]
        with torch.no_grad():
            expected = family_.encode_image(vae, encoder, pixels, len(window.frames))
        for name in names:
            torch.testing.assert_close(entry[name], expected[name][0])


@pytest.mark.parametrize(
    ("family", "size", "text_parts", "image_parts", "seen"),
    [
        ("wan", "tiny-i2v", ("text_encoder", "tokenizer"), ("vae", "image_encoder", "image_processor"), "torch.float32"),
        ("ltxvideo", "tiny", ("text_encoder", "tokenizer"), ("vae",), None),
        (
            "kandinsky5_video",
            "tiny",
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
            ("vae",),
            None,
        ),
    ],
)
def test_caches_are_found_again_by_later_versions(planned, family, size, text_parts, image_parts, seen):
    """The names of entries, fact by fact: of text as every version since the first has written them, of pixels since 0.2."""
    plan, _, caches = planned(family, size, task="i2v", fps=16, vae_dtype="float32")
    text = {
        "family": family,
        "length": plan.spec.text_length_of(plan.variant),
        "models": {part: caches.models[part] for part in text_parts},
        "dtype": "torch.float32",
    }
    assert caches.text == {caption: entry_key(kind="text", caption=caption, **text) for caption in caches.text}
    assert "" in caches.text
    assert len(caches.text) > 3
    image = {"family": family, "dtype": "float32", "seen": seen, "models": {part: caches.models[part] for part in image_parts}}
    assert caches.image
    for window, key in caches.image.items():
        pixels = {
            "file": window.clip.digest,
            "size": [window.bucket.height, window.bucket.width],
            "crop": "centre, bicubic, antialias",
            "read": "counted from the first",
        }
        first, frames = list(window.frames[:1]), list(window.frames)
        assert key == entry_key(kind="image", length=len(frames), frames=first, **pixels, **image)
        latents = {"family": family, "vae": caches.models["vae"], "dtype": "float32"}
        assert caches.latents[window] == entry_key(kind="latents", frames=frames, **pixels, **latents)
