"""Which attention of a transformer computes with what, and that nothing else of the process does."""

import re
from pathlib import Path

import pytest
import stand_in_kernels
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn

from crepatrain.families import family_class, get_family
from crepatrain.specs import FAMILIES
from crepatrain.specs.attention import TRAINABLE_BACKENDS, refused_backend
from crepatrain.tensors import Batch

NATIVE, MATH, FLEX = AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH, AttentionBackendName.FLEX
SIZES = [(name, size) for name in FAMILIES for size in family_class(name).tiny if not size.startswith("tiny-i2v-a14b")]


@pytest.fixture(autouse=True)
def _kernels_as_they_were(monkeypatch):
    for kept in ("_backends", "_constraints", "_supported_arg_names"):
        monkeypatch.setattr(_AttentionBackendRegistry, kept, dict(getattr(_AttentionBackendRegistry, kept)))


def open_family(name, size):
    expert = "low" if "a14b" in size else None
    return get_family(name, family_class(name).tiny[size].checkpoint, expert=expert)


def backends(transformer):
    """Per name of an attention module, its last two parts without numbers, the backends that are set on such modules."""
    found = {}
    for name, module in transformer.named_modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            found.setdefault(re.sub(r"\.\d+\.", ".", name), set()).add(processor._attention_backend)
    return found


EXPECTED = {
    "wan": {"blocks.attn1", "blocks.attn2"},
    "ltxvideo": {"transformer_blocks.attn1"},
    "kandinsky5_video": {
        "text_transformer_blocks.self_attention",
        "visual_transformer_blocks.self_attention",
        "visual_transformer_blocks.cross_attention",
    },
    "sanavideo": set(),
}


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_a_backend_is_set_where_no_mask_is_and_the_process_keeps_its_own(name, size):
    family = open_family(name, size)
    chosen, other = family.empty_transformer(), family.empty_transformer()
    before = backends(other)
    family.set_attention(chosen, "_native_math")
    tiles = {"visual_transformer_blocks.self_attention"} if family.geometry.tile > 1 else set()
    for attention, found in backends(chosen).items():
        assert found == {FLEX if attention in tiles else MATH if attention in EXPECTED[name] else NATIVE}, attention
    assert EXPECTED[name] <= backends(chosen).keys()
    assert backends(other) == before
    assert _AttentionBackendRegistry._active_backend is NATIVE
    family.set_attention(chosen)
    assert MATH not in set().union(*backends(chosen).values())


def test_a_default_of_the_process_does_not_reach_the_transformer(monkeypatch):
    """As DIFFUSERS_ATTN_BACKEND sets it."""
    family = open_family("wan", "tiny")
    transformer = family.empty_transformer()
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.SAGE)
    family.set_attention(transformer)
    assert set().union(*backends(transformer).values()) == {NATIVE}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_attention_that_is_given_a_mask_keeps_torchs_own(name, monkeypatch):
    """What reaches the dispatch with a mask is what the table of the family says."""
    family = open_family(name, "tiny")
    masked = set()
    transformer = family.shallow_transformer(torch.device("cpu")).eval()
    known = {}
    for module_name, module in transformer.named_modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = MATH
            known[module_name] = module
    current = []
    for module_name, module in known.items():
        module.register_forward_pre_hook(lambda *_, module_name=module_name: current.append(module_name))
    real = _AttentionBackendRegistry._backends[MATH]

    def look(query, key, value, attn_mask=None, **rest):
        if attn_mask is not None:
            masked.add(current[-1].rpartition(".")[2])
        return real(query, key, value, attn_mask)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, MATH, look)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, MATH, {"query", "key", "value", "attn_mask"})
    batch = small_batch(family)
    with torch.no_grad():
        family.denoise(transformer, batch.noise, batch.sigma, batch)
    assert current
    assert masked.isdisjoint(family.spec.unmasked_attentions)
    assert {attention.rpartition(".")[2] for attention in current} - masked == set(family.spec.unmasked_attentions)


def small_batch(family):
    geometry = family.geometry
    height, width = (4 * size for size in geometry.size_multiple)
    frames = geometry.temporal_stride + 1
    latent = (geometry.latent_channels, *geometry.latent_shape(frames, height, width))
    text = {
        key: torch.randn(5, *shape[1:]) if len(shape) > 1 else torch.randn(shape) for key, shape in family.text_shapes().items()
    }
    return Batch(
        latents=torch.randn(1, *latent),
        noise=torch.randn(1, *latent),
        sigma=torch.full((1,), 0.5),
        text=family.collate_text([text]),
        grid=geometry.token_grid(frames, height, width),
        fps=16.0,
        keys=("",),
    )


@pytest.mark.parametrize("kernel", ["flash", "_flash_3"])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_kernel_computes_what_native_does(monkeypatch, kernel, autocast):
    """Outputs and gradients of q in fp32, k and v in bf16, as CUDA's autocast gives them; outside of it v's data type counts."""
    stand_in_kernels.install(monkeypatch, kernel)
    family = open_family("wan", "tiny")
    family.set_attention(family.empty_transformer(), kernel)
    results = []
    for backend in (AttentionBackendName(kernel), MATH):
        torch.manual_seed(0)
        query, key, value = (torch.randn(1, 9, 2, 8, dtype=torch.bfloat16) for _ in range(3))
        parts = [query.float().requires_grad_(), key.requires_grad_(), value.requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            given = parts if backend is not MATH else [part.to(torch.bfloat16) for part in parts]
            out = dispatch_attention_fn(*given, backend=backend)
        assert out.dtype == torch.bfloat16
        results.append((out, *torch.autograd.grad(out.float().square().sum(), parts)))
    for mine, native in zip(*results, strict=True):
        torch.testing.assert_close(mine, native)


def test_a_kernel_that_takes_no_mask_says_so(monkeypatch):
    stand_in_kernels.install(monkeypatch, "_flash_3")
    family = open_family("wan", "tiny")
    family.set_attention(family.empty_transformer(), "_flash_3")
    part = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="takes no mask"):
        dispatch_attention_fn(part, part, part, torch.ones(4, 4, dtype=torch.bool), backend=AttentionBackendName._FLASH_3)


def test_setting_a_kernel_again_wraps_it_once(monkeypatch):
    stand_in_kernels.install(monkeypatch, "flash")
    family = open_family("wan", "tiny")
    kernels = []
    for _ in range(2):
        family.set_attention(family.empty_transformer(), "flash")
        kernels.append(_AttentionBackendRegistry._backends[AttentionBackendName.FLASH])
    assert kernels[0] is kernels[1]


def test_every_backend_of_the_installed_diffusers_trains_or_has_a_reason():
    names = {backend.value for backend in AttentionBackendName}
    assert names >= TRAINABLE_BACKENDS.keys()
    assert {name for name in names if refused_backend(name) is None} == TRAINABLE_BACKENDS.keys()


def test_the_guide_has_a_row_for_every_backend_and_a_column_for_every_family():
    guide = (Path(__file__).parents[2] / "docs" / "attention.md").read_text(encoding="utf-8")
    assert f"| `attention_backend` | {' | '.join(f'`{name}`' for name in FAMILIES)} |" in guide
    for backend in TRAINABLE_BACKENDS:
        cells = []
        for spec in FAMILIES.values():
            names = ", ".join(f"`{name}`" for name in spec.unmasked_attentions)
            nabla = "with NABLA alone" if spec.name == "kandinsky5_video" else "no"
            every = "yes" if backend == "native" else names or "no"
            cells.append(nabla if backend == "flex" else every)
        assert f"| `{backend}` | {' | '.join(cells)} |" in guide
