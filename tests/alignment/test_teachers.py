import json
import math

import pytest
import torch
import torch.nn.functional as F
from common import tiny_family
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from crepatrain.alignment.encoders import VisionEncoder, load_encoder
from crepatrain.alignment.layersync import layersync_loss
from crepatrain.alignment.teachers import BackboneTeacher, CachedTeacher, LatentTeacher, PixelTeacher
from crepatrain.errors import UserError
from crepatrain.geometry import TokenGrid
from crepatrain.tensors import Batch, PatchFeatures

SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
GRID = TokenGrid(3, 4, 6, ((0, 1), (1, 5), (5, 9)))  # nine frames of 64x96 through Wan
SIZE = (56, 84)


def build(registers):
    torch.manual_seed(0)
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=registers))
    else:
        model = Dinov2Model(Dinov2Config(**SHAPE))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model.eval()


def clip(b=2, n=3, height=48, width=80, seed=0):
    return torch.randint(0, 256, (b, n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batch(**changes):
    generator = torch.Generator().manual_seed(3)
    latents, noise = torch.randn(2, 2, 16, 3, 8, 12, generator=generator)
    return Batch(latents, noise, torch.tensor([0.3, 0.7]), {}, GRID, 16.0, ("a", "b"), **changes)


def by_hand(model, frame, size, prefix):
    """One frame [3, H, W] uint8 -> [P, E]."""
    pixels = F.interpolate(frame[None].float(), size=size, mode="bilinear", align_corners=False, antialias=True)[0]
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        pixels[channel] = (pixels[channel] / 255 - mean) / std
    with torch.no_grad():
        return model(pixel_values=pixels[None]).last_hidden_state[0, prefix:]


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", [(42, 70), (84, 28), (56, 56)])
def test_features_are_the_patch_tokens_of_the_last_hidden_state(registers, size):
    model, frames = build(registers), clip()
    features = VisionEncoder(model, 14, 8)(frames, size)
    assert features.grid == (size[0] // 14, size[1] // 14)
    assert features.values.shape == (2, 3, features.grid[0] * features.grid[1], 24)
    for b in range(2):
        for n in range(3):
            expected = by_hand(model, frames[b, n], size, 1 + registers)
            torch.testing.assert_close(features.values[b, n], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("registers", [0, 4])
def test_patches_come_in_raster_order(registers):
    """What happens in one patch of the frame shows most in that patch's token."""
    encoder = VisionEncoder(build(registers), 14, 8)
    frames = torch.full((1, 1, 3, 42, 70), 128, dtype=torch.uint8)
    for row, column in ((0, 0), (0, 4), (1, 2), (2, 1)):
        other = frames.clone()
        other[..., row * 14 : row * 14 + 14, column * 14 : column * 14 + 14] = clip(1, 1, 14, 14)
        change = (encoder(frames, (42, 70)).values - encoder(other, (42, 70)).values).norm(dim=-1)
        assert change.argmax() == row * 5 + column


def test_features_are_not_unit_normalised():
    values = VisionEncoder(build(0), 14, 8)(clip(), (42, 70)).values
    assert values.norm(dim=-1).std() > 0.01


@pytest.mark.parametrize("frames_per_forward", [1, 2, 4, 5])
def test_chunks_change_nothing(frames_per_forward):
    model, frames = build(4), clip()
    whole = VisionEncoder(model, 14, 6)(frames, (42, 70)).values
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True)
    chunked = VisionEncoder(model, 14, frames_per_forward)(frames, (42, 70)).values
    handle.remove()
    assert len(seen) == math.ceil(6 / frames_per_forward)
    assert max(seen) == frames_per_forward
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)


def test_the_encoder_is_frozen_and_in_eval_mode():
    encoder = VisionEncoder(build(0).train(), 14, 8)
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(clip(), (42, 70)).values.requires_grad


def test_the_encoder_keeps_its_own_precision_in_a_step_under_autocast():
    """Otherwise what is encoded in a step differs from what was cached, and fp32 on a CPU is none."""
    encoder, frames = VisionEncoder(build(0), 14, 8), clip()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = encoder(frames, (42, 70)).values
    assert torch.equal(under.float(), encoder(frames, (42, 70)).values)


@pytest.mark.parametrize("source", ["pixels", "latents"])
def test_a_step_under_autocast_has_the_teacher_that_the_cache_has(wan, source):
    family = tiny_family()
    vae = family.load_vae(str(wan), torch.float32)
    encoder = VisionEncoder(build(0), 14, 8)
    decoded = LatentTeacher(encoder, lambda _: SIZE, lambda latents: family.decode_latents(vae, latents))
    teacher = decoded if source == "latents" else PixelTeacher(encoder, lambda _: SIZE)
    clips = batch(pixels=clip(2, 3, 64, 96))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = teacher.features(clips, {}).values
    assert torch.equal(under.float(), teacher.features(clips, {}).values)


@pytest.mark.parametrize("registers", [0, 4])
def test_an_encoder_from_a_folder(tmp_path, registers):
    model, frames = build(registers), clip()
    model.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path, 14, (42, 70), frames_per_forward=4, device=torch.device("cpu"), dtype=torch.float32)
    expected = VisionEncoder(model, 14, 4)(frames, (42, 70)).values
    torch.testing.assert_close(loaded(frames, (42, 70)).values, expected, rtol=1e-5, atol=1e-5)


def test_a_damaged_encoder_folder(tmp_path):
    build(0).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"crepa_encoder: .* can't be loaded") as error:
        load_encoder(tmp_path, 14, (42, 70), frames_per_forward=4, device=torch.device("cpu"), dtype=torch.float32)
    assert "download it again" in error.value.problems[0].fix


def load(folder):
    return load_encoder(folder, 14, (42, 70), frames_per_forward=4, device=torch.device("cpu"), dtype=torch.float32)


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def change_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    "damage",
    [
        cut_weights,
        lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"),
        change_config(model_type="unheard_of"),
        change_config(model_type="blip_vision_model"),
        change_config(num_attention_heads=5),
        change_config(hidden_size=26),
        change_config(num_hidden_layers="two"),
    ],
    ids=["cut weights", "no JSON", "unknown type", "no such model", "heads", "other shapes", "a text"],
)
def test_every_damage_of_an_encoder_folder_is_one_message(tmp_path, damage):
    build(0).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=r"crepa_encoder: .* can't be loaded \(\S.*\)"):
        load(tmp_path)


@pytest.mark.parametrize("bug", [ValueError, RuntimeError, AttributeError, TypeError])
def test_a_bug_of_ours_is_not_blamed_on_the_encoder(tmp_path, monkeypatch, bug):
    def broken(*_):
        raise bug("ours")

    build(0).save_pretrained(tmp_path)
    monkeypatch.setattr("crepatrain.alignment.encoders.own_precision", broken)
    with pytest.raises(bug, match="ours"):
        load(tmp_path)


def tiny_text_encoder():
    return T5EncoderModel(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))


def tiny_vit(**changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 28}
    return ViTModel(ViTConfig(**sizes, patch_size=14, **changes), add_pooling_layer=False)


@pytest.mark.parametrize(
    ("make", "words"),
    [(tiny_text_encoder, "does not take pictures"), (lambda: tiny_vit(num_channels=1), "1 channels")],
    ids=["text", "grey pictures"],
)
def test_a_model_of_something_else_is_refused(tmp_path, make, words):
    make().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"does not give a token for every patch of a 42 x 70 frame \(.*{words}"):
        load(tmp_path)


def test_a_plain_vit_is_taken_at_any_size(tmp_path):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=28, patch_size=14
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    options = {"frames_per_forward": 4, "device": torch.device("cpu"), "dtype": torch.float32}
    encoder = load_encoder(tmp_path, 14, (42, 70), **options)
    seen = encoder(torch.zeros(1, 2, 3, 20, 30, dtype=torch.uint8), (42, 70))
    assert (seen.values.shape, seen.grid) == ((1, 2, 15, 16), (3, 5))


def test_a_model_without_a_token_for_every_patch_is_refused(tmp_path):
    ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not give a token for every patch"):
        load_encoder(tmp_path, 14, (42, 70), frames_per_forward=4, device=torch.device("cpu"), dtype=torch.float32)


def test_the_cached_teacher_hands_on_what_was_read():
    features = PatchFeatures(torch.randn(2, 3, 24, 5), (4, 6))
    assert CachedTeacher().features(batch(teacher=features), {}) is features
    assert CachedTeacher().blocks == ()


def test_the_pixel_teacher_encodes_the_batchs_frames():
    encoder, pixels = VisionEncoder(build(0), 14, 8), clip(2, 3, 64, 96)
    teacher = PixelTeacher(encoder, lambda grid: (14 * grid.h, 14 * grid.w))
    features = teacher.features(batch(pixels=pixels), {})
    assert teacher.blocks == ()
    assert features.grid == (GRID.h, GRID.w)
    assert torch.equal(features.values, encoder(pixels, SIZE).values)


def test_the_latent_teacher_decodes_and_takes_the_last_frame_of_each_span(wan):
    family = tiny_family()
    vae = family.load_vae(str(wan), torch.float32)
    encoder = VisionEncoder(build(0), 14, 8)
    clean = batch()
    teacher = LatentTeacher(encoder, lambda grid: (14 * grid.h, 14 * grid.w), lambda latents: family.decode_latents(vae, latents))
    clean.latents.requires_grad_()
    features = teacher.features(clean, {})
    assert not features.values.requires_grad
    assert features.grid == (GRID.h, GRID.w)
    with torch.no_grad():
        video = family.decode_latents(vae, clean.latents)
    assert video.shape == (2, 3, 9, 64, 96)

    def encode(frames):
        bytes_ = ((video[:, :, frames] + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8)
        return encoder(bytes_.permute(0, 2, 1, 3, 4), SIZE).values

    torch.testing.assert_close(features.values, encode([0, 4, 8]), rtol=1e-4, atol=1e-3)
    for others in ([0, 1, 5], [0, 2, 6], [0, 3, 7]):
        assert (features.values - encode(others)).abs().max() > 0.05


def test_the_latent_teacher_needs_no_vae_encoder(wan):
    family = tiny_family()
    vae = family.load_vae(str(wan), torch.float32)
    encoder = VisionEncoder(build(0), 14, 8)
    teacher = LatentTeacher(encoder, lambda _: SIZE, lambda latents: family.decode_latents(vae, latents))
    before = teacher.features(batch(), {}).values
    family.drop_vae_encoder(vae)
    assert not [name for name, _ in vae.named_parameters() if name.startswith(("encoder", "quant_conv"))]
    assert torch.equal(before, teacher.features(batch(), {}).values)


def test_the_backbone_teacher_is_a_detached_deeper_block():
    tokens = {1: torch.randn(2, GRID.tokens, 8), 5: torch.randn(2, GRID.tokens, 8, requires_grad=True)}
    teacher = BackboneTeacher(5)
    features = teacher.features(batch(), tokens)
    assert teacher.blocks == (5,)
    assert features.grid == (4, 6)
    assert not features.values.requires_grad
    for t in range(3):
        assert torch.equal(features.values[:, t], tokens[5][:, t * 24 : t * 24 + 24])


def test_layersync_is_minus_the_mean_cosine():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 7, 5, generator=generator)
    student.requires_grad_()
    teacher.requires_grad_()
    expected = []
    for b in range(2):
        total = 0.0
        for x, y in zip(student[b].tolist(), teacher[b].tolist(), strict=True):
            dot = sum(i * j for i, j in zip(x, y, strict=True))
            total += dot / (math.hypot(*x) * math.hypot(*y))
        expected.append(-total / 7)
    loss = layersync_loss(student, teacher)
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)
    loss.sum().backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


def test_layersync_computes_in_fp32():
    student, teacher = torch.randn(2, 2, 7, 5).bfloat16()
    loss = layersync_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, layersync_loss(student.float(), teacher.float()))
