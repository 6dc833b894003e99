"""Which frames a frame is aligned with, and how strongly. Plain floats: the config needs them as much as the loss."""

import math


def neighbour_weights(frames: int, *, distance: int, tau: float, cumulative: bool) -> list[dict[int, float]]:
    """For each frame f the weight w(f, k) of every frame k that it is compared with, itself (weight 1) included.

    K(f) is {f-d, f+d} inside the clip, or {f +- 1 ... f +- d} if cumulative, with w(f, k) = exp(-|k - f| / tau); d is capped
    at frames - 1, and d = 0 leaves K empty. Eq. 6 of arXiv 2506.09229.
    """
    distance = min(distance, frames - 1)
    offsets = range(1, distance + 1) if cumulative else range(distance, distance + 1) if distance else range(0)
    weights: list[dict[int, float]] = []
    for f in range(frames):
        row = {f: 1.0}
        for offset in offsets:
            for k in (f - offset, f + offset):
                if 0 <= k < frames:
                    row[k] = math.exp(-offset / tau)
        weights.append(row)
    return weights


def reachable_maximum(frames: int, *, distance: int, tau: float, cumulative: bool, normalize_neighbour_sum: bool) -> float:
    """The largest value that the mean over frames of align(f) can take: every cosine at 1."""
    if normalize_neighbour_sum:
        return 1.0
    rows = neighbour_weights(frames, distance=distance, tau=tau, cumulative=cumulative)
    return sum(sum(row.values()) for row in rows) / frames
