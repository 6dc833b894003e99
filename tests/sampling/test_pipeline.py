"""The pipeline around a transformer in training."""

import pytest
import torch
from common import tiny_family

from crepatrain.sampling.pipeline import call, training_pipeline

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
