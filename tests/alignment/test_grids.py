import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crepatrain.alignment.crepa import Crepa
from crepatrain.alignment.grids import blend, common_grid, match_frames, resample, subsample_indices
from crepatrain.geometry import TokenGrid
from crepatrain.tensors import PatchFeatures

STUDENT, DINO = (30, 52), (37, 37)  # 480x832, and DINOv2 at 518x518


def coordinates(grid):
    """[P, 2]: where each patch's centre lies in the picture, (down, right), both in (0, 1)."""
    rows, columns = ((torch.arange(n) + 0.5) / n for n in grid)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def paint(grid):
    """[P, 48]: a smooth picture of unit vectors: the nearer two places, the higher their cosine."""
    place = coordinates(grid)
    angles = torch.cat([math.pi * k * place for k in (0.5, 1, 2, 3, 5, 8, 11, 14, 17, 20, 23, 26)], dim=-1)
    return F.normalize(torch.cat([angles.cos(), angles.sin()], dim=-1), dim=-1)


def along_the_raster(values, count):
    """What other trainers do: [1, T, P, X] as a line of P values."""
    return F.interpolate(values[0].transpose(1, 2), size=count, mode="linear").transpose(1, 2)[None]


def offsets(student, teacher, cell):
    """Per patch how far apart student and teacher look, in cells."""
    return ((student - teacher).abs() / torch.tensor(cell)).amax(dim=-1).flatten()


@pytest.mark.parametrize("teacher", [DINO, (52, 30), (60, 104), (16, 16), STUDENT])
def test_every_token_meets_the_patch_at_its_own_place(teacher):
    onto = common_grid(STUDENT, teacher)
    ours = resample(coordinates(STUDENT)[None, None], STUDENT, onto)
    theirs = resample(coordinates(teacher)[None, None], teacher, onto)
    assert ours.shape == theirs.shape == (1, 1, onto[0] * onto[1], 2)
    assert offsets(ours, theirs, (1 / onto[0], 1 / onto[1])).max() < 0.5


def test_dinos_grid_is_met_within_a_fifth_of_a_cell():
    ours = resample(coordinates(STUDENT)[None, None], STUDENT, DINO)
    assert offsets(ours, coordinates(DINO), (1 / 37, 1 / 37)).max() < 0.2


def test_a_resample_along_the_raster_would_not_meet():
    ours = along_the_raster(coordinates(STUDENT)[None, None], DINO[0] * DINO[1])
    assert (offsets(ours, coordinates(DINO), (1 / 37, 1 / 37)) < 1).float().mean() < 0.1


def score(student, teacher, teacher_grid):
    """What Crepa makes of a student's picture and a teacher's, with a projector that changes nothing."""
    module = Crepa(48, 48, distance=0)
    module.projector.norm = nn.Identity()
    nn.init.eye_(module.projector.linear.weight)
    nn.init.zeros_(module.projector.linear.bias)
    tokens, features = student[None], PatchFeatures(teacher[None, None], teacher_grid)
    return module(tokens, features, TokenGrid(1, *STUDENT, ((0, 1),))).self_similarity.item()


@pytest.mark.parametrize("teacher", [DINO, (52, 30), (37, 60)])
def test_crepa_sees_one_picture_on_both_grids(teacher):
    assert score(paint(STUDENT), paint(teacher), teacher) > 0.97


def test_crepa_tells_a_picture_that_lies_otherwise():
    assert score(paint(STUDENT), paint((37, 60)), (60, 37)) < 0.7
    line = along_the_raster(paint(STUDENT)[None, None], 37 * 37)
    assert F.cosine_similarity(line, paint(DINO), dim=-1).mean() < 0.7


def test_the_finer_grid_gives_way():
    assert common_grid((30, 52), (37, 37)) == (37, 37)
    assert common_grid((15, 26), (37, 37)) == (15, 26)
    assert common_grid((4, 6), (6, 4)) == (4, 6)


def test_the_same_grid_is_not_touched():
    values = torch.randn(2, 3, 24, 5)
    assert resample(values, (4, 6), (4, 6)) is values


@pytest.mark.parametrize(
    ("longer", "shorter", "indices"),
    [
        (5, 5, [0, 1, 2, 3, 4]),
        (81, 21, list(range(0, 81, 4))),
        (10, 4, [0, 3, 6, 9]),
        (8, 3, [0, 3, 7]),
        (7, 4, [0, 2, 4, 6]),
        (9, 2, [0, 8]),
        (9, 1, [0]),
    ],
)
def test_subsample(longer, shorter, indices):
    assert subsample_indices(longer, shorter) == indices


def test_the_longer_side_is_subsampled():
    few, many = torch.arange(3.0).view(1, 3, 1, 1), torch.arange(8.0).view(1, 8, 1, 1)
    student, teacher = match_frames(few, many)
    assert student is few
    assert teacher.flatten().tolist() == [0, 3, 7]
    student, teacher = match_frames(many, few)
    assert student.flatten().tolist() == [0, 3, 7]
    assert teacher is few


def test_blend_sums_the_neighbours():
    rows = dict(enumerate(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])))
    blended = [blend(rows, weights).tolist() for weights in ({0: 1.0, 2: 0.5}, {1: 1.0}, {2: 1.0, 0: 0.25, 1: 0.5})]
    assert blended == [[2.0, 1.0], [0.0, 1.0], [2.25, 2.5]]
