import inspect
import math
from itertools import product

import oracle
import pytest
import torch

from crepatrain.alignment.crepa import Crepa
from crepatrain.config.alignment_sections import CrepaConfig
from crepatrain.geometry import TokenGrid
from crepatrain.tensors import PatchFeatures

B, D, E = 2, 6, 5


def token_grid(t, h, w):
    return TokenGrid(t, h, w, tuple((f, f + 1) for f in range(t)))


def draw(t, grid, n, teacher_grid, seed=0):
    """Tokens and teacher features in float64, neither of them centred or of unit length."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(B, t * grid[0] * grid[1], D, generator=generator, dtype=torch.float64) * 3 + 0.5
    teacher = torch.randn(B, n, teacher_grid[0] * teacher_grid[1], E, generator=generator, dtype=torch.float64) * 2 - 0.3
    return tokens, teacher


def build(kind="linear", *, seed=1, **options):
    torch.manual_seed(seed)
    module = Crepa(D, E, projector=kind, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.double()


def gradients(loss, module, tokens):
    # Samples of unequal weight, so that a loss that mixes them up does not pass.
    return torch.autograd.grad((loss * torch.tensor([1.0, 0.3])).sum(), [tokens, *module.parameters()])


def check(t, grid, n, teacher_grid, kind="linear", **options):
    tokens, teacher = draw(t, grid, n, teacher_grid)
    tokens.requires_grad_()
    module = build(kind, **options)
    output = module(tokens, PatchFeatures(teacher, teacher_grid), token_grid(t, *grid))
    names = {
        "cumulative_neighbors": "cumulative",
        "normalize_by_frames": "by_frames",
        "normalize_neighbour_sum": "neighbour_sum",
    }
    literal = {names.get(name, name): value for name, value in options.items()}
    loss, alignment, self_similarity = oracle.crepa(
        tokens, teacher, (t, *grid), teacher_grid, module.projector, kind=kind, **literal
    )
    assert output.loss.shape == output.alignment.shape == output.self_similarity.shape == (B,)
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(output.loss, loss, **exact)
    torch.testing.assert_close(output.alignment, alignment.detach(), **exact)
    torch.testing.assert_close(output.self_similarity, self_similarity.detach(), **exact)
    found, expected = gradients(output.loss, module, tokens), gradients(loss, module, tokens)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **exact)
    assert expected[0].abs().max() > 1e-4


@pytest.mark.parametrize(
    ("distance", "cumulative", "by_frames", "neighbour_sum"),
    list(product([0, 1, 2, 3, 9], [False, True], [False, True], [False, True])),
)
def test_neighbour_options(distance, cumulative, by_frames, neighbour_sum):
    options = {
        "distance": distance,
        "cumulative_neighbors": cumulative,
        "normalize_by_frames": by_frames,
        "normalize_neighbour_sum": neighbour_sum,
    }
    check(4, (2, 3), 4, (2, 3), tau=1.0, **options)
    check(4, (2, 3), 4, (3, 4), tau=0.6, **options)


CLIPS = {
    "one frame": (1, (2, 3), 1, (2, 3)),
    "same grid": (3, (2, 3), 3, (2, 3)),
    "teacher finer": (3, (2, 3), 3, (4, 5)),
    "teacher coarser": (3, (4, 5), 3, (3, 2)),
    "teacher finer in rows, coarser in columns": (3, (2, 5), 3, (5, 3)),
    "student finer in rows, coarser in columns": (3, (6, 2), 3, (2, 4)),
    "same count, other shape": (3, (2, 6), 3, (4, 3)),
    "same count, turned": (3, (2, 5), 3, (5, 2)),
    "more teacher frames": (3, (2, 3), 8, (2, 3)),
    "fewer teacher frames": (6, (2, 3), 4, (3, 2)),
    "one teacher frame": (3, (2, 3), 1, (3, 4)),
    "one token frame": (1, (3, 4), 5, (2, 2)),
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize(("kind", "spatial_align"), [("linear", True), ("linear", False), ("conv", True)])
@pytest.mark.parametrize("distance", [1, 2])
def test_frames_and_grids(clip, kind, spatial_align, distance):
    check(*clip, kind=kind, spatial_align=spatial_align, distance=distance, cumulative_neighbors=distance == 2, tau=1.7)


@pytest.mark.parametrize("chunk", [1, 12, 10_000], ids=["a frame a chunk", "two frames a chunk", "one chunk"])
def test_without_patches_the_mean_is_that_of_projected_patches(monkeypatch, chunk):
    """Not the projection of the mean: a LayerNorm tells the two apart."""
    monkeypatch.setattr("crepatrain.alignment.chunked._CHUNK_TOKENS", chunk)
    tokens, teacher = draw(5, (2, 3), 5, (3, 4))
    tokens.requires_grad_()
    module, grid, features = build(spatial_align=False), token_grid(5, 2, 3), PatchFeatures(teacher, (3, 4))
    output = module(tokens, features, grid)
    pooled = module.projector(tokens.unflatten(1, (5, 6))).mean(dim=2)
    cosines = torch.nn.functional.cosine_similarity(pooled[:, :, None], teacher.mean(dim=2)[:, None], dim=-1)
    own = cosines.diagonal(dim1=1, dim2=2)
    before, after = (cosines.diagonal(offset, dim1=1, dim2=2).sum(dim=1) for offset in (-1, 1))
    alignment = (own.sum(dim=1) + math.exp(-1) * (before + after)) / 5
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(output.loss, -alignment, **exact)
    torch.testing.assert_close(output.self_similarity, own.mean(dim=1).detach(), **exact)
    torch.testing.assert_close(module.patch_similarity(tokens, features, grid).flatten(1).mean(dim=1), own.mean(dim=1).float())
    for mine, theirs in zip(gradients(output.loss, module, tokens), gradients(-alignment, module, tokens), strict=True):
        torch.testing.assert_close(mine, theirs, **exact)
    raw = module.projector(tokens.unflatten(1, (5, 6)).mean(dim=2))
    other = torch.nn.functional.cosine_similarity(raw, teacher.mean(dim=2), dim=-1).mean(dim=1)
    assert (output.self_similarity - other).abs().min() > 0.01


@pytest.mark.parametrize("options", [{}, {"cumulative_neighbors": True}, {"normalize_neighbour_sum": True}], ids=str)
@pytest.mark.parametrize("distance", [1, 3])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_image_is_aligned_as_plain_repa_does(kind, distance, options):
    """One frame has no neighbours: the score is the mean cosine of its patches with its own features."""
    tokens, teacher = draw(1, (2, 3), 1, (2, 3))
    tokens.requires_grad_()
    grid, features = token_grid(1, 2, 3), PatchFeatures(teacher, (2, 3))
    module, plain = build(kind, distance=distance, **options), build(kind, distance=0)
    output, expected = module(tokens, features, grid), plain(tokens, features, grid)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.alignment, output.self_similarity)
    torch.testing.assert_close(output.loss.detach(), -output.self_similarity)
    if kind == "linear":
        cosine = torch.nn.functional.cosine_similarity(module.projector(tokens), teacher[:, 0], dim=-1).mean(dim=1)
        torch.testing.assert_close(output.alignment, cosine.detach())
    for mine, theirs in zip(gradients(output.loss, module, tokens), gradients(expected.loss, plain, tokens), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_single_precision(kind):
    tokens, teacher = draw(4, (4, 5), 4, (3, 3))
    module = build(kind, distance=2, cumulative_neighbors=True)
    literal = oracle.crepa(tokens, teacher, (4, 4, 5), (3, 3), module.projector, kind=kind, distance=2, cumulative=True)
    output = module.float()(tokens.float(), PatchFeatures(teacher.float(), (3, 3)), token_grid(4, 4, 5))
    for found, expected in zip((output.loss, output.alignment, output.self_similarity), literal, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("teacher_grid", [(2, 3), (3, 4)])
def test_no_gradient_to_the_teacher(teacher_grid):
    tokens, teacher = draw(3, (2, 3), 3, teacher_grid)
    tokens.requires_grad_()
    teacher.requires_grad_()
    output = build()(tokens, PatchFeatures(teacher, teacher_grid), token_grid(3, 2, 3))
    output.loss.sum().backward()
    assert tokens.grad is not None
    assert teacher.grad is None


def test_scores_are_detached():
    tokens, teacher = draw(3, (2, 3), 3, (2, 3))
    output = build()(tokens.requires_grad_(), PatchFeatures(teacher, (2, 3)), token_grid(3, 2, 3))
    assert output.loss.requires_grad
    assert not output.alignment.requires_grad
    assert not output.self_similarity.requires_grad


@pytest.mark.parametrize(
    ("kind", "spatial_align", "teacher_grid"),
    [("linear", True, (3, 3)), ("linear", True, (4, 5)), ("linear", False, (3, 3)), ("conv", True, (3, 3))],
)
def test_autocast_has_no_influence(kind, spatial_align, teacher_grid):
    tokens, teacher = draw(3, (4, 5), 3, teacher_grid)
    tokens, teacher = tokens.bfloat16(), teacher.bfloat16()
    module = build(kind, spatial_align=spatial_align).float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = module(tokens, PatchFeatures(teacher, teacher_grid), token_grid(3, 4, 5))
    outside = module(tokens.float(), PatchFeatures(teacher.float(), teacher_grid), token_grid(3, 4, 5))

    def values(output):
        return output.loss, output.alignment, output.self_similarity, *torch.autograd.grad(output.loss.sum(), module.parameters())

    for found, expected in zip(values(under), values(outside), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_perfect_alignment_reaches_1_plus_2_over_e_inside_the_clip():
    """A teacher that equals the projection, the same in every frame: the maximum, which exceeds 1."""
    module = build()
    frame = torch.randn(B, 1, 6, D, dtype=torch.float64).expand(B, 5, 6, D)
    teacher = module.projector(frame).detach()
    output = module(frame.flatten(1, 2), PatchFeatures(teacher, (2, 3)), token_grid(5, 2, 3))
    e = torch.tensor(-1.0, dtype=torch.float64).exp()
    torch.testing.assert_close(output.alignment, (1 + 2 * 4 / 5 * e).expand(B))
    torch.testing.assert_close(output.self_similarity, torch.ones(B, dtype=torch.float64))


def test_defaults_are_the_configs():
    keys = {"distance": "crepa_adjacent_distance", "tau": "crepa_adjacent_tau"}
    parameters = inspect.signature(Crepa).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert defaults == {name: CrepaConfig.model_fields[keys.get(name, f"crepa_{name}")].default for name in defaults}
