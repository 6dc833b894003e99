"""What is known of families and checkpoints without loading them."""

import math
from dataclasses import replace

import pytest
from common import tiny_family

from crepatrain.families import family_class
from crepatrain.specs import FAMILIES, LTXVIDEO, WAN, Checkpoint

PLAIN = Checkpoint({}, {}, {}, {}, "folder")
LTX = LTXVIDEO.released["ltx-2b"].scheduler
TOKENS = (1, 256, 1024, 1560, 4096, 5632, 32760)


def shift(tokens: int, **scheduler) -> float:
    return replace(PLAIN, scheduler=scheduler).flow_shift(tokens)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"flow_shift": 3.0}, 3.0),
        ({"flow_shift": 8}, 8.0),
        ({"shift": 5.0}, 5.0),
        ({"shift": 5.0, "use_dynamic_shifting": False}, 5.0),
        ({"flow_shift": None, "shift": 2.0}, 2.0),
        ({"flow_shift": 3.0, "shift": 1.0}, 3.0),
        ({}, 1.0),
    ],
)
def test_a_static_shift_is_the_schedulers_whatever_the_clip(scheduler, expected):
    assert [shift(tokens, **scheduler) for tokens in TOKENS] == [expected] * len(TOKENS)


@pytest.mark.parametrize("scheduler", [LTX, {"use_dynamic_shifting": True}], ids=["LTX-Video's", "diffusers' defaults"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_dynamic_shift_is_that_of_the_pipeline_and_its_scheduler(scheduler, tokens):
    """The pipeline's mu for that many tokens, and what the scheduler makes of it: s -> e^mu / (e^mu + 1 / s - 1)."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

    theirs = FlowMatchEulerDiscreteScheduler.from_config(dict(scheduler))
    known = theirs.config
    mu = calculate_shift(tokens, known.base_image_seq_len, known.max_image_seq_len, known.base_shift, known.max_shift)
    ours = shift(tokens, **scheduler)
    assert ours == pytest.approx(math.exp(mu), rel=1e-9)
    for s in (0.01, 0.3, 0.5, 0.9):
        assert ours * s / (1 + (ours - 1) * s) == pytest.approx(theirs.time_shift(mu, 1.0, s), rel=1e-6)


def test_a_dynamic_shift_grows_with_the_clip():
    shifts = [shift(tokens, **LTX) for tokens in TOKENS]
    assert shifts == sorted(shifts)
    assert shifts[0] < shifts[-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_a_pipeline_for_every_task_of_its_checkpoints(name):
    """And what its pipelines, transformers and layers are called is what diffusers calls them."""
    import diffusers

    spec = FAMILIES[name]
    assert family_class(name).spec is spec
    assert hasattr(diffusers, spec.transformer_class)
    for model in (*spec.released.values(), *family_class(name).tiny.values()):
        variant = spec.variant(model.checkpoint, None)
        assert set(variant.tasks) <= spec.pipelines.keys()
        assert variant.transformer in variant.weights
        assert "scheduler" not in variant.weights
        assert not [part for part in variant.weights if part.startswith("tokenizer")]
        height, width, frames = variant.size
        geometry = spec.geometry(model.transformer, model.vae)
        assert geometry.token_grid(frames, height, width).tokens > 1
        assert spec.default_block < geometry.depth
    assert all(hasattr(diffusers, pipeline) for pipeline in spec.pipelines.values())


@pytest.mark.parametrize(("family", "size"), [(family, size) for family in FAMILIES for size in family_class(family).tiny])
def test_the_linears_of_a_spec_are_those_of_its_transformer(family, size):
    """validate-config goes by the spec, fit by the transformer."""
    from torch import nn

    from crepatrain.training.lora import target_modules

    spec, transformer = FAMILIES[family], tiny_family(family, size).empty_transformer()
    found = {
        name.split(".", maxsplit=2)[2]
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{spec.blocks}.")
    }
    only_with_images = {linear for linear in spec.linears if "add_" in linear}
    assert found <= set(spec.linears)
    assert set(spec.linears) - found <= only_with_images
    assert len(target_modules(transformer, spec.lora_targets, spec)) >= 8 * tiny_family(family, size).geometry.depth


def test_the_linears_of_an_image_encoder_are_there_in_the_checkpoint_that_has_one():
    transformer = tiny_family("wan", "tiny-i2v").empty_transformer()
    names = {name for name, _ in transformer.named_modules()}
    assert {f"blocks.0.{linear}" for linear in WAN.linears} <= names
