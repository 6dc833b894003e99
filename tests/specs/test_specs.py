"""What is known of families and checkpoints without loading them."""

import math
from dataclasses import replace

import pytest
from common import tiny_family

from crepatrain.families import family_class
from crepatrain.specs import FAMILIES
from crepatrain.specs.base import Checkpoint, Variant, usual_parts
from crepatrain.specs.ltxvideo import LTXVIDEO
from crepatrain.specs.wan import WAN

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
    """And its pipelines and transformers have diffusers' names."""
    import diffusers

    spec = FAMILIES[name]
    assert family_class(name).spec is spec
    assert hasattr(diffusers, spec.transformer_class)
    for model in (*spec.released.values(), *family_class(name).tiny.values()):
        variant = spec.variant(model.checkpoint, None)
        assert set(variant.tasks) <= spec.pipelines.keys()
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


VARIANTS = [
    pytest.param(spec.variant(model.checkpoint, expert), id="-".join(filter(None, (name, size, expert))))
    for name, spec in FAMILIES.items()
    for size, model in {**spec.released, **family_class(name).tiny}.items()
    for expert in (("high", "low") if "transformer_2" in model.model_index else (None,))
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_has_a_role_and_trained_is_one_transformer(variant):
    roles = list(variant.parts.values())
    assert (roles.count("transformer"), roles.count("vae"), roles.count("scheduler")) == (1, 1, 1)
    assert {"text_encoder", "tokenizer"} <= set(roles)
    assert variant.transformer == ("transformer_2" if variant.expert == "low" else "transformer")
    assert set(variant.parts) - set(variant.weights) == set(variant.folders("tokenizer", "image_processor", "scheduler"))


# Families whose caches are on people's disks, with the parts that decide the names of their entries.
CACHED = ("wan", "ltxvideo", "sanavideo", "kandinsky5_video")


@pytest.mark.parametrize("variant", [case for case in VARIANTS if case.id.startswith(CACHED)])
def test_the_parts_that_name_cache_entries_never_change(variant):
    """Else every cache would be computed again: the folders, and their order in the files of a run."""
    (trained, *others) = variant.parts
    assert trained == variant.transformer
    text = ("text_encoder", "tokenizer")
    second = ("text_encoder_2", "tokenizer_2") if variant.title.startswith("Kandinsky") else ()
    clip = ("image_encoder", "image_processor") if "image_encoder" in others else ()
    assert others == ["vae", *text, "scheduler", *second, *clip]
    assert variant.text_parts == (*text, *second)
    assert variant.image_parts == ("vae", *clip)


def test_only_wan_2_1_of_image_to_video_sees_the_first_frame_with_clip():
    seeing = {case.id for case in VARIANTS if case.values[0].folders("image_encoder")}
    assert seeing == {"wan-wan2.1-i2v-14b", "wan-tiny-i2v"}


def test_what_stands_between_text_encoder_and_transformer_decides_a_captions_encoding():
    variant = Variant("a", ("t2v",), usual_parts(connectors="text_connector"), (64, 64, 9), 24.0, architecture="a")
    assert variant.text_parts == ("text_encoder", "tokenizer", "connectors")
    assert "connectors" in variant.weights


def test_sample_defaults_are_the_models_own_at_the_size_that_is_trained():
    family = tiny_family("wan", "tiny-a14b", expert="low")
    sample = family.sample_defaults(9, 64, 96, 16.0)
    facts = {"scheduler_class": "UniPCMultistepScheduler", "shift": 3.0, "boundary_ratio": 0.875}
    assert family.sampler_facts(9, 64, 96) == facts
    assert sample == {
        "frames": 9,
        "height": 64,
        "width": 96,
        **facts,
        "steps": 50,
        "guidance": 4.0,
        "guidance_2": 3.0,
        "negative_prompt": family.variant.sampling.negative_prompt,
        "fps": 16.0,
        "decode": {},
    }
    arguments = family.pipeline_arguments(sample)
    assert (arguments["num_frames"], arguments["guidance_scale"], arguments["guidance_scale_2"]) == (9, 4.0, 3.0)


def test_a_dynamic_shift_in_sample_defaults_is_that_of_the_videos_own_size():
    family = tiny_family("ltxvideo", "tiny-timestep-vae")
    small, large = (family.sample_defaults(frames, 128, 192, 25.0) for frames in (17, 121))
    assert small["shift"] == family.checkpoint.flow_shift(family.geometry.token_grid(17, 128, 192).tokens) < large["shift"]
    assert small["decode"] == {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
    assert family.pipeline_arguments(small)["decode_timestep"] == 0.05
