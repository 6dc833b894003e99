"""Bringing the student's and the teacher's grids together, in time and in space."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor


def subsample_indices(longer: int, shorter: int) -> list[int]:
    """Which frames of the longer side stand for the frames of the shorter: floor(i * (longer - 1) / (shorter - 1))."""
    if shorter == 1:
        return [0]
    return [i * (longer - 1) // (shorter - 1) for i in range(shorter)]


def match_frames(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Student [B, T, P, D] and teacher [B, N, Q, E] with the same number of frames, min(T, N)."""
    t, n = student.shape[1], teacher.shape[1]
    if t > n:
        return student[:, subsample_indices(t, n)], teacher
    if n > t:
        return student, teacher[:, subsample_indices(n, t)]
    return student, teacher


def resample(values: Tensor, grid: tuple[int, int], onto: tuple[int, int]) -> Tensor:
    """[B, T, P, X] on one grid of (rows, columns) -> [B, T, Q, X] on another: 2-D bilinear, align_corners=False, no antialias."""
    if grid == onto:
        return values
    b, t, p, x = values.shape
    assert p == grid[0] * grid[1], (values.shape, grid)
    planes = values.reshape(b * t, *grid, x).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=onto, mode="bilinear", align_corners=False)
    return planes.permute(0, 2, 3, 1).reshape(b, t, onto[0] * onto[1], x)


def common_grid(student: tuple[int, int], teacher: tuple[int, int]) -> tuple[int, int]:
    """The coarser of the two grids; of two with the same number of patches the student's, which then is not resampled."""
    return teacher if student[0] * student[1] > teacher[0] * teacher[1] else student


def blend(rows: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
    """A frame's neighbours summed with their weights.

    The neighbour sum of Eq. 6 is linear in the teacher, so align(f) is one dot product with this.
    """
    total = None
    for k, weight in weights.items():
        total = rows[k] * weight if total is None else total.add(rows[k], alpha=weight)
    assert total is not None
    return total
