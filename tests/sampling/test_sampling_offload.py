"""Videos of a transformer whose blocks' weights stay in host memory, beside those of one that is resident."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from common import tiny_family
from PIL import Image

from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.families.autoencoders import tile_vae
from crepatrain.placement.inference import block_lists
from crepatrain.sampling.comparison import (
    Candidate,
    Held,
    TrainedModel,
    candidates,
    encode_texts,
    open_pipeline,
    sample_candidate,
)
from crepatrain.training.text_encoders import TextEncoding

CPU, QUIET = torch.device("cpu"), Screen(quiet=True)
IN_HOST_MEMORY = Held(TextEncoding(offload=True), offload=True)


def videos(model, chosen, *, task="t2v", size=(5, 64, 96)):
    """Those of some candidates, and the pipeline."""
    settings = model.family.sample_defaults(*size, 16.0) | {"steps": 2}
    arguments = model.family.pipeline_arguments(settings) | encode_texts(model, "a square", "grey", CPU, QUIET)
    if task == "i2v":
        arguments["image"] = Image.new("RGB", size[:0:-1], (200, 30, 30))
    pipeline = open_pipeline(model, CPU, QUIET)
    return [sample_candidate(pipeline, model, one, arguments, 3, lambda: None) for one in chosen], pipeline


def expect_in_host_memory(transformer):
    """All blocks of each list but the one that computed last, whose weights are still in a buffer."""
    for blocks in block_lists(transformer):
        away = [all(weight.is_meta for weight in block.parameters()) for block in blocks]
        assert away.count(False) <= 1


@pytest.mark.parametrize(
    ("name", "size", "task", "expert"),
    [
        ("wan", "tiny", "t2v", None),
        pytest.param("wan", "tiny-i2v", "i2v", None, marks=pytest.mark.slow),
        pytest.param("wan", "tiny-a14b", "t2v", "low", marks=pytest.mark.slow),
        pytest.param("ltxvideo", "tiny", "t2v", None, marks=pytest.mark.slow),
        pytest.param("sanavideo", "tiny", "t2v", None, marks=pytest.mark.slow),
        pytest.param("kandinsky5_video", "tiny", "t2v", None, marks=pytest.mark.slow),
    ],
)
def test_videos_are_the_same_to_the_bit(name, size, task, expert, tiny_checkpoint):
    family = tiny_family(name, size, task=task, expert=expert)
    frames = (9, 64, 96) if name == "ltxvideo" else (5, 64, 96)
    model, chosen = TrainedModel(family, str(tiny_checkpoint(name, size)), None, {}, None), [Candidate("trained", None, 1.0)]
    expected, _ = videos(model, chosen, task=task, size=frames)
    found, pipeline = videos(replace(model, held=IN_HOST_MEMORY), chosen, task=task, size=frames)
    for part in ("transformer", "transformer_2") if expert else ("transformer",):
        expect_in_host_memory(getattr(pipeline, part))
    assert expected[0].std() > 0
    assert np.array_equal(found[0], expected[0])


def test_adapters_are_exchanged_around_blocks_in_host_memory(trained, wan):
    model = TrainedModel(tiny_family(), str(wan), None, {"adapter": trained / "pytorch_lora_weights.safetensors"}, None)
    chosen = candidates(model, (0.5, 1.0))
    expected, _ = videos(model, chosen)
    found, _ = videos(replace(model, held=IN_HOST_MEMORY), chosen)
    assert not np.array_equal(expected[0], expected[2])
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)


def test_a_whole_transformer_and_its_base_take_turns_in_host_memory(wan, tmp_path):
    family = tiny_family()
    transformer = family.load_transformer(str(wan), torch.float32)
    with torch.no_grad():
        transformer.proj_out.weight += 0.1
    transformer.save_pretrained(tmp_path / "transformer")
    model = TrainedModel(family, str(wan), None, {}, tmp_path / "transformer")
    chosen = candidates(model, (1.0,))
    expected, _ = videos(model, [*chosen, *chosen])
    found, _ = videos(replace(model, held=IN_HOST_MEMORY), [*chosen, *chosen])
    assert not np.array_equal(expected[0], expected[1])
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("how", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_quantised_base_takes_an_adapter(trained, wan, how):
    adapters = {"adapter": trained / "pytorch_lora_weights.safetensors"}
    model = TrainedModel(tiny_family(), str(wan), None, adapters, None)
    chosen = candidates(model, (1.0,))
    exact, _ = videos(model, chosen)
    resident, _ = videos(replace(model, held=Held(base_quantization=how)), chosen)
    ringed, _ = videos(replace(model, held=replace(IN_HOST_MEMORY, base_quantization=how)), chosen)
    for one, other, plain in zip(resident, ringed, exact, strict=True):
        assert np.array_equal(one, other)
        assert not np.array_equal(one, plain)
        assert np.abs(one.astype(int) - plain).mean() < (6 if how == "int8" else 40)


@pytest.mark.parametrize(
    ("name", "size"), [("wan", "tiny"), ("ltxvideo", "tiny"), ("kandinsky5_video", "tiny"), ("sanavideo", "tiny-720p")]
)
@torch.no_grad()
def test_every_vae_encodes_and_decodes_in_tiles(name, size, tiny_checkpoint):
    family = tiny_family(name, size)
    whole, tiled = (family.load_vae(str(tiny_checkpoint(name, size)), torch.float32) for _ in range(2))
    tile_vae(tiled)
    tiled.tile_sample_min_height = tiled.tile_sample_min_width = 96
    tiled.tile_sample_stride_height = tiled.tile_sample_stride_width = 64
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(2, 3, 9, 128, 128, generator=generator) * 2 - 1
    latents = family.encode_video(tiled, clip)
    expected = family.encode_video(whole, clip)
    assert latents.shape == expected.shape
    assert not torch.equal(latents, expected), "tiles are blended"
    assert family.decode_latents(tiled, latents).shape == family.decode_latents(whole, latents).shape


def test_a_vae_without_tiles_is_refused():
    with pytest.raises(UserError, match=r"vae_tiling=true: Linear can't encode and decode in tiles\n.*set vae_tiling to false"):
        tile_vae(torch.nn.Linear(1, 1))
