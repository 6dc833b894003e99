"""The pipeline around a transformer in training."""

from dataclasses import replace

import pytest
import torch
from common import tiny_family
from PIL import Image

from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.families import family_class, get_family
from crepatrain.sampling.comparison import TrainedModel, _set_tiled_attention, open_pipeline
from crepatrain.sampling.pipeline import call, training_pipeline
from crepatrain.tensors import Batch

CPU = torch.device("cpu")


@pytest.mark.parametrize(("size", "expert"), [("tiny", None), ("tiny-a14b", "low"), ("tiny-a14b", "high")])
def test_the_transformer_in_training_is_the_one_that_is_asked(size, expert, tiny_checkpoint):
    folder, family = tiny_checkpoint("wan", size), tiny_family("wan", size, expert=expert)
    transformer = family.load_transformer(str(folder), torch.float32)
    vae = family.load_vae(str(folder), torch.float32)
    pipeline = training_pipeline(family, folder, transformer, vae, ("text_encoder", "tokenizer"), CPU)
    assert getattr(pipeline, family.variant.transformer) is transformer
    assert pipeline.vae is vae
    assert pipeline.text_encoder is None
    assert pipeline.tokenizer is None


@torch.no_grad()
def test_it_makes_frames_of_encoded_prompts(tiny_checkpoint):
    folder, family = tiny_checkpoint("wan", "tiny"), tiny_family("wan", "tiny")
    transformer, vae = family.load_transformer(str(folder), torch.float32), family.load_vae(str(folder), torch.float32)
    pipeline = training_pipeline(family, folder, transformer, vae, ("text_encoder", "tokenizer"), CPU)
    generator = torch.Generator().manual_seed(0)
    (shape,) = family.text_shapes().values()
    text = family.collate_text([{name: torch.randn(shape, generator=generator) for name in family.text_shapes()}])
    steps = []
    arguments = {"height": 64, "width": 96, "num_frames": 5, "num_inference_steps": 2} | family.text_arguments(text, text)
    frames = call(pipeline, arguments | {"prompt": None}, generator, lambda: steps.append(1))
    assert frames.shape == (5, 64, 96, 3)
    assert len(steps) == 2


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize(("size", "causal"), [("tiny", False), ("tiny-0.9.5", True)])
@torch.no_grad()
def test_videos_of_a_run_have_the_positions_that_it_is_trained_on(size, causal, task, tiny_checkpoint):
    """Of encoded prompts, with guidance, with the settings of a recipe and with an image."""
    folder, family = tiny_checkpoint("ltxvideo", size), tiny_family("ltxvideo", size, task=task)
    transformer, vae = family.load_transformer(str(folder), torch.float32), family.load_vae(str(folder), torch.float32)
    pipeline = training_pipeline(family, folder, transformer, vae, family.variant.text_parts, CPU)
    generator = torch.Generator().manual_seed(0)
    (shape,) = family.text_shapes().values()
    text, negative = (family.collate_text([{"prompt_embeds": torch.randn(9, shape[1], generator=generator)}]) for _ in range(2))
    angles = []
    transformer.rope.register_forward_hook(lambda _module, _arguments, output: angles.append(output[0]))
    settings = family.sample_defaults(17, 64, 96, 16.0) | {"steps": 2}
    arguments = family.pipeline_arguments(settings) | family.text_arguments(text, negative)
    arguments |= {"prompt": None, "negative_prompt": None}
    if task == "i2v":
        arguments["image"] = Image.new("RGB", (96, 64), (200, 30, 30))
    frames = call(pipeline, arguments, generator, lambda: None)
    assert frames.shape == (17, 64, 96, 3)
    sampled = angles[0][:1]
    latents = torch.randn(1, 8, 3, 2, 3, generator=generator)
    batch = Batch(latents, latents, torch.tensor([0.5]), text, family.geometry.token_grid(17, 64, 96), 16.0, ("a",))
    family.denoise(transformer, latents, batch.sigma, batch)
    torch.testing.assert_close(angles[-1], sampled, rtol=0, atol=5e-3)
    seconds = (0, 1, 9) if causal else (0, 8, 16)
    places = [(t / 16, 32.0 * h, 32.0 * w) for t in seconds for h in range(2) for w in range(3)]
    expected, _ = transformer.rope(torch.empty(1, 18, 1), video_coords=torch.tensor(places).T.unsqueeze(0))
    torch.testing.assert_close(sampled, expected, rtol=0, atol=5e-3)


def test_a_base_that_diffusers_can_not_sample_is_refused(tiny_checkpoint):
    shapes = family_class("ltxvideo").tiny["tiny-0.9.5"]
    dynamic = replace(shapes, scheduler={**shapes.scheduler, "use_dynamic_shifting": True})
    family = get_family("ltxvideo", dynamic.checkpoint)
    model = TrainedModel(family, str(tiny_checkpoint("ltxvideo", "tiny-0.9.5")), None, {}, None)
    with pytest.raises(UserError, match=r"use_dynamic_shifting, with which LTXConditionPipeline can't sample\n.*another base"):
        open_pipeline(model, CPU, Screen(quiet=True))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("size", ["tiny", "tiny-nabla"])
def test_attention_over_tiles_is_compiled_where_it_is_sampled_on_a_gpu(size: str, compiled: bool):
    family = tiny_family("kandinsky5_video", size)
    transformer = family.empty_transformer()
    _set_tiled_attention(family, transformer, compiled=compiled)
    found = {"forward" in vars(block) for block in family.blocks(transformer)}
    assert found == {compiled and size == "tiny-nabla"}
