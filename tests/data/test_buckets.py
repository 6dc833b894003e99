"""Cutting clips into windows and windows into buckets."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crepatrain.data.buckets import Bucket, ClipWindows, cut_clips, nearest_aspect
from crepatrain.data.clip import Clip, ClipInfo


def clip(frames: int, *, fps: float = 16, height: int = 64, width: int = 96, name: str = "clip.mp4") -> Clip:
    return Clip(
        Path(name), "a caption", f"digest of {name}", ClipInfo(height, width, tuple(round(i / fps, 4) for i in range(frames)))
    )


def image(name: str = "image.png", *, height: int = 64, width: int = 96) -> Clip:
    return Clip(Path(name), "a caption", f"digest of {name}", ClipInfo(height, width, (0.0,)))


def cut(
    *clips: Clip,
    frames: int = 9,
    fps: float = 16,
    aspect_buckets: bool = False,
    limit: int = 0,
    no_images: str | None = None,
) -> ClipWindows:
    return cut_clips(
        clips,
        size=(frames, 64, 96),
        fps=fps,
        multiple=(16, 16),
        aspect_buckets=aspect_buckets,
        max_windows_per_clip=limit,
        no_images=no_images,
    )


def test_windows_are_consecutive_and_the_end_is_dropped():
    result = cut(clip(30))
    assert [window.frames for window in result.windows] == [tuple(range(start, start + 9)) for start in (0, 9, 18)]
    assert result.dropped_frames == 3
    assert {window.bucket for window in result.windows} == {Bucket(9, 64, 96)}
    assert not result.refused


def test_windows_are_of_resampled_frames():
    result = cut(clip(59, fps=32))
    assert [window.frames for window in result.windows] == [tuple(range(s, s + 18, 2)) for s in (0, 18, 36)]
    assert result.dropped_frames == 30 - 27


def test_a_clip_of_just_the_length_is_one_window():
    result = cut(clip(9))
    assert [window.frames for window in result.windows] == [tuple(range(9))]
    assert result.dropped_frames == 0


@pytest.mark.parametrize(
    ("limit", "first_frames"), [(0, [0, 9, 18, 27, 36]), (5, [0, 9, 18, 27, 36]), (9, [0, 9, 18, 27, 36]), (3, [0, 18, 36])]
)
def test_a_limit_spreads_the_windows_over_the_clip(limit: int, first_frames: list[int]):
    result = cut(clip(48), limit=limit)
    assert [window.frames[0] for window in result.windows] == first_frames
    assert result.dropped_frames == 48 - 9 * len(first_frames)


def test_two_windows_are_the_first_and_the_last():
    assert [window.frames[0] for window in cut(clip(90), limit=2).windows] == [0, 81]


def test_a_single_window_is_from_the_middle():
    assert [window.frames[0] for window in cut(clip(45), limit=1).windows] == [18]


@given(count=st.integers(1, 40), limit=st.integers(0, 50))
@settings(deadline=None)
def test_windows_never_overlap(count: int, limit: int):
    result = cut(clip(count * 5 + 3), frames=5, limit=limit)
    starts = [window.frames[0] for window in result.windows]
    assert len(starts) == (min(count, limit) if limit else count)
    assert all(b - a >= 5 for a, b in itertools.pairwise(starts))
    assert result.dropped_frames + 5 * len(starts) == count * 5 + 3


def test_a_clip_that_is_too_short_is_refused_with_its_numbers():
    result = cut(clip(8, name="short.mp4"), clip(9, name="good.mp4"))
    assert [refusal.path.name for refusal in result.refused] == ["short.mp4"]
    assert result.refused[0].reason == "8 frames at 16 fps, and num_frames=9 are needed"
    assert [window.path.name for window in result.windows] == ["good.mp4"]


def test_a_fast_clip_is_too_short_by_its_resampled_frames():
    reason = cut(clip(15, fps=32)).refused[0].reason
    assert reason.startswith("8 frames at 16 fps")


def test_slower_clips_are_reported_with_their_factor():
    result = cut(clip(20, fps=8, name="slow.mp4"), clip(20, name="right.mp4"))
    assert [(path.name, pytest.approx(factor, rel=1e-2)) for path, factor in result.slower] == [("slow.mp4", 2)]
    assert len(result.windows) == 4


def test_buckets_are_counted_the_largest_first():
    result = cut(
        clip(18, name="wide.mp4", height=64, width=96), clip(9, name="tall.mp4", height=400, width=100), aspect_buckets=True
    )
    buckets = list(result.buckets.items())
    assert sum(count for _, count in buckets) == 3
    assert buckets[0][0] == Bucket(9, 64, 96)
    areas = [bucket.height * bucket.width for bucket, _ in buckets]
    assert areas == sorted(areas, reverse=True)


def test_a_window_says_its_clip_and_frames():
    assert cut(clip(18)).windows[1].name == "clip.mp4 frames 9-17"


@pytest.mark.parametrize("limit", [0, 1, 3])
@pytest.mark.parametrize("suffix", [".png", ".JPG", ".webp"])
def test_an_image_is_a_window_of_one_frame(suffix: str, limit: int):
    result = cut(image(f"a{suffix}"), clip(18), image(f"b{suffix}", height=640, width=960), limit=limit)
    pictures = [window for window in result.windows if window.path.suffix == suffix]
    assert [window.frames for window in pictures] == [(0,), (0,)]
    assert {window.bucket for window in pictures} == {Bucket(1, 64, 96)}
    assert not result.refused
    assert not result.slower
    assert len(result.buckets) == 2
    assert pictures[0].name == f"a{suffix} frames 0-0"


def test_images_are_cut_by_their_aspect_too():
    result = cut(image("wide.png"), image("tall.png", height=400, width=100), aspect_buckets=True)
    wide, tall = (window.bucket for window in result.windows)
    assert wide == Bucket(1, 64, 96)
    assert tall.frames == 1
    assert tall.height > tall.width


def test_an_image_has_the_bucket_of_a_clip_of_one_frame():
    result = cut(image(), clip(3), frames=1)
    assert result.buckets == {Bucket(1, 64, 96): 4}


def test_images_that_can_not_be_used_are_refused_with_the_reason():
    result = cut(image(), clip(9), no_images="this model is trained on clips only")
    assert [window.path.name for window in result.windows] == ["clip.mp4"]
    (refusal,) = result.refused
    assert refusal.path.name == "image.png"
    assert refusal.reason == "it is an image, and this model is trained on clips only"
    assert refusal.remedy == "remove it"


def test_a_clip_of_one_frame_is_too_short_for_more():
    assert [refusal.path.name for refusal in cut(clip(1, name="one.mp4")).refused] == ["one.mp4"]


def test_buckets_of_other_caption_lengths_are_others():
    buckets = [Bucket(9, 64, 96), Bucket(9, 64, 96, caption_tokens=7), Bucket(9, 64, 96, caption_tokens=8)]
    assert len(set(buckets)) == len(set(map(str, buckets))) == 3
    assert str(buckets[1]) == "9 x 64 x 96, 7 caption tokens"


SIDES = st.integers(16, 2000)
MULTIPLES = st.sampled_from([(8, 8), (16, 16), (32, 32), (16, 32)])


@given(source=st.tuples(SIDES, SIDES), rows=st.integers(4, 50), columns=st.integers(4, 50), multiple=MULTIPLES)
@settings(deadline=None, max_examples=150)
def test_an_aspect_bucket_is_legal_and_of_about_the_area(
    source: tuple[int, int], rows: int, columns: int, multiple: tuple[int, int]
):
    wanted = rows * multiple[0], columns * multiple[1]
    height, width = nearest_aspect(source, wanted, multiple)
    assert height > 0
    assert width > 0
    assert (height % multiple[0], width % multiple[1]) == (0, 0)
    assert 0.8 * wanted[0] * wanted[1] - 1e-6 <= height * width <= wanted[0] * wanted[1]


@given(source=st.tuples(SIDES, SIDES), rows=st.integers(4, 50), columns=st.integers(4, 50), multiple=MULTIPLES)
@settings(deadline=None, max_examples=150)
def test_no_other_legal_bucket_is_nearer_to_the_aspect(
    source: tuple[int, int], rows: int, columns: int, multiple: tuple[int, int]
):
    wanted = rows * multiple[0], columns * multiple[1]
    area = wanted[0] * wanted[1]

    def off(size: tuple[int, int]) -> float:
        ratio = size[0] / size[1] / (source[0] / source[1])
        return max(ratio, 1 / ratio)

    legal = [
        (height, width)
        for height in range(multiple[0], area // multiple[1] + 1, multiple[0])
        for width in range(multiple[1], area // height + 1, multiple[1])
        if height * width >= 0.8 * area
    ]
    assert off(nearest_aspect(source, wanted, multiple)) <= min(map(off, legal)) + 1e-6


def test_a_clip_of_the_wanted_aspect_keeps_the_wanted_size():
    assert nearest_aspect((1080, 1920), (720, 1280), (16, 16)) == (720, 1280)


def test_turned_clips_get_a_turned_size():
    height, width = nearest_aspect((1920, 1080), (480, 832), (16, 16))
    assert height > width
