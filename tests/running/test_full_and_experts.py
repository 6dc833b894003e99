"""Runs of every weight, of experts, of images, of other families."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from common import render_image, tiny_family, tiny_variants
from diffusers import WanTransformer3DModel
from runs import (
    ADAPTER,
    FULL,
    Batches,
    Write,
    adapter,
    column,
    last_checkpoint,
    lines,
    names,
    of,
    same_tensors,
    snapshot,
    timeless,
    train,
)
from safetensors import safe_open
from safetensors.torch import load_file

from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.specs import FAMILIES


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_every_weight_is_trained_and_written_as_a_transformer(config_file: Write, wan: Path, precision: str, dtype: torch.dtype):
    folder = train(config_file, max_train_steps=2, mixed_precision=precision, **FULL)
    assert "transformer" in names(folder)
    assert not {"adapters", ADAPTER} & set(names(folder))
    trained = load_file(last_checkpoint(folder) / "transformer.safetensors")
    begun = load_file(wan / "transformer" / "diffusion_pytorch_model.safetensors")
    assert trained.keys() == begun.keys()
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}, "bf16 would round small steps away"
    assert [name for name in trained if torch.equal(trained[name], begun[name])] == []
    written = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    loaded = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    assert same_tensors(dict(loaded.state_dict()), {name: tensor.to(dtype).float() for name, tensor in trained.items()})
    assert dict(loaded.config)["num_layers"] == 10


def test_a_full_run_in_two_parts_is_the_run_in_one(config_file: Write, tmp_path: Path):
    changes = {
        "caption_dropout": 0.5,
        "crepa_warmup_steps": 1,
        "gradient_accumulation_steps": 2,
        "mixed_precision": "bf16",
        **FULL,
    }
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=2, **changes)
    parts = train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=1, **changes)
    assert names(parts / "checkpoints") == ["step-000001"]
    begun = load_file(last_checkpoint(parts) / "transformer.safetensors")
    train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=2, **changes)
    assert timeless(whole) == timeless(parts)
    inside = [last_checkpoint(folder) for folder in (whole, parts)]
    assert names(inside[0]) == names(inside[1])
    for file in ("transformer", "projector", "transformer_learner", "projector_learner"):
        assert same_tensors(*(load_file(checkpoint / f"{file}.safetensors") for checkpoint in inside)), file
    assert not same_tensors(begun, load_file(inside[0] / "transformer.safetensors"))
    results = [[content for content, _ in snapshot(folder / "transformer").values()] for folder in (whole, parts)]
    assert results[0] == results[1]


def test_a_full_run_and_an_adapters_run_are_different_runs(config_file: Write):
    train(config_file, max_train_steps=1)
    with pytest.raises(UserError, match='model_type: "lora" there, "full" here'):
        train(config_file, max_train_steps=2, model_type="full")


def test_a_full_run_trains_the_blocks_beyond_crepas_too(config_file: Write, wan: Path):
    """And without CREPA, and with what frees memory; the checkpoint that it began with stays as it was."""
    before = snapshot(wan / "transformer")
    folder = train(
        config_file, max_train_steps=1, crepa_enabled=False, gradient_checkpointing=False, optimizer="adafactor", **FULL
    )
    begun = load_file(wan / "transformer" / "diffusion_pytorch_model.safetensors")
    written = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not [name for name in written if torch.equal(written[name], begun[name])]
    assert snapshot(wan / "transformer") == before


def test_a_full_run_says_how_to_load_what_it_made(config_file: Write, capsys: pytest.CaptureFixture[str]):
    plan = read_plan(config_file(max_train_steps=1, **FULL))
    fit(plan, Screen())
    shown = "".join(capsys.readouterr().out.split())
    assert f'WanTransformer3DModel.from_pretrained("{plan.config.loop.output_dir}",subfolder="transformer")' in shown
    assert ADAPTER not in shown


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(("expert", "inside"), [("high", (0.875, 1.0)), ("low", (0.0, 0.875))])
def test_an_expert_is_trained_alone_at_its_noise_levels(
    config_file: Write, tiny_checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], expert: str, inside: tuple, kind: str
):
    checkpoint = Path(shutil.copytree(tiny_checkpoint("wan", "tiny-a14b"), tmp_path / "wan-a14b"))
    own, other = ("transformer", "transformer_2") if expert == "high" else ("transformer_2", "transformer")
    (checkpoint / other / "diffusion_pytorch_model.safetensors").unlink()
    changes = {"wan_expert": expert, "model_type": kind, "output_name": "squares", "max_train_steps": 3, "train_batch_size": 3}
    seen = Batches()
    plan = read_plan(config_file(**of(checkpoint), **changes))
    fit(plan, Screen(), subscribers=[seen])
    folder = Path(plan.config.loop.output_dir)
    sigma = torch.cat([batch.sigma for batch in seen])
    assert len(sigma) == 9
    assert inside[0] <= sigma.min()
    assert sigma.max() < inside[1]
    shown = "".join(capsys.readouterr().out.split())
    if kind == "full":
        begun = load_file(checkpoint / own / "diffusion_pytorch_model.safetensors")
        written = load_file(folder / own / "diffusion_pytorch_model.safetensors")
        assert begun.keys() == written.keys()
        assert all((written[name] - begun[name]).abs().max() < 0.1 for name in begun), "it begins with its own weights"
        assert not (folder / other).exists()
        assert f'subfolder="{own}"' in shown
    else:
        assert names(folder / "adapters") == [f"squares_{expert}_noise-000003.safetensors"]
        for path in (folder / ADAPTER, folder / "adapters" / f"squares_{expert}_noise-000003.safetensors"):
            with safe_open(path, framework="pt") as file:
                assert file.metadata()["crepatrain.expert"] == expert
        assert ("load_into_transformer_2=True" in shown) == (expert == "low")


def test_experts_are_different_runs(config_file: Write, tiny_checkpoint):
    checkpoint = of(tiny_checkpoint("wan", "tiny-a14b"))
    train(config_file, max_train_steps=1, wan_expert="high", **checkpoint)
    with pytest.raises(UserError, match='wan_expert: "high" there, "low" here'):
        train(config_file, max_train_steps=2, wan_expert="low", **checkpoint)


def test_an_adapter_scaled_by_the_root_of_its_rank_is_written_so(config_file: Write):
    folder = train(config_file, max_train_steps=1, lora_rank=4, lora_alpha=6.0, lora_use_rslora=True)
    trained = load_file(last_checkpoint(folder) / "adapter.safetensors")
    family = tiny_family()
    for name, tensor in trained.items():
        module, _, end = name.partition(".lora_")
        scale = 6.0 / 4**0.5 if end == "B.weight" else 1.0
        written = adapter(folder)[f"{family.export_name(module)}.lora_{end}"]
        torch.testing.assert_close(written, tensor * scale, rtol=1e-6, atol=0)
    assert len(trained) == len(adapter(folder))


def test_clips_and_images_train_together(config_file: Write, clips_and_images: Path):
    """Six windows and two images, in batches of their own."""
    seen = Batches()
    changes = {"train_data": str(clips_and_images), "max_train_steps": ..., "num_train_epochs": 1, "train_batch_size": 2}
    folder = train(config_file, subscribers=[seen], **changes)
    assert [len({key.startswith("image") for key in batch.keys}) for batch in seen] == [1] * 4
    shapes = [batch.latents.shape[2] for batch in seen]
    assert sorted(shapes) == [1, 3, 3, 3]
    (images,) = [line for line, frames in zip(lines(folder), shapes, strict=True) if frames == 1]
    assert images["crepa_alignment_score"] == pytest.approx(images["crepa_similarity_self"], abs=1e-6)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines(folder))


def test_crepa_on_images_is_plain_repa(config_file: Write, tmp_path: Path):
    data = tmp_path / "images"
    data.mkdir()
    for index in range(3):
        render_image(data / f"{index}.png", seed=index)
        (data / f"{index}.txt").write_text(f"blocks {index}", encoding="utf-8")
    runs = [
        train(config_file, train_data=str(data), output_dir=str(tmp_path / str(distance)), crepa_adjacent_distance=distance)
        for distance in (1, 0)
    ]
    assert timeless(runs[0]) == timeless(runs[1])
    assert same_tensors(*map(adapter, runs))
    assert column(runs[0], "crepa_alignment_score") == pytest.approx(column(runs[0], "crepa_similarity_self"), abs=1e-6)


def test_images_are_refused_before_anything_is_computed(
    config_file: Write, clips_and_images: Path, tiny_checkpoint, tmp_path: Path
):
    fresh = tmp_path / "fresh"
    with pytest.raises(UserError, match=r"image-0\.png: it is an image, and Wan 2\.1 image-to-video is trained on clips only"):
        train(config_file, train_data=str(clips_and_images), cache_dir=str(fresh), **of(tiny_checkpoint("wan", "tiny-i2v")))
    assert not (fresh / "latents").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "which",
    [(family, size) for family, size, variant in tiny_variants() if {"t2v", "i2v"} <= set(variant.tasks)],
    ids="-".join,
)
def test_without_its_first_frames_an_image_to_video_run_is_one_from_text(
    config_file: Write, clips_and_images: Path, tiny_checkpoint, tmp_path: Path, which: tuple[str, str]
):
    """And with them an image is still trained as from text, as nothing would be left to learn beside it."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("clip-0.mp4", "clip-0.txt", "image-0.png", "image-0.txt"):
        shutil.copy(clips_and_images / name, data)
    common = {"train_data": str(data), "max_windows_per_clip": 1, "crepa_enabled": False, "learning_rate": 1e-6, "fps": 16}
    common |= {"max_train_steps": ..., "num_train_epochs": 1, "caption_dropout": 0.0}
    losses, frames = {}, []
    for name, changes in {
        "text": {"task": "t2v"},
        "dropped": {"task": "i2v", "i2v_dropout": 1.0},
        "given": {"task": "i2v"},
    }.items():
        seen, checkpoint = Batches(), of(tiny_checkpoint(*which))
        folder = train(config_file, subscribers=[seen], output_dir=str(tmp_path / name), **common, **changes, **checkpoint)
        losses[name] = column(folder, "diffusion_loss")
        frames = [batch.latents.shape[2] for batch in seen]
        shown = [batch.conditioning["given"].item() if "given" in batch.conditioning else None for batch in seen]
        share = {"text": None, "dropped": 0.0, "given": 1.0}[name]
        assert shown == [None if count == 1 else share for count in frames]
    assert len(frames) == len(set(frames)) == 2
    assert losses["dropped"] == pytest.approx(losses["text"], rel=1e-3)
    for count, text, given in zip(frames, losses["text"], losses["given"], strict=True):
        assert (given == pytest.approx(text, rel=1e-3)) == (count == 1)


def test_kandinsky_trains_batches_of_captions_of_other_lengths(
    config_file: Write, clips_and_images: Path, tiny_checkpoint, tmp_path: Path
):
    data = Path(shutil.copytree(clips_and_images, tmp_path / "data"))
    for name, caption in {"clip-0": "a", "clip-1": "two words", "clip-2": "two wards", "image-0": "b"}.items():
        (data / f"{name}.txt").write_text(caption, encoding="utf-8")
    checkpoint = of(tiny_checkpoint("kandinsky5_video"))
    changes = {"train_data": str(data), "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": ...}
    seen = Batches()
    folder = train(config_file, subscribers=[seen], num_train_epochs=2, caption_dropout=0.4, **changes, **checkpoint)
    assert all(math.isfinite(line["loss"]) for line in lines(folder))
    lengths = [batch.text["prompt_embeds"].shape[1] for batch in seen]
    of_clip = {key.split(" ")[0]: batch.text["prompt_embeds"].shape[1] for batch in seen for key in batch.keys}
    assert of_clip.keys() == {"clip-0.mp4", "clip-1.mp4", "clip-2.mp4", "image-0.png", "image-1.jpg"}
    assert lengths[0::2] == lengths[1::2], "the micro-batches of a step"
    (empty,) = tiny_family("kandinsky5_video").count_tokens(checkpoint["pretrained_model_name_or_path"], [""])
    assert empty in lengths, "the captions of a whole step were dropped"
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_every_family_can_be_trained(config_file: Write, tiny_checkpoint, family: str):
    checkpoint = tiny_checkpoint(family)
    folder = train(config_file, max_train_steps=1, **FULL, **of(checkpoint))
    begun = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    written = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == begun.keys()
    assert not [name for name in begun if torch.equal(written[name], begun[name])]
