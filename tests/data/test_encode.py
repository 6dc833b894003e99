"""Frames as videos, grids and strips."""

import numpy as np
from common import frames_of

from crepatrain.data.encode import film_strip, grid_video, video_facts, write_video


def test_a_grid_is_labelled_and_whole(tmp_path):
    video = np.full((3, 32, 48, 3), 200, dtype=np.uint8)
    grid = grid_video([[("a", video), ("b", video)], [("c", video), ("d", video)]])
    assert grid.shape == (3, 2 * (32 + 22) + 4, 2 * 48 + 4, 3)
    assert (grid[:, 22:54, :48] == 200).all()
    assert grid[:, :22, :48].max() > 100
    write_video(tmp_path / "deep" / "grid.mp4", grid, fps=16)
    assert frames_of(tmp_path / "deep" / "grid.mp4").shape == grid.shape


def test_a_strip_shows_both_ends_and_no_frame_twice():
    frames = np.arange(9, dtype=np.uint8).repeat(400 * 800 * 3).reshape(9, 400, 800, 3)
    strip = np.array(film_strip(frames))
    assert strip.shape == (160, 6 * 320 + 5 * 4, 3)
    assert [strip[80, left + 160, 0] for left in range(0, strip.shape[1], 324)] == [0, 2, 3, 5, 6, 8]
    assert np.array(film_strip(frames[:1])).shape == (160, 320, 3)


def test_a_video_without_facts_has_none(tmp_path):
    write_video(tmp_path / "plain.mp4", np.zeros((2, 32, 32, 3), dtype=np.uint8), fps=8)
    (tmp_path / "broken.mp4").write_bytes(b"x")
    assert video_facts(tmp_path / "plain.mp4") == video_facts(tmp_path / "broken.mp4") == {}
