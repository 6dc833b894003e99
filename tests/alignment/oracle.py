"""CREPA as METHOD.md, sections 1 and 2, says it: loops over samples, frames, neighbours and patches, and nothing else.

It shares no code with the package. A frame here is a dict (row, column) -> vector.
"""

import math

import torch

LAYER_NORM_EPS = 1e-5


def subsample(longer, k):
    if k == 1:
        return [0]
    return [math.floor(i * (longer - 1) / (k - 1)) for i in range(k)]


def frame_of(patches, grid):
    rows, columns = grid
    return {(r, c): patches[r * columns + c] for r in range(rows) for c in range(columns)}


def layer_norm(x, weight, bias):
    mean = x.sum() / len(x)
    variance = ((x - mean) * (x - mean)).sum() / len(x)
    return (x - mean) / torch.sqrt(variance + LAYER_NORM_EPS) * weight + bias


def linear(x, norm, projection):
    return projection.weight @ layer_norm(x, norm.weight, norm.bias) + projection.bias


def convolve(frame, conv):
    projected = {}
    for r, c in frame:
        total = conv.bias
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                if (r + i, c + j) in frame:
                    total = total + conv.weight[:, :, i + 1, j + 1] @ frame[r + i, c + j]
        projected[r, c] = total
    return projected


def z_score(frame):
    values = list(frame.values())
    mean = sum(values) / len(values)
    std = torch.sqrt(sum((y - mean) * (y - mean) for y in values) / (len(values) - 1))
    return {at: (y - 0.6 * mean) / (std + 1e-6) for at, y in frame.items()}


def taps(out, size_out, size_in):
    """The two source cells of an output cell along one axis with their weights; centres at half integers, borders repeated."""
    source = max((out + 0.5) * size_in / size_out - 0.5, 0.0)
    low = math.floor(source)
    share = source - low
    return ((min(low, size_in - 1), 1 - share), (min(low + 1, size_in - 1), share))


def bilinear(frame, grid, onto):
    resampled = {}
    for r in range(onto[0]):
        for c in range(onto[1]):
            resampled[r, c] = sum(
                wr * wc * frame[i, j] for i, wr in taps(r, onto[0], grid[0]) for j, wc in taps(c, onto[1], grid[1])
            )
    return resampled


def cosine(a, b):
    return (a * b).sum() / (torch.sqrt((a * a).sum()) * torch.sqrt((b * b).sum()))


def meet(hidden, seen, grid, teacher_grid, projector, kind, spatial_align):
    """One frame of the student [P, D] and one of the teacher [Q, E] as frames on one grid."""
    if not spatial_align:
        projected = [linear(x, projector.norm, projector.linear) for x in hidden]
        return {(0, 0): sum(projected) / len(projected)}, {(0, 0): sum(seen) / len(seen)}
    student, teacher = frame_of(hidden, grid), frame_of(seen, teacher_grid)
    if kind == "conv":
        student, teacher = convolve(student, projector.conv), z_score(teacher)
    else:
        student = {at: linear(x, projector.norm, projector.linear) for at, x in student.items()}
    if grid != teacher_grid:
        if grid[0] * grid[1] > teacher_grid[0] * teacher_grid[1]:
            student = bilinear(student, grid, teacher_grid)
        else:
            teacher = bilinear(teacher, teacher_grid, grid)
    return student, teacher


def crepa(
    tokens,
    teacher,
    grid,
    teacher_grid,
    projector,
    *,
    kind="linear",
    distance=1,
    tau=1.0,
    cumulative=False,
    spatial_align=True,
    by_frames=True,
    neighbour_sum=False,
):
    """Loss, alignment and self-similarity, [B] each.

    Args:
        tokens: [B, S, D]; grid: its (t, h, w).
        teacher: [B, N, Q, E]; teacher_grid: its (rows, columns).
    """
    t, h, w = grid
    teacher = teacher.detach()
    n = teacher.shape[1]
    frames = min(t, n)
    d = min(distance, frames - 1)
    losses, scores, selves = [], [], []
    for b in range(len(tokens)):
        students, teachers = [], []
        for f, k in zip(subsample(t, frames), subsample(n, frames), strict=True):
            hidden = [tokens[b, (f * h + r) * w + c] for r in range(h) for c in range(w)]
            student, seen = meet(hidden, list(teacher[b, k]), (h, w), teacher_grid, projector, kind, spatial_align)
            students.append(student)
            teachers.append(seen)

        def sim(f, k, students=students, teachers=teachers):
            cosines = [cosine(students[f][p], teachers[k][p]) for p in students[f]]
            return sum(cosines) / len(cosines)

        aligns = []
        for f in range(frames):
            steps = [s for s in range(1, d + 1) if cumulative or s == d]
            neighbours = [k for s in steps for k in (f - s, f + s) if 0 <= k < frames]
            align, total = sim(f, f), 1.0
            for k in neighbours:
                weight = math.exp(-abs(k - f) / tau)
                align = align + weight * sim(f, k)
                total += weight
            aligns.append(align / total if neighbour_sum else align)
        losses.append(-sum(aligns) / (frames if by_frames else 1))
        scores.append(sum(aligns) / frames)
        selves.append(sum(sim(f, f) for f in range(frames)) / frames)
    return torch.stack(losses), torch.stack(scores), torch.stack(selves)
