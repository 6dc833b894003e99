"""What every family promises, held against diffusers' own pipeline. A new family is one row, and a fixture of its name."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from crepatrain.alignment.capture import capture_blocks
from crepatrain.commands.export import write_adapter
from crepatrain.errors import UserError
from crepatrain.families import get_family
from crepatrain.tensors import Batch
from crepatrain.training.diffusion import FlowMatching
from crepatrain.training.lora import add_lora, target_modules, trainable_parameters


def wan_normalised(vae, pixels):
    z = vae.encode(pixels).latent_dist.mode()
    for channel, (mean, std) in enumerate(zip(vae.config.latents_mean, vae.config.latents_std, strict=True)):
        z[:, channel] = (z[:, channel] - mean) / std
    return z


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        size: (frames, height, width) of the test clip; latent and grid: what becomes of it.
        text_length: tokens that the pipeline pads a caption to.
        leak: share of a cell's change that may show elsewhere where attention is silenced.
        latents_of: what the transformer is fed -> latents [B, C, T', H', W'].
        encode: VAE and pixels -> latents, from the family's paper and the VAE's config.
        names: Linear layers of a block -> their names in the adapter file, `{}` being the block.
        outside: a layer that the file can't hold.
    """

    name: str
    size: tuple[int, int, int]
    latent: tuple[int, int, int, int]
    grid: tuple[int, int, int]
    text_length: int
    leak: float
    latents_of: Callable
    encode: Callable
    names: dict[str, str]
    outside: str


ROWS = [
    Row(
        name="wan",
        size=(9, 64, 96),
        latent=(16, 3, 8, 12),
        grid=(3, 4, 6),
        text_length=512,
        leak=0.0,
        latents_of=lambda hidden_states: hidden_states,
        encode=wan_normalised,
        names={
            "blocks.{}.attn1.to_q": "diffusion_model.blocks.{}.self_attn.q",
            "blocks.{}.attn1.to_k": "diffusion_model.blocks.{}.self_attn.k",
            "blocks.{}.attn1.to_v": "diffusion_model.blocks.{}.self_attn.v",
            "blocks.{}.attn1.to_out.0": "diffusion_model.blocks.{}.self_attn.o",
            "blocks.{}.attn2.to_q": "diffusion_model.blocks.{}.cross_attn.q",
            "blocks.{}.attn2.to_k": "diffusion_model.blocks.{}.cross_attn.k",
            "blocks.{}.attn2.to_v": "diffusion_model.blocks.{}.cross_attn.v",
            "blocks.{}.attn2.to_out.0": "diffusion_model.blocks.{}.cross_attn.o",
            "blocks.{}.ffn.net.0.proj": "diffusion_model.blocks.{}.ffn.0",
            "blocks.{}.ffn.net.2": "diffusion_model.blocks.{}.ffn.2",
        },
        outside="condition_embedder.time_embedder.linear_1",
    ),
]

CAPTIONS = [
    "a red square moves",
    "",
    "  two   spaces,\na new line &amp;amp; an entity  ",
    "\u00fcn\u00efc\u00f6d\u00e9 \u5f62 \U0001f3a5",
    "a long caption " * 60,
]


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def case(request):
    """A family with its checkpoint's parts, and diffusers' pipeline of the same folder."""
    row = request.param
    folder = request.getfixturevalue(row.name)
    family = get_family(row.name)
    transformer, vae = family.load_transformer(str(folder), torch.float32), family.load_vae(str(folder), torch.float32)
    geometry = family.spec.geometry(transformer.config, vae.config)
    return SimpleNamespace(
        row=row,
        folder=folder,
        family=family,
        transformer=transformer,
        vae=vae,
        text_encoder=family.load_text_encoder(str(folder), torch.float32),
        pipeline=load_pipeline(folder),
        geometry=geometry,
        grid=geometry.token_grid(*row.size),
    )


def load_pipeline(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clip_pixels(case, seed=0):
    frames, height, width = case.row.size
    return torch.rand(2, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make_batch(case, captions=("a red square moves", "a blue circle"), seed=0):
    latents, noise = torch.randn(2, len(captions), *case.row.latent, generator=torch.Generator().manual_seed(seed))
    text = case.family.collate_text(case.family.encode_text(case.text_encoder, captions))
    return Batch(latents, noise, torch.linspace(0.3, 0.8, len(captions)), text, case.grid, 16.0, tuple(captions))


@torch.no_grad()
def predict(case, transformer, batch):
    return case.family.denoise(transformer, batch.noise, batch.sigma, batch)


@torch.no_grad()
def tokens_of_block_1(case, batch, latents):
    with capture_blocks(case.family.blocks(case.transformer), [1]) as captured:
        case.family.denoise(case.transformer, latents, batch.sigma, batch)
    return case.family.video_tokens(captured[1], case.grid)


def test_geometry_and_latents_of_the_clip(case):
    row = case.row
    assert (case.grid.t, case.grid.h, case.grid.w) == row.grid
    assert (case.geometry.latent_channels, *case.geometry.latent_shape(*row.size)) == row.latent
    with torch.no_grad():
        latents = case.family.encode_video(case.vae, clip_pixels(case))
        pixels = case.family.decode_latents(case.vae, latents)
    assert latents.shape == (2, *row.latent)
    assert pixels.shape == (2, 3, *row.size)
    batch = make_batch(case)
    assert predict(case, case.transformer, batch).shape == batch.latents.shape
    assert tokens_of_block_1(case, batch, batch.latents).shape == (2, case.grid.tokens, case.geometry.width)
    assert len(case.family.blocks(case.transformer)) == case.geometry.depth


@pytest.mark.parametrize("attention", ["silenced", "live"])
def test_a_token_is_where_the_grid_says(case, attention):
    """Latents that change in one patch change the token of that patch most, and no other sample's."""
    handles = []
    if attention == "silenced":
        modules = [m for m in case.transformer.modules() if type(m).__name__.endswith("Attention")]
        assert len(modules) >= 2 * case.geometry.depth
        handles = [m.register_forward_hook(lambda _m, _a, output: torch.zeros_like(output)) for m in modules]
    try:
        batch = make_batch(case)
        grid, (pt, ph, pw) = case.grid, case.geometry.patch
        before = tokens_of_block_1(case, batch, batch.latents)
        last = (grid.t - 1, grid.h - 1, grid.w - 1)
        for t, h, w in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 2, 4), (1, 3, 2), (2, 1, 5), last):
            latents = batch.latents.clone()
            latents[0, :, t * pt : (t + 1) * pt, h * ph : (h + 1) * ph, w * pw : (w + 1) * pw] += 1.0
            change = (tokens_of_block_1(case, batch, latents) - before).norm(dim=-1)
            cell = (t * grid.h + h) * grid.w + w
            assert change[0].argmax() == cell
            assert change[1].max() == 0
            if attention == "silenced":
                elsewhere = change[0].clone()
                elsewhere[cell] = 0
                assert elsewhere.max() <= case.row.leak * change[0, cell]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("prompt", [CAPTIONS[0], CAPTIONS[4]], ids=["short", "long"])
def test_the_transformer_is_fed_as_the_pipeline_feeds_it(case, prompt):
    frames, height, width = case.row.size
    fed = []

    def record(_module, args, kwargs):
        assert not args
        fed.append({name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)})

    for transformer in (case.pipeline.transformer, case.transformer):
        handle = transformer.register_forward_pre_hook(record, with_kwargs=True)
        if transformer is case.pipeline.transformer:
            sampling = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
            case.pipeline(prompt, height=height, width=width, num_frames=frames, **sampling)
            by_pipeline = fed[:]
        else:
            batch = make_batch(case, [prompt])
            for step in by_pipeline:
                latents = case.row.latents_of(step["hidden_states"])
                sigma = step["timestep"].float() / 1000
                with torch.no_grad():
                    case.family.denoise(transformer, latents, sigma, batch)
        handle.remove()
    by_family = fed[len(by_pipeline) :]
    assert len(by_pipeline) == len(by_family) == 2
    assert by_pipeline[0]["timestep"] != by_pipeline[1]["timestep"]
    for ours, theirs in zip(by_family, by_pipeline, strict=True):
        assert ours.keys() == theirs.keys() >= {"hidden_states", "timestep", "encoder_hidden_states"}
        for name, value in theirs.items():
            assert ours[name].shape == value.shape, name
            torch.testing.assert_close(ours[name], value.to(ours[name].dtype), rtol=1e-6, atol=0, msg=name)
        assert torch.equal(ours["hidden_states"], theirs["hidden_states"])
        assert torch.equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_exact_target_leads_the_sampler_to_the_clip(case, shift):
    batch = make_batch(case)
    process = FlowMatching("uniform")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(7)
    sample = batch.noise
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        assert timestep.item() == pytest.approx(sigma.item() * 1000, rel=1e-5)
        on_the_way = process.add_noise(batch.latents, batch.noise, sigma.expand(2))
        torch.testing.assert_close(sample, on_the_way, rtol=1e-4, atol=1e-5)
        sample = scheduler.step(process.target(batch.latents, batch.noise), timestep, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, batch.latents, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_encoding_is_the_vaes_mode_normalised(case):
    pixels = clip_pixels(case)
    latents = case.family.encode_video(case.vae, pixels)
    torch.testing.assert_close(latents, case.row.encode(case.vae, pixels), rtol=1e-5, atol=1e-6)
    assert torch.equal(latents, case.family.encode_video(case.vae, pixels))
    one = case.family.encode_video(case.vae, pixels[:1])
    torch.testing.assert_close(one, latents[:1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decoding_undoes_what_encoding_normalised(case):
    pixels = clip_pixels(case)
    ours = case.family.decode_latents(case.vae, case.family.encode_video(case.vae, pixels))
    plain = case.vae.decode(case.vae.encode(pixels).latent_dist.mode(), return_dict=False)[0]
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_decoding_is_the_pipelines(case):
    frames, height, width = case.row.size
    shared = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": 1, "guidance_scale": 1.0}

    def sample(output_type):
        return case.pipeline("a", **shared, output_type=output_type, generator=torch.Generator().manual_seed(5)).frames

    latents, video = sample("latent"), sample("pt")
    with torch.no_grad():
        pixels = case.family.decode_latents(case.vae, latents)
    ours = case.pipeline.video_processor.postprocess_video(pixels, output_type="pt")
    assert ((video > 0) & (video < 1)).float().mean() > 0.5
    torch.testing.assert_close(ours, video, rtol=0, atol=1e-5)


@pytest.mark.parametrize("captions", [CAPTIONS, *([caption] for caption in CAPTIONS)], ids=lambda c: f"{len(c)}:{c[0][:9]!a}")
def test_text_is_the_pipelines(case, captions):
    texts = case.family.encode_text(case.text_encoder, captions)
    collated = case.family.collate_text(texts)["prompt_embeds"]
    with torch.no_grad():
        expected, _ = case.pipeline.encode_prompt(
            captions, do_classifier_free_guidance=False, max_sequence_length=case.row.text_length
        )
    assert expected.shape[1] == case.row.text_length
    assert torch.equal(collated, expected)
    assert not collated.requires_grad


def test_text_is_kept_without_padding(case):
    lengths = [len(case.pipeline.tokenizer(" ".join(caption.split())).input_ids) for caption in ("ab", "", CAPTIONS[4])]
    texts = case.family.encode_text(case.text_encoder, ["ab", "", CAPTIONS[4]])
    assert [len(text["prompt_embeds"]) for text in texts] == [min(length, case.row.text_length) for length in lengths]
    assert all(text["prompt_embeds"].untyped_storage().nbytes() == text["prompt_embeds"].nbytes for text in texts)


def test_export_names_are_the_original_ones(case):
    linears = target_modules(case.transformer, "all-linear", case.family.spec)
    expected = {
        module.format(block): name.format(block)
        for block in range(case.geometry.depth)
        for module, name in case.row.names.items()
    }
    assert {module: case.family.export_name(module) for module in linears} == expected
    with pytest.raises(UserError, match=case.row.outside):
        case.family.export_name(case.row.outside)


def test_diffusers_inverts_the_export_names(case):
    linears = target_modules(case.transformer, "all-linear", case.family.spec)
    marks = {module: torch.full((1, 1), float(number)) for number, module in enumerate(linears)}
    file = {f"{case.family.export_name(m)}.lora_{side}.weight": mark for m, mark in marks.items() for side in "AB"}
    state = type(case.pipeline).lora_state_dict(file)
    assert state == {f"transformer.{m}.lora_{side}.weight": mark for m, mark in marks.items() for side in "AB"}


@pytest.mark.parametrize("targets", ["all-linear", "default"])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 10), (4, 1), (3, 3)])
def test_a_pipeline_that_loads_the_file_does_what_the_adapter_does(case, tmp_path, targets, rank, alpha):
    live = case.family.load_transformer(str(case.folder), torch.float32)
    modules = target_modules(live, case.family.spec.lora_targets if targets == "default" else targets, case.family.spec)
    torch.manual_seed(rank)
    add_lora(live, modules, rank=rank, alpha=alpha, dropout=0.0)
    for parameter in trainable_parameters(live):
        parameter.data.normal_(std=0.3)
    write_adapter([tmp_path / "adapter.safetensors"], case.family, live, step=7)

    file = load_file(tmp_path / "adapter.safetensors")
    assert set(file) == {f"{case.family.export_name(module)}.lora_{side}.weight" for module in modules for side in "AB"}
    assert not [key for key in file if "alpha" in key or "projector" in key or "crepa" in key]
    assert {tensor.dtype for tensor in file.values()} == {torch.float32}

    pipeline = load_pipeline(case.folder)
    batch = make_batch(case)
    base = predict(case, pipeline.transformer, batch)
    pipeline.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    loaded = predict(case, pipeline.transformer, batch)
    expected = predict(case, live, batch)
    assert (loaded - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())
    assert (expected - base).abs().max() > 0.05


def test_an_adapter_that_learned_nothing_changes_nothing(case, tmp_path):
    live = case.family.load_transformer(str(case.folder), torch.float32)
    add_lora(live, target_modules(live, "all-linear", case.family.spec), rank=4, alpha=8, dropout=0.0)
    write_adapter([tmp_path / "adapter.safetensors"], case.family, live, step=0)
    pipeline = load_pipeline(case.folder)
    pipeline.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    batch = make_batch(case)
    base = predict(case, case.transformer, batch)
    assert torch.equal(predict(case, live, batch), base)
    torch.testing.assert_close(predict(case, pipeline.transformer, batch), base, rtol=0, atol=1e-6)
