import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crepatrain.neighbours import neighbour_weights, reachable_maximum

E1, E2 = math.exp(-1), math.exp(-2)


@pytest.mark.parametrize(
    ("frames", "distance", "tau", "cumulative", "expected"),
    [
        (3, 0, 1.0, False, [{0: 1}, {1: 1}, {2: 1}]),
        (3, 0, 1.0, True, [{0: 1}, {1: 1}, {2: 1}]),
        (1, 1, 1.0, False, [{0: 1}]),
        (1, 3, 1.0, True, [{0: 1}]),
        (3, 1, 1.0, False, [{0: 1, 1: E1}, {0: E1, 1: 1, 2: E1}, {1: E1, 2: 1}]),
        (4, 2, 1.0, False, [{0: 1, 2: E2}, {1: 1, 3: E2}, {0: E2, 2: 1}, {1: E2, 3: 1}]),
        (3, 2, 1.0, True, [{0: 1, 1: E1, 2: E2}, {0: E1, 1: 1, 2: E1}, {0: E2, 1: E1, 2: 1}]),
        (
            3,
            2,
            2.0,
            True,
            [{0: 1, 1: math.exp(-0.5), 2: E1}, {0: math.exp(-0.5), 1: 1, 2: math.exp(-0.5)}, {0: E1, 1: math.exp(-0.5), 2: 1}],
        ),
        (3, 9, 1.0, False, [{0: 1, 2: E2}, {1: 1}, {0: E2, 2: 1}]),
    ],
)
def test_weights(frames, distance, tau, cumulative, expected):
    rows = neighbour_weights(frames, distance=distance, tau=tau, cumulative=cumulative)
    assert len(rows) == len(expected)
    for row, literal in zip(rows, expected, strict=True):
        assert row == pytest.approx(literal, abs=1e-15)


@given(st.integers(1, 12), st.integers(0, 15), st.floats(0.1, 10), st.booleans())
def test_weights_are_symmetric_and_decay(frames, distance, tau, cumulative):
    rows = neighbour_weights(frames, distance=distance, tau=tau, cumulative=cumulative)
    for f, row in enumerate(rows):
        assert row[f] == 1
        for k, weight in row.items():
            assert rows[k][f] == weight == math.exp(-abs(k - f) / tau)


def test_inside_the_clip_a_frame_reaches_1_plus_2_over_e():
    rows = neighbour_weights(21, distance=1, tau=1.0, cumulative=False)
    assert all(sum(row.values()) == pytest.approx(1 + 2 / math.e) for row in rows[1:-1])
    assert sum(rows[0].values()) == sum(rows[-1].values()) == pytest.approx(1 + 1 / math.e)


@pytest.mark.parametrize(
    ("frames", "distance", "cumulative", "maximum"),
    [
        (1, 1, False, 1),
        (21, 0, False, 1),
        (2, 1, False, 1 + E1),
        (21, 1, False, (2 * (1 + E1) + 19 * (1 + 2 * E1)) / 21),
        (3, 2, True, (2 * (1 + E1 + E2) + 1 + 2 * E1) / 3),
        (3, 7, False, (2 * (1 + E2) + 1) / 3),
    ],
)
def test_reachable_maximum(frames, distance, cumulative, maximum):
    options = {"distance": distance, "tau": 1.0, "cumulative": cumulative}
    assert reachable_maximum(frames, **options, normalize_neighbour_sum=False) == pytest.approx(maximum)
    assert reachable_maximum(frames, **options, normalize_neighbour_sum=True) == 1


def test_reachable_maximum_nears_the_inner_frames_in_a_long_clip():
    maximum = reachable_maximum(10_000, distance=1, tau=1.0, cumulative=False, normalize_neighbour_sum=False)
    assert maximum == pytest.approx(1 + 2 / math.e, abs=1e-4)
