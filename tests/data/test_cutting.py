"""Cutting clips into windows and windows into buckets."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import RULE
from hypothesis import given, settings
from hypothesis import strategies as st

from crepatrain.data.buckets import Bucket, ClipWindows
from crepatrain.data.clip import Clip, ClipInfo, ClipMode, Rule
from crepatrain.data.cutting import Cutting, cut_clips, nearest_aspect
from crepatrain.data.frames import CENTRE, Crop, crop_resize


def clip(frames: int, *, fps: float = 16, height: int = 64, width: int = 96, name: str = "clip.mp4", rule: Rule = RULE) -> Clip:
    info = ClipInfo(height, width, tuple(round(i / fps, 4) for i in range(frames)))
    return Clip(Path(name), "a caption", f"digest of {name}", info, rule)


def image(name: str = "image.png", *, height: int = 64, width: int = 96) -> Clip:
    return Clip(Path(name), "a caption", f"digest of {name}", ClipInfo(height, width, (0.0,), still=True), RULE)


def cut(
    *clips: Clip,
    frames: int = 9,
    fps: float = 16,
    limit: int = 0,
    legal: Callable[[int], bool] = lambda frames: frames % 4 == 1,
    mode: ClipMode = "chunks",
    **changes: Any,
) -> ClipWindows:
    """Clips with the usual rule take the others from here; one with a rule of its own keeps it."""
    usual = replace(RULE, size=(frames, 64, 96), fps=fps, mode=mode)
    ruled = [replace(each, rule=usual) if each.rule is RULE else each for each in clips]
    return cut_clips(ruled, fps, Cutting((16, 16), legal, most=limit, **changes))


def test_windows_are_consecutive_and_the_end_is_dropped():
    result = cut(clip(30))
    assert [window.frames for window in result.windows] == [tuple(range(start, start + 9)) for start in (0, 9, 18)]
    assert (result.ends, result.passed_over) == (3, 0)
    assert {window.bucket for window in result.windows} == {Bucket(9, 64, 96)}
    assert not result.refused


def test_windows_are_of_resampled_frames():
    result = cut(clip(59, fps=32))
    assert [window.frames for window in result.windows] == [tuple(range(s, s + 18, 2)) for s in (0, 18, 36)]
    assert (result.ends, result.passed_over) == (30 - 27, 0)


def test_a_clip_of_just_the_length_is_one_window():
    result = cut(clip(9))
    assert [window.frames for window in result.windows] == [tuple(range(9))]
    assert (result.ends, result.passed_over) == (0, 0)


@pytest.mark.parametrize(
    ("limit", "first_frames"), [(0, [0, 9, 18, 27, 36]), (5, [0, 9, 18, 27, 36]), (9, [0, 9, 18, 27, 36]), (3, [0, 18, 36])]
)
def test_a_limit_spreads_the_windows_over_the_clip(limit: int, first_frames: list[int]):
    result = cut(clip(48), limit=limit)
    assert [window.frames[0] for window in result.windows] == first_frames
    assert (result.ends, result.passed_over) == (3, 9 * (5 - len(first_frames)))


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
    assert result.ends == 3
    assert result.ends + result.passed_over + 5 * len(starts) == count * 5 + 3


def test_a_clip_that_is_too_short_is_refused_with_its_numbers():
    result = cut(clip(8, name="short.mp4"), clip(9, name="good.mp4"))
    assert [refusal.path.name for refusal in result.refused] == ["short.mp4"]
    assert result.refused[0].reason == "8 frames at 16 fps, and num_frames=9 are needed"
    assert [window.path.name for window in result.windows] == ["good.mp4"]


def test_a_fast_clip_is_too_short_by_its_resampled_frames():
    reason = cut(clip(15, fps=32)).refused[0].reason
    assert reason.startswith("8 frames at 16 fps")


# What is decided about a clip


@pytest.mark.parametrize(("own", "factor"), [(8, 2), (12, 4 / 3), (16, 1), (30, 1), (48, 1), (240, 1)])
def test_a_slower_clip_runs_faster_by_the_factor_of_the_rates(own: float, factor: float):
    (cut_of,) = cut(clip(own * 4, fps=own)).cuts
    assert cut_of.faster == pytest.approx(factor, rel=0.02)


def test_a_clip_of_another_mean_rate_runs_faster_where_its_frames_are_sparse():
    """Two seconds of 4 frames each and two of 60: more than 16 in the mean, yet too few to be resampled to 16."""
    times = (*(i / 4 for i in range(8)), *(2 + i / 60 for i in range(120)))
    varying = Clip(Path("varying.mp4"), "", "digest", ClipInfo(64, 96, times), RULE)
    assert varying.info.fps > 16
    (cut_of,) = cut(varying).cuts
    assert cut_of.faster == pytest.approx(64 / 40, rel=0.02)


def test_images_and_windows_of_one_frame_have_no_speed():
    assert [found.faster for found in cut(image(), clip(20, fps=2), frames=1).cuts] == [1, 1]


@pytest.mark.parametrize(
    ("height", "width", "kept"),
    [(64, 96, 1), (640, 960, 1), (64, 48, 2 / 3 / (4 / 3)), (96, 64, 4 / 9), (64, 384, 1 / 4), (1080, 1920, 27 / 32)],
)
def test_the_crop_keeps_the_share_that_is_read(height: int, width: int, kept: float):
    (cut_of,) = cut(image(height=height, width=width)).cuts
    assert cut_of.kept == pytest.approx(kept)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for side, (name, positions) in {0: ("rows", rows), 1: ("columns", columns)}.items():
        share = positions * 255 / (height, width)[side]
        read = crop_resize(share.to(torch.uint8).expand(1, 3, -1, -1), (64, 96)).float()
        spread = (read.max() - read.min()).item() / 255
        expected = {"rows": min(1, width * 64 / 96 / height), "columns": min(1, height * 96 / 64 / width)}[name]
        assert spread == pytest.approx(expected, abs=0.06), name


@pytest.mark.parametrize(
    ("height", "width", "enlarged"), [(64, 96, 1), (640, 960, 0.1), (32, 48, 2), (32, 960, 2), (640, 48, 2), (50, 96, 1.28)]
)
def test_what_is_enlarged_is_the_part_that_the_crop_keeps(height: int, width: int, enlarged: float):
    assert [found.enlarged for found in cut(image(height=height, width=width)).cuts] == [pytest.approx(enlarged)]


def test_a_bucket_of_the_clips_own_aspect_crops_less():
    tall = image(height=384, width=96)
    (at_once,), (own,) = cut(tall).cuts, cut(tall, aspects=True).cuts
    assert at_once.kept == pytest.approx(1 / 6)
    assert own.kept == pytest.approx(0.8)


def test_frames_are_dropped_for_either_cause_and_by_clip():
    result = cut(clip(48, name="long.mp4"), clip(20, name="short.mp4"), image(), limit=2)
    assert {found.clip.path.name: (found.ends, found.passed_over) for found in result.cuts} == {
        "long.mp4": (3, 27),
        "short.mp4": (2, 0),
        "image.png": (0, 0),
    }
    part = result.part(window for window in result.windows if window.path.name == "short.mp4")
    assert [found.clip.path.name for found in part.cuts] == ["short.mp4"]
    assert (part.ends, part.passed_over, len(part.windows)) == (2, 0, 2)


# The largest window that all clips fill


@pytest.mark.parametrize(
    ("lengths", "fitting"),
    [
        ((20, 33), None),
        ((16, 33), 13),
        ((16, 13, 40), 13),
        ((16, 12, 40), 9),
        ((5, 40), 5),
        ((4, 40), None),  # a window of one frame is no clip
    ],
)
def test_the_largest_legal_window_that_keeps_all_clips_is_found(lengths: tuple[int, ...], fitting: int | None):
    result = cut(*(clip(length, name=f"{length}.mp4") for length in lengths), image(), frames=17)
    assert result.fitting_frames == fitting
    assert (result.clips, result.too_short) == (len(lengths), sum(length < 17 for length in lengths))


def test_it_is_a_window_of_resampled_frames():
    assert cut(clip(39, fps=32), clip(100), frames=33).fitting_frames == 17
    assert cut(clip(40, fps=8), clip(100), frames=33).fitting_frames is None


@pytest.mark.parametrize(
    ("legal", "fitting"),
    [(lambda n: n % 8 == 1, 17), (lambda n: n % 4 == 0, 20), (lambda n: n % 8 == 5, 21), (lambda n: n > 40, None)],
)
def test_it_is_a_window_that_the_model_takes(legal: Callable[[int], bool], fitting: int | None):
    assert cut(clip(23), clip(100), frames=49, legal=legal).fitting_frames == fitting


def test_the_remedy_names_it():
    (refusal,) = cut(clip(16), clip(40), frames=17).refused
    assert refusal.remedy == "set num_frames to 13 (all 2 clips fit then), give a longer clip"
    (refusal,) = cut(clip(16), frames=17).refused
    assert refusal.remedy == "set num_frames to 13 (the clip fits then), give a longer clip"


def test_a_remedy_that_can_not_keep_all_clips_is_of_the_clip_alone():
    short, shortest = cut(clip(16), clip(3), clip(40), frames=17).refused
    assert short.remedy == "set num_frames to 13 or less, give a longer clip"
    assert shortest.remedy == "give a longer clip"


def test_buckets_are_counted_the_largest_first():
    result = cut(clip(18, name="wide.mp4", height=64, width=96), clip(9, name="tall.mp4", height=400, width=100), aspects=True)
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
    assert len(result.buckets) == 2
    assert pictures[0].name == f"a{suffix} frames 0-0"


def test_images_are_cut_by_their_aspect_too():
    result = cut(image("wide.png"), image("tall.png", height=400, width=100), aspects=True)
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


@pytest.mark.parametrize(
    ("mode", "limit", "starts"),
    [
        ("first", 0, [0]),
        ("middle", 0, [15]),
        ("uniform", 3, [0, 15, 31]),
        ("uniform", 1, [15]),
        ("uniform", 0, [0, 10, 20, 31]),
        ("slide", 0, [0, 4, 8, 12, 16, 20, 24, 28]),
        ("slide", 2, [0, 28]),
    ],
)
def test_modes_choose_where_windows_lie(mode: ClipMode, limit: int, starts: list[int]):
    result = cut(clip(40), mode=mode, limit=limit)
    assert [window.frames for window in result.windows] == [tuple(range(start, start + 9)) for start in starts]
    covered = {frame for window in result.windows for frame in window.frames}
    assert (result.ends, result.passed_over, result.elsewhere) == (0, 0, 40 - len(covered))


@settings(deadline=None)
@given(length=st.integers(9, 200), limit=st.integers(0, 6), mode=st.sampled_from(["uniform", "slide", "random"]))
def test_windows_of_every_mode_lie_within_the_clip_and_are_distinct(length: int, limit: int, mode: ClipMode):
    starts = [window.frames[0] for window in cut(clip(length), mode=mode, limit=limit).windows]
    assert starts == sorted(set(starts))
    assert starts[0] >= 0
    assert starts[-1] <= length - 9
    assert not limit or len(starts) <= limit


def test_random_places_are_those_of_the_seed():
    def starts(seed: int, *names: str) -> list[list[int]]:
        result = cut(*(clip(100, name=name) for name in names), mode="random", limit=3, seed=seed)
        return [[window.frames[0] for window in result.windows if window.path.name == name] for name in names]

    first, other = starts(1, "a.mp4", "b.mp4")
    assert starts(1, "b.mp4") == [other], "no other clip changes a clip's places"
    assert first != other
    assert starts(2, "a.mp4") != [first]


def test_a_part_of_a_clip_is_all_there_is_of_it():
    part = replace(RULE, size=(9, 64, 96), start=1.0, end=2.5)
    result = cut(clip(80, rule=part))
    assert [window.frames for window in result.windows] == [tuple(range(16, 25)), tuple(range(25, 34))]
    assert result.ends == 24 - 18
    (refusal,) = cut(clip(80, rule=replace(part, end=1.5))).refused
    assert "8 frames from 1 s to 1.5 s" in refusal.reason
    (refusal,) = cut(clip(80, rule=replace(part, start=50.0, end=None))).refused
    assert "0 frames" in refusal.reason


def test_rates_of_their_own():
    kept = replace(RULE, size=(9, 64, 96), fps=None)
    slower = replace(RULE, size=(9, 64, 96), fps=8.0)
    clips = clip(20, fps=30, name="kept.mp4", rule=kept), clip(20, name="slower.mp4", rule=slower), clip(9, name="usual.mp4")
    for sees_fps, expected in ((True, [30.0, 30.0, 8.0, None]), (False, [None] * 4)):
        result = cut(*clips, sees_fps=sees_fps)
        assert [window.frames[:2] for window in result.windows] == [(0, 1), (9, 10), (0, 2), (0, 1)]
        assert [window.bucket.fps for window in result.windows] == expected
    assert [found.faster for found in result.cuts] == pytest.approx([1, 1, 1], abs=0.06)


@pytest.mark.parametrize(
    ("lengths", "frames"), [([5, 9, 17], [17, 17, 9, 5]), ("auto", [25, 21, 13, 5]), ([9], [9, 9, 9]), (None, [25])]
)
def test_each_clip_takes_the_longest_window_that_it_fills(lengths: Any, frames: list[int]):
    result = cut(*(clip(n, name=f"{n}.mp4") for n in (30, 23, 16, 5)), frames=25, lengths=lengths, limit=1)
    assert [window.bucket.frames for window in result.windows] == frames
    assert len(result.refused) == 4 - len(frames)
    assert result.fitting_frames == (None if lengths else 5)
    if lengths == [9]:
        assert "frame_buckets=[9] are needed" in result.refused[0].reason
        assert "add 5 to them" in result.refused[0].remedy


def test_a_size_of_a_list_is_the_one_nearest_in_shape():
    sizes = [(64, 96), (96, 64), (80, 80)]
    clips = [clip(9, height=h, width=w, name=f"{h}.mp4") for h, w in ((108, 192), (192, 108), (100, 110))]
    assert [(w.bucket.height, w.bucket.width) for w in cut(*clips, aspects=sizes).windows] == [(64, 96), (96, 64), (80, 80)]


def test_crops():
    tall = clip(18, height=192, width=96)
    (usual,) = {window.crop for window in cut(tall).windows}
    assert str(usual) == "centre"
    drawn = [window.crop for window in cut(tall, crop="random", seed=1).windows]
    assert drawn == [window.crop for window in cut(tall, crop="random", seed=1).windows]
    assert drawn[0] != drawn[1], "each window has its own"
    result = cut(tall, crop="none")
    assert {str(window.crop) for window in result.windows} == {"whole"}
    (found,) = result.cuts
    assert (found.kept, found.enlarged, found.squeezed) == (1, 1, 3)


@pytest.mark.parametrize(("crop", "rows"), [(Crop(0, 0), 0), (CENTRE, 64), (Crop(1, 1), 128), (Crop(0.25, 0), 32)])
def test_a_crop_is_the_part_where_it_lies(crop: Crop, rows: int):
    picture = torch.arange(192, dtype=torch.uint8).view(1, 1, 192, 1).expand(1, 3, 192, 96)
    assert torch.equal(crop_resize(picture, (64, 96), crop), picture[..., rows : rows + 64, :])


def test_a_whole_picture_is_squeezed():
    picture = torch.arange(192, dtype=torch.uint8).view(1, 1, 192, 1).expand(1, 3, 192, 96)
    whole = crop_resize(picture, (64, 96), Crop(whole=True))[0, 0, :, 0].float()
    assert torch.allclose(whole, torch.arange(64) * 3.0 + 1, atol=1.5)
