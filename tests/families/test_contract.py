"""What every family and variant promises, compared with diffusers' own pipelines. A new family is one row of ROWS."""

import copy
import inspect
import json
import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from common import render_clip
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from crepatrain.adapters.writing import write_adapter
from crepatrain.alignment.capture import capture_blocks
from crepatrain.alignment.crepa import Crepa
from crepatrain.alignment.teachers import CachedTeacher
from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.config.sections import LoopConfig
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.families import family_class, get_family
from crepatrain.families.random import write_random_pipeline
from crepatrain.placement.checkpointing import checkpoint_blocks
from crepatrain.sampling.pipeline import training_pipeline
from crepatrain.specs import FAMILIES
from crepatrain.tensors import Batch, PatchFeatures
from crepatrain.training.diffusion import FlowMatching
from crepatrain.training.lora import add_lora, target_modules, trainable_parameters
from crepatrain.training.step import CrepaTerm, training_loss

FPS = 16.0
CPU = torch.device("cpu")


def by_config(vae, z):
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (z - mean) / std


def by_buffers(vae, z):
    mean, std = (buffer.view(1, -1, 1, 1, 1) for buffer in (vae.latents_mean, vae.latents_std))
    return (z - mean) * vae.config.scaling_factor / std


def by_factor(vae, z):
    return z * 0.476986


def unpack(size):
    """Tokens [B, T H W, C], packed by a pipeline -> [B, C, T, H, W], token by token."""
    t, h, w = size

    def unpacked(tokens):
        if tokens.ndim == 5:  # some pipelines give latents that are unpacked already
            return tokens
        latents = tokens.new_empty(tokens.shape[0], tokens.shape[2], t, h, w)
        for index in range(t * h * w):
            latents[:, :, index // (h * w), index // w % h, index % w] = tokens[:, index]
        return latents

    return unpacked


@dataclass(frozen=True)
class Row:
    """One variant of a family.

    Attributes:
        tiny: its name in `Family.tiny`.
        tasks: what it can be trained for.
        size: (frames, height, width) of the test clip; latent and grid: what becomes of it.
        leak: share of a cell's change that may show elsewhere while attention is silenced.
        latents_of: what the transformer is fed -> latents [B, C, T', H', W'].
        normalise: VAE and its encoder's output -> latents, from the family's paper and the VAE's config.
        names: Linear layers of a block -> their names in the adapter file, `{}` being the block.
        outside: a layer that the file can't hold.
        call: of the pipeline, beside what all take.
        image_call: the same, where it is given an image.
        expert: of a checkpoint with two.
        tolerance: between two ways to compute the same in fp32.
        caption_fills: whether the longest caption takes all tokens that captions may have.
        causal_vae: whether the VAE encodes the first frame independently of the others.
        flex: whether attention runs through flex attention, which has no backward on a CPU.
        sibling: whether another row differs little from this one, so that slow tests run it in the long form alone.
    """

    family: str
    tiny: str
    tasks: tuple[str, ...]
    size: tuple[int, int, int]
    latent: tuple[int, int, int, int]
    grid: tuple[int, int, int]
    normalise: Callable
    names: dict[str, str]
    outside: str
    latents_of: Callable = lambda hidden_states: hidden_states
    leak: float = 0.0
    frames_argument: str = "num_frames"
    call: dict[str, Any] = field(default_factory=dict)
    image_call: dict[str, Any] = field(default_factory=dict)
    expert: str | None = None
    tolerance: float = 1e-5
    caption_fills: bool = True
    causal_vae: bool = True
    flex: bool = False
    sibling: bool = False

    @property
    def name(self) -> str:
        return f"{self.family}-{self.tiny}" + (f"-{self.expert}" if self.expert else "")


def same(prefix, *layers):
    return {f"{block}.{{}}.{layer}": f"{prefix}.{block}.{{}}.{layer}" for block, layer in layers}


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WAN_NAMES = {
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
}
WAN_IMAGE_NAMES = {
    "blocks.{}.attn2.add_k_proj": "diffusion_model.blocks.{}.cross_attn.k_img",
    "blocks.{}.attn2.add_v_proj": "diffusion_model.blocks.{}.cross_attn.v_img",
}
WAN_OUTSIDE = "condition_embedder.time_embedder.linear_1"
SMALL = {"size": (9, 64, 96), "latent": (16, 3, 8, 12), "grid": (3, 4, 6)}
WAN = {"names": WAN_NAMES, "outside": WAN_OUTSIDE, "normalise": by_config}
LTX_ROW = {
    "tasks": ("t2v", "i2v"),
    "size": (17, 128, 192),
    "latent": (8, 3, 4, 6),
    "grid": (3, 4, 6),
    "normalise": by_buffers,
    "latents_of": unpack((3, 4, 6)),
    "names": same(
        "diffusion_model",
        *(("transformer_blocks", f"{attention}.{layer}") for attention in ("attn1", "attn2") for layer in ATTENTION),
        ("transformer_blocks", "ff.net.0.proj"),
        ("transformer_blocks", "ff.net.2"),
    ),
    "outside": "proj_in",
    "call": {"frame_rate": FPS},
}

SANA = {
    "tasks": ("t2v", "i2v"),
    "leak": 0.1,  # its feed-forward is a convolution
    "names": same(
        "transformer",
        *(("transformer_blocks", f"{attention}.{layer}") for attention in ("attn1", "attn2") for layer in ATTENTION),
    ),
    "outside": "patch_embedding",
    "frames_argument": "frames",
    "call": {"use_resolution_binning": False},
}

KANDINSKY = {
    "normalise": by_factor,
    "latents_of": lambda hidden_states: hidden_states[..., :16].permute(0, 4, 1, 2, 3),
    "names": same(
        "transformer",
        *(
            ("visual_transformer_blocks", f"{attention}.{layer}")
            for attention in ("self_attention", "cross_attention")
            for layer in ("to_query", "to_key", "to_value", "out_layer")
        ),
        *(
            ("visual_transformer_blocks", layer)
            for layer in ("feed_forward.in_layer", "feed_forward.out_layer", "visual_modulation.out_layer")
        ),
    ),
    "outside": "text_transformer_blocks.0.self_attention.to_query",
    "caption_fills": False,  # the template ends after the caption
    "causal_vae": False,  # its norms see all frames at once
}

ROWS = [
    Row("wan", "tiny", ("t2v",), **SMALL, **WAN),
    Row(
        "wan",
        "tiny-i2v",
        ("i2v",),
        **SMALL,
        **WAN | {"names": WAN_NAMES | WAN_IMAGE_NAMES},
        latents_of=lambda hidden_states: hidden_states[:, :16],
    ),
    Row("wan", "tiny-ti2v", ("t2v", "i2v"), size=(9, 128, 192), latent=(48, 3, 8, 12), grid=(3, 4, 6), **WAN),
    Row("wan", "tiny-a14b", ("t2v",), **SMALL, **WAN, expert="high", sibling=True),
    Row("wan", "tiny-a14b", ("t2v",), **SMALL, **WAN, expert="low", sibling=True),
    Row("wan", "tiny-i2v-a14b", ("i2v",), **SMALL, **WAN, expert="low", latents_of=lambda hidden_states: hidden_states[:, :16]),
    Row("ltxvideo", "tiny", **LTX_ROW),
    Row("ltxvideo", "tiny-timestep-vae", **LTX_ROW, sibling=True),
    Row("ltxvideo", "tiny-0.9.5", **LTX_ROW, image_call={"image_cond_noise_scale": 0.0}),  # trained on the image as it is
    Row("sanavideo", "tiny", **SMALL, normalise=by_config, **SANA),
    Row(
        "sanavideo",
        "tiny-720p",
        size=(17, 128, 192),
        latent=(8, 3, 4, 6),
        grid=(3, 4, 6),
        normalise=by_buffers,
        sibling=True,
        **SANA,
    ),
    Row(
        "kandinsky5_video",
        "tiny",
        ("t2v", "i2v"),
        size=(17, 64, 96),  # the image-to-video pipeline divides by nothing below five latent frames
        latent=(16, 5, 8, 12),
        grid=(5, 4, 6),
        tolerance=1e-4,  # queries and keys are rounded to bf16 after the rotary embedding
        **KANDINSKY,
    ),
    Row(
        "kandinsky5_video",
        "tiny-nabla",
        ("t2v",),
        size=(9, 128, 256),
        latent=(16, 3, 16, 32),
        grid=(3, 8, 16),
        flex=True,
        **KANDINSKY,
    ),
]
CASES = [(row, task) for row in ROWS for task in row.tasks]
TRAINABLE = [(row, task) for row, task in CASES if not row.flex]

CAPTIONS = [
    "a red square moves",
    "",
    "  two   spaces,\na new line &amp;amp; an entity  ",
    "\u00fcn\u00efc\u00f6d\u00e9 \u5f62 \U0001f3a5",
    "a long caption " * 60,
]


def named(cases):
    """Arguments of parametrize over cases, or over pytest's own form of them."""
    plain = [case.values[0] if isinstance(case, type(pytest.param())) else case for case in cases]
    return {"argvalues": cases, "ids": [f"{row.name}-{task}" for row, task in plain], "indirect": True}


def sparing(cases):
    """Cases of a slow test: siblings only in the long form."""
    return [pytest.param(case, marks=[pytest.mark.slow] * case[0].sibling) for case in cases]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder of a tiny model, written once."""
    root = tmp_path_factory.mktemp("families")

    def folder(family, tiny):
        place = root / family / tiny
        if not place.exists():
            kind = family_class(family)
            place.mkdir(parents=True)
            write_random_pipeline(kind, place, kind.tiny[tiny])
        return place

    return folder


@pytest.fixture(scope="module")
def open_case(checkpoints):
    """A variant with its checkpoint's parts, and diffusers' pipeline of the same folder, opened once."""
    opened = {}

    def open_(row, task):
        if (row.name, task) not in opened:
            folder = checkpoints(row.family, row.tiny)
            model = family_class(row.family).tiny[row.tiny]
            family = get_family(row.family, model.checkpoint, task=task, expert=row.expert)
            transformer = family.load_transformer(str(folder), torch.float32)
            vae = family.load_vae(str(folder), torch.float32)
            geometry = family.spec.geometry(transformer.config, vae.config)
            opened[row.name, task] = SimpleNamespace(
                row=row,
                task=task,
                folder=folder,
                family=family,
                transformer=transformer,
                vae=vae,
                text_encoder=family.load_text_encoder(str(folder), torch.float32),
                image_encoder=family.load_image_encoder(str(folder), torch.float32),
                pipeline=load_pipeline(row, task, folder),
                geometry=geometry,
                grid=geometry.token_grid(*row.size),
            )
        return opened[row.name, task]

    return open_


@pytest.fixture
def case(request, open_case):
    case = open_case(*request.param)
    # Choosing a backend for one transformer chooses it for every other one of the process that has chosen none.
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    return case


@pytest.fixture(autouse=True)
def _native_attention_afterwards():
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def pipeline_class(row, task, folder):
    """The class that model_index.json names, or, if it can't do the task, its family's for it."""
    named = getattr(diffusers, json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    image = inspect.signature(named.__call__).parameters.get("image")
    able = image is not None if task == "i2v" else image is None or image.default is None
    return named if able else getattr(diffusers, FAMILIES[row.family].pipelines[task])


def load_pipeline(row, task, folder):
    pipeline = pipeline_class(row, task, folder).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if row.flex:
        pipeline.transformer.set_attention_backend("flex")
    return pipeline


def trained_part(pipeline, row):
    return pipeline.transformer_2 if row.expert == "low" else pipeline.transformer


def first_picture(row):
    """An image of the clip's size, and the same as pixels [1, 3, 1, H, W] in [-1, 1]."""
    _, height, width = row.size
    values = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = torch.from_numpy(values).float().permute(2, 0, 1)[None, :, None] / 127.5 - 1
    return Image.fromarray(values), pixels


def sample(case, prompt="a red square moves", steps=2, **more):
    """The pipeline's own run."""
    row = case.row
    frames, height, width = row.size
    arguments = {"height": height, "width": width, row.frames_argument: frames, "num_inference_steps": steps, **row.call}
    if case.task == "i2v":
        arguments |= {"image": first_picture(row)[0], **row.image_call}
    return case.pipeline(prompt=prompt, guidance_scale=1.0, **arguments, **more).frames


def clip_pixels(case, seed=0):
    frames, height, width = case.row.size
    return torch.rand(2, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def make_batch(case, captions=("a red square moves", "a blue circle went"), seed=0, given=None):
    """A batch of random latents; of i2v with the first picture, by default for every sample."""
    latents, noise = torch.randn(2, len(captions), *case.row.latent, generator=torch.Generator().manual_seed(seed))
    text = case.family.collate_text(case.family.encode_text(case.text_encoder, captions))
    conditioning = {}
    if case.task == "i2v":
        made = case.family.encode_image(case.vae, case.image_encoder, first_picture(case.row)[1], case.row.size[0])
        conditioning = {name: tensor.expand(len(captions), *tensor.shape[1:]) for name, tensor in made.items()}
        conditioning["given"] = torch.tensor(given or [1.0] * len(captions))
    sigma = torch.linspace(0.3, 0.8, len(captions))
    return Batch(latents, noise, sigma, text, case.grid, FPS, tuple(captions), conditioning)


@torch.no_grad()
def predict(case, transformer, batch):
    return case.family.denoise(transformer, batch.noise, batch.sigma, batch)


@torch.no_grad()
def tokens_of_block_1(case, batch, latents):
    with capture_blocks(case.family.blocks(case.transformer), [1]) as captured:
        case.family.denoise(case.transformer, latents, batch.sigma, batch)
    return case.family.video_tokens(captured[1], case.grid)


@pytest.mark.parametrize("case", **named(CASES))
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


@pytest.mark.parametrize("case", **named(CASES))
def test_illegal_sizes_are_refused_with_the_legal_ones(case):
    frames, height, width = case.row.size
    step, (rows, columns) = case.geometry.temporal_stride, case.geometry.size_multiple
    for illegal, message in (
        ((frames + 1, height, width), f"num_frames={frames + 1}.*{step}k\\+1"),
        ((frames, height + 1, width), f"height={height + 1}.*multiples of {rows}"),
        ((frames, height, width - 8), f"width={width - 8}.*multiples of {columns}"),
    ):
        with pytest.raises(UserError, match=message):
            case.geometry.token_grid(*illegal)


@contextmanager
def silenced_attention(transformer):
    modules = [m for m in transformer.modules() if type(m).__name__.endswith("Attention")]
    assert len(modules) >= 2 * 10
    handles = [m.register_forward_hook(lambda _m, _a, output: torch.zeros_like(output)) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("attention", ["silenced", "live"])
@pytest.mark.parametrize("case", **named(CASES))
def test_a_token_is_where_the_grid_says(case, attention):
    """Latents that change in one patch change the token of that patch most, and no other sample's."""
    silence = silenced_attention(case.transformer) if attention == "silenced" else nullcontext()
    with silence:
        batch = make_batch(case)
        grid, (pt, ph, pw) = case.grid, case.geometry.patch
        before = tokens_of_block_1(case, batch, batch.latents)
        last = (grid.t - 1, grid.h - 1, grid.w - 1)
        for t, h, w in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 2, 4), (1, 3, 2), (2, 1, 5), last):
            if t == 0 and "first_frame" in batch.conditioning:
                continue  # the given frame takes the place of these latents
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


IGNORED = {"return_dict", "attention_kwargs"}


def fed(transformer, run):
    """What a transformer is called with while `run` runs, by the names of its arguments."""
    signature, calls = inspect.signature(type(transformer).forward), []

    def record(module, args, kwargs):
        arguments = signature.bind(module, *args, **kwargs).arguments
        calls.append({k: v for k, v in arguments.items() if k not in {*IGNORED, "self"} and v is not None})

    handle = transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return calls


def assert_fed_alike(ours, theirs, name=""):
    if isinstance(theirs, torch.Tensor):
        if "timestep" in name and ours.ndim == 1 and theirs.ndim == 2 and (theirs == theirs[:, :1]).all():
            theirs = theirs[:, 0]  # one timestep stands for as many equal ones as there are tokens
        assert ours.shape == theirs.shape, name
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-6, atol=2e-6, msg=lambda text: f"{name}: {text}")
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), name
        for key, value in theirs.items():
            assert_fed_alike(ours[key], value, f"{name}.{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), name
        for index, value in enumerate(theirs):
            assert_fed_alike(ours[index], value, f"{name}[{index}]")
    else:
        assert ours == theirs, name


@pytest.mark.parametrize("prompt", [CAPTIONS[0], CAPTIONS[4]], ids=["short", "long"])
@pytest.mark.parametrize("case", **named(CASES))
def test_the_transformer_is_fed_as_the_pipeline_feeds_it(case, prompt, monkeypatch):
    # Some pipelines draw the image's latents from the posterior; the cache holds its mode.
    posterior = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution
    monkeypatch.setattr(posterior, "sample", lambda self, generator=None: self.mode())
    theirs = fed(trained_part(case.pipeline, case.row), lambda: sample(case, prompt, steps=4, output_type="latent"))
    batch = make_batch(case, [prompt])
    assert len(theirs) >= 2 if case.row.expert is None else theirs
    assert len({str(step["timestep"].flatten().tolist()) for step in theirs}) == len(theirs)
    for step in theirs:
        latents = case.row.latents_of(step["hidden_states"])
        sigma = step["timestep"].float().flatten(1).amax(dim=1) if step["timestep"].ndim > 1 else step["timestep"].float()
        with torch.no_grad():
            (ours,) = fed(
                case.transformer,
                lambda latents=latents, sigma=sigma: case.family.denoise(case.transformer, latents, sigma / 1000, batch),
            )
        mask = step.get("encoder_attention_mask")
        if mask is not None:  # what is behind a caption's end is masked, and may differ
            for call in (ours, step):
                call["encoder_hidden_states"] = call["encoder_hidden_states"] * mask.unsqueeze(-1)
        assert_fed_alike(ours, step)
        assert torch.equal(ours["encoder_hidden_states"], step["encoder_hidden_states"])


@pytest.mark.parametrize("case", **named(CASES))
def test_it_is_sampled_by_the_pipeline_that_its_checkpoint_names(case):
    named = pipeline_class(case.row, case.task, case.folder)
    assert case.family.pipeline == named.__name__
    made = training_pipeline(case.family, case.folder, case.transformer, case.vae, case.family.variant.text_parts, CPU)
    assert type(made) is named


@pytest.mark.parametrize("case", **named([case for case in CASES if FAMILIES[case[0].family].text_is_padded]))
def test_padding_of_text_is_never_seen(case):
    """A caption in a batch with a longer one gives what it gives alone."""
    both, alone = make_batch(case, ["a square", CAPTIONS[4]]), make_batch(case, ["a square"])
    alone = replace(alone, noise=both.noise[:1], sigma=both.sigma[:1])
    found, expected = predict(case, case.transformer, both)[:1], predict(case, case.transformer, alone)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", **named([case for case in CASES if case[1] == "i2v"]))
def test_a_sample_without_its_image_is_one_of_text_alone(case, open_case):
    batch = make_batch(case, given=[1.0, 0.0])
    with_image, without = predict(case, case.transformer, batch)
    everywhere = predict(case, case.transformer, make_batch(case))
    torch.testing.assert_close(with_image, everywhere[0], rtol=1e-5, atol=1e-5)
    assert (without - everywhere[1]).abs().max() > 1e-3
    mask = case.family.loss_mask(batch)
    if "t2v" in case.row.tasks:  # the same weights do both
        as_text = open_case(case.row, "t2v")
        torch.testing.assert_close(without, predict(as_text, case.transformer, make_batch(as_text))[1], rtol=1e-5, atol=1e-5)
        assert mask.shape == (2, 1, case.grid.t, 1, 1)
        assert mask.flatten(1).tolist() == [[0.0] + [1.0] * (case.grid.t - 1), [1.0] * case.grid.t]
    else:
        assert mask is None


@pytest.mark.parametrize("case", **named(CASES))
def test_the_exact_target_leads_the_families_sampler_to_the_clip(case):
    batch, process = make_batch(case), FlowMatching("uniform")
    scheduler = copy.deepcopy(case.pipeline.scheduler)
    more = {"mu": 1.3} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(7, **more)
    at = batch.latents.new_tensor(scheduler.sigmas[0].item())
    current = process.add_noise(batch.latents, batch.noise, at.expand(2))
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        assert float(timestep) == pytest.approx(float(sigma) * 1000, abs=1)  # some schedulers round it
        on_the_way = process.add_noise(batch.latents, batch.noise, sigma.float().expand(2))
        torch.testing.assert_close(current, on_the_way, rtol=1e-4, atol=1e-4)
        current = scheduler.step(process.target(batch.latents, batch.noise), timestep, current, return_dict=False)[0]
    torch.testing.assert_close(current, batch.latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", **named(CASES))
@torch.no_grad()
def test_encoding_is_the_vaes_mode_normalised(case):
    pixels = clip_pixels(case)
    latents = case.family.encode_video(case.vae, pixels)
    expected = case.row.normalise(case.vae, case.vae.encode(pixels).latent_dist.mode())
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(latents, case.family.encode_video(case.vae, pixels))
    one = case.family.encode_video(case.vae, pixels[:1])
    torch.testing.assert_close(one, latents[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", **named([case for case in CASES if case[0].causal_vae]))
@torch.no_grad()
def test_the_first_latent_frame_is_the_first_frames_alone(case):
    """So the latents of a given first frame are those that the clip's own latents begin with."""
    pixels = clip_pixels(case)
    whole, first = (case.family.encode_video(case.vae, part) for part in (pixels, pixels[:, :, :1]))
    torch.testing.assert_close(first, whole[:, :, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", **named(CASES))
def test_decoding_is_the_pipelines(case):
    def run(output_type):
        return sample(case, steps=2, output_type=output_type, generator=torch.Generator().manual_seed(5))

    latents, video = case.row.latents_of(run("latent")), run("pt")
    with torch.no_grad():
        pixels = case.family.decode_latents(case.vae, latents)
    ours = case.pipeline.video_processor.postprocess_video(pixels, output_type="pt")
    video = video if isinstance(video, torch.Tensor) else torch.stack(list(video))
    assert ((video > 0) & (video < 1)).float().mean() > 0.3
    torch.testing.assert_close(ours, video, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", **named(CASES))
def test_text_is_kept_without_padding(case):
    texts = case.family.encode_text(case.text_encoder, ["ab", "", CAPTIONS[4]])
    lengths = [len(text["prompt_embeds"]) for text in texts]
    assert 0 < lengths[0] < lengths[2] <= case.family.text_length
    if case.row.caption_fills:
        assert lengths[2] == case.family.text_length
    for text in texts:
        embeds = text["prompt_embeds"]
        assert embeds.untyped_storage().nbytes() <= 1.5 * embeds.nbytes
        assert not embeds.requires_grad


@pytest.mark.parametrize("case", **named(CASES))
def test_export_names_are_the_readers_own(case):
    linears = target_modules(case.transformer, "all-linear", case.family.spec)
    expected = {
        module.format(block): name.format(block)
        for block in range(case.geometry.depth)
        for module, name in case.row.names.items()
    }
    assert {module: case.family.export_name(module) for module in linears} == expected
    assert {name.split(".", 2)[2] for name in linears} <= set(case.family.spec.linears)
    assert dict(case.transformer.named_modules())[case.row.outside] is not None
    with pytest.raises(UserError, match=case.row.outside):
        case.family.export_name(case.row.outside)


@pytest.mark.parametrize("case", **named(CASES))
def test_diffusers_inverts_the_export_names(case):
    linears = target_modules(case.transformer, "all-linear", case.family.spec)
    marks = {module: torch.full((1, 1), float(number)) for number, module in enumerate(linears)}
    file = {f"{case.family.export_name(m)}.lora_{side}.weight": mark for m, mark in marks.items() for side in "AB"}
    state = type(case.pipeline).lora_state_dict(file)
    assert state == {f"transformer.{m}.lora_{side}.weight": mark for m, mark in marks.items() for side in "AB"}


def align_term(case, seed=0):
    torch.manual_seed(seed)
    return CrepaTerm(Crepa(case.geometry.width, 48), CachedTeacher(), 1, 0.5)


def with_teacher(case, batch):
    generator = torch.Generator().manual_seed(9)
    features = torch.randn(len(batch.keys), case.grid.t, case.grid.patches, 48, generator=generator)
    return replace(batch, teacher=PatchFeatures(features, (case.grid.h, case.grid.w)))


def live_adapter(case, targets="default", rank=4, alpha=10.0, rslora=False):
    live = case.family.load_transformer(str(case.folder), torch.float32)
    modules = target_modules(live, case.family.spec.lora_targets if targets == "default" else targets, case.family.spec)
    torch.manual_seed(rank)
    add_lora(live, modules, rank=rank, alpha=alpha, dropout=0.0, rslora=rslora)
    return live, modules


@pytest.mark.parametrize("case", **named(sparing(TRAINABLE)))
def test_captured_states_carry_gradient_with_and_without_checkpointing(case):
    gradients = []
    for checkpointing in (False, True, "selective"):
        live, _ = live_adapter(case)
        for parameter in trainable_parameters(live):
            torch.manual_seed(parameter.numel())
            parameter.data.normal_(std=0.1)
        config = LoopConfig(output_dir="unused", gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
        checkpoint_blocks(config, case.family, live)
        live.train()
        term, blocks = align_term(case), case.family.blocks(live)
        losses = training_loss(case.family, FlowMatching("uniform"), live, blocks, with_teacher(case, make_batch(case)), term)
        losses.total.backward()
        gradients.append({name: p.grad for name, p in live.named_parameters() if p.requires_grad})
        early = [g for name, g in gradients[-1].items() if ".1." in name and g is not None]
        assert early
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in term.crepa.parameters() if p.ndim > 1)
    plain, recomputed, attention_kept = gradients
    assert plain.keys() == recomputed.keys() == attention_kept.keys()
    for name, gradient in plain.items():
        assert gradient is not None, name
        assert torch.equal(gradient, recomputed[name]), name
        assert torch.equal(gradient, attention_kept[name]), name
    assert max(gradient.abs().max() for gradient in plain.values()) > 0


@pytest.mark.parametrize("case", **named(CASES))
def test_the_parts_of_a_block_do_its_work(case):
    """What is outside of self-attention, cross-attention and feed-forward is norms and modulation."""
    spec = case.family.spec
    assert len(spec.block_parts) == 3
    for block in case.family.blocks(case.transformer):
        parts = [getattr(block, name) for name in spec.block_parts]
        inside = {id(module) for part in parts for module in part.modules()}
        heavy = {
            name: module
            for name, module in block.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.modules.conv._ConvNd))
        }
        assert sum(len(list(part.modules())) for part in parts) == len(inside), "no part in another"
        assert all(id(module) in inside or "modulation" in name for name, module in heavy.items())
        attentions = [part for part in parts if hasattr(part, "processor")]
        assert parts[:2] == attentions


@pytest.mark.parametrize("case", **named(sparing(TRAINABLE)))
def test_parts_that_are_computed_again_change_no_gradient(case):
    gradients, calls = [], []
    for nested in (False, True):
        live, _ = live_adapter(case)
        for parameter in trainable_parameters(live):
            torch.manual_seed(parameter.numel())
            parameter.data.normal_(std=0.1)
        block, count = case.family.blocks(live)[1], dict.fromkeys(case.family.spec.block_parts, 0)
        for name in count:
            part = getattr(block, name)

            def counted(*inputs, _forward=part.forward, _name=name, _count=count, **more):
                _count[_name] += 1
                return _forward(*inputs, **more)

            part.forward = counted
        config = LoopConfig(output_dir="unused", nested_checkpointing=nested)
        checkpoint_blocks(config, case.family, live.train())
        losses = training_loss(
            case.family,
            FlowMatching("uniform"),
            live,
            case.family.blocks(live),
            with_teacher(case, make_batch(case)),
            align_term(case),
        )
        losses.total.backward()
        gradients.append({name: p.grad for name, p in live.named_parameters() if p.requires_grad})
        calls.append(list(count.values()))
    assert calls == [[2, 2, 2], [3, 3, 3]]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert any(gradient.any() for gradient in gradients[0].values())


@pytest.mark.parametrize("targets", [pytest.param("all-linear", marks=pytest.mark.slow), "default"])
@pytest.mark.parametrize("case", **named(sparing(TRAINABLE)))
def test_five_steps_saved_and_loaded_by_the_pipeline(case, tmp_path, targets):
    live, modules = live_adapter(case, targets)
    live.train()
    optimizer = torch.optim.AdamW(trainable_parameters(live), lr=0.05)
    batch, blocks = with_teacher(case, make_batch(case)), case.family.blocks(live)
    for _ in range(5):
        losses = training_loss(case.family, FlowMatching("uniform"), live, blocks, batch, align_term(case))
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    live.eval()
    write_adapter([tmp_path / "adapter.safetensors"], case.family, live, {"format": "pt"})

    file = load_file(tmp_path / "adapter.safetensors")
    assert set(file) == {f"{case.family.export_name(module)}.lora_{side}.weight" for module in modules for side in "AB"}
    assert not [key for key in file if "alpha" in key or "projector" in key or "crepa" in key]
    assert {tensor.dtype for tensor in file.values()} == {torch.float32}

    expected = predict(case, live, batch)
    loaded = load_adapter(case, tmp_path)
    found = predict(case, trained_part(loaded.pipeline, case.row), batch)
    base = predict(case, case.transformer, batch)
    assert (found - expected).abs().max() < case.row.tolerance * max(1.0, expected.abs().max().item())
    assert (expected - base).abs().max() > 0.05
    video = sample(loaded, output_type="np")
    assert np.isfinite(np.asarray(video)).all()
    assert np.asarray(video).shape == (1, *case.row.size, 3)


def load_adapter(case, folder: Path):
    pipeline = load_pipeline(case.row, case.task, case.folder)
    more = {"load_into_transformer_2": True} if case.row.expert == "low" else {}
    pipeline.load_lora_weights(folder, weight_name="adapter.safetensors", **more)
    return SimpleNamespace(**vars(case) | {"pipeline": pipeline})


@pytest.mark.parametrize(("rank", "alpha", "rslora"), [(4, 10, False), (4, 1, False), (3, 3, False), (4, 8, True)])
@pytest.mark.parametrize("case", **named([(row, row.tasks[0]) for row in ROWS if row.tiny == "tiny"]))
def test_a_pipeline_that_loads_the_file_does_what_the_adapter_does(case, tmp_path, rank, alpha, rslora):
    live, _ = live_adapter(case, "all-linear", rank, alpha, rslora)
    for parameter in trainable_parameters(live):
        parameter.data.normal_(std=0.2)
    write_adapter([tmp_path / "adapter.safetensors"], case.family, live, {"format": "pt"})
    batch = make_batch(case)
    expected = predict(case, live, batch)
    found = predict(case, load_adapter(case, tmp_path).pipeline.transformer, batch)
    assert (found - expected).abs().max() < case.row.tolerance * max(1.0, expected.abs().max().item())
    assert (expected - predict(case, case.transformer, batch)).abs().max() > 0.05


@pytest.mark.parametrize("case", **named([(row, row.tasks[0]) for row in ROWS if row.tiny == "tiny"]))
def test_an_adapter_that_learned_nothing_changes_nothing(case, tmp_path):
    live, _ = live_adapter(case, "all-linear")
    write_adapter([tmp_path / "adapter.safetensors"], case.family, live, {"format": "pt"})
    batch = make_batch(case)
    base = predict(case, case.transformer, batch)
    torch.testing.assert_close(predict(case, live, batch), base, rtol=0, atol=1e-6)
    torch.testing.assert_close(predict(case, load_adapter(case, tmp_path).pipeline.transformer, batch), base, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", **named([case for case in TRAINABLE if "t2v" in case[0].tasks]))
def test_one_frame_is_a_clip(case):
    """Images train as clips of one frame, as from text alone."""
    assert case.family.variant.images
    _, height, width = case.row.size
    image = clip_pixels(case)[:, :, :1]
    with torch.no_grad():
        latents = case.family.encode_video(case.vae, image)
    grid = case.geometry.token_grid(1, height, width)
    assert latents.shape[2:] == case.geometry.latent_shape(1, height, width)
    whole = make_batch(case)
    batch = Batch(latents, torch.randn_like(latents), whole.sigma, whole.text, grid, FPS, whole.keys)
    assert predict(case, case.transformer, batch).shape == latents.shape
    assert case.family.loss_mask(batch) is None


@pytest.fixture(scope="module")
def varied_clips(tmp_path_factory):
    """Captioned clips larger than what is trained on, of several lengths, rates, shapes and containers."""
    folder = tmp_path_factory.mktemp("varied")
    for index, (name, frames, height, width, fps) in enumerate(
        (
            ("wide.mp4", 110, 270, 480, 16),
            ("film.mp4", 60, 240, 432, 24),
            ("photo.mp4", 45, 320, 480, 8),
            ("square.mkv", 90, 256, 256, 30),
        )
    ):
        path = folder / name
        render_clip(path, frames=frames, height=height, width=width, fps=fps, seed=index)
        path.with_suffix(".txt").write_text("a textured square moves to the right " * (index + 1) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("case", **named(sparing(TRAINABLE)))
def test_fit_trains_it(case, values, varied_clips, config_file):
    """The whole way of a user, for two steps; of i2v some samples go without their image."""
    _, height, width = case.row.size
    path = config_file(
        model_family=case.row.family,
        pretrained_model_name_or_path=str(case.folder),
        crepa_encoder=str(case.folder / "encoder"),
        task=case.task,
        wan_expert=case.row.expert,
        train_data=str(varied_clips),
        num_frames=case.row.size[0],
        height=height,
        width=width,
        max_windows_per_clip=1,
        i2v_dropout=0.5 if case.task == "i2v" else 0.0,
        max_train_steps=2,
    )
    fit(read_plan(path), Screen(quiet=True))
    run = Path(values["output_dir"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line[key]) for line in lines for key in ("loss", "crepa_alignment_score", "grad_norm"))
    assert all(line["grad_norm"] > 0 for line in lines)
    with safe_open(run / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert any(name.endswith("lora_B.weight") and file.get_tensor(name).abs().max() > 0 for name in file.keys())  # noqa: SIM118
        assert file.metadata().get("crepatrain.expert") == case.row.expert


def test_flex_attention_cant_be_trained_on_a_cpu(open_case):
    for row in ROWS:
        family = open_case(row, row.tasks[0]).family
        reason = family.untrainable(torch.device("cpu"))
        assert ("flex attention" in reason) if row.flex else reason is None
        assert family.untrainable(torch.device("cuda")) is None


def test_every_tiny_model_is_in_the_contract():
    assert {(row.family, row.tiny) for row in ROWS} == {(name, tiny) for name in FAMILIES for tiny in family_class(name).tiny}
