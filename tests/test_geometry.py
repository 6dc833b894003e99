import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crepatrain.errors import UserError
from crepatrain.geometry import Geometry

WAN = Geometry(temporal_stride=4, spatial_stride=8, patch=(1, 2, 2), latent_channels=16, depth=30, width=1536)
LTX = Geometry(temporal_stride=8, spatial_stride=32, patch=(1, 1, 1), latent_channels=128, depth=28, width=2048)
COG15 = Geometry(temporal_stride=4, spatial_stride=8, patch=(2, 2, 2), latent_channels=16, depth=42, width=3072)
PLAIN = Geometry(temporal_stride=4, spatial_stride=8, patch=(1, 2, 2), latent_channels=4, depth=2, width=8, causal=False)


@st.composite
def geometries(draw):
    return Geometry(
        temporal_stride=draw(st.sampled_from([1, 2, 4, 6, 8])),
        spatial_stride=draw(st.sampled_from([8, 16, 32])),
        patch=(draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        latent_channels=16,
        depth=2,
        width=8,
        causal=draw(st.booleans()),
    )


@st.composite
def legal_clips(draw):
    """A geometry with (frames, height, width), built up from tokens."""
    geometry = draw(geometries())
    t, h, w = (draw(st.integers(1, 12)) for _ in range(3))
    latent_frames = t * geometry.patch[0]
    frames = 1 + (latent_frames - 1) * geometry.temporal_stride if geometry.causal else latent_frames * geometry.temporal_stride
    height, width = h * geometry.size_multiple[0], w * geometry.size_multiple[1]
    return geometry, (frames, height, width), (t, h, w)


@pytest.mark.parametrize(("geometry", "stride"), [(WAN, 4), (LTX, 8)])
@given(k=st.integers(0, 60))
def test_causal_models_take_stride_k_plus_1(geometry, stride, k):
    assert geometry.frames_rule == f"{stride}k+1"
    assert geometry.legal_frames(stride * k + 1)
    assert not any(geometry.legal_frames(stride * k + 1 + more) for more in range(1, stride))
    height, width = geometry.size_multiple
    assert (
        geometry.latent_shape(stride * k + 1, height, width)[0] == geometry.token_grid(stride * k + 1, height, width).t == k + 1
    )


def test_wan_at_480p():
    assert WAN.latent_shape(81, 480, 832) == (21, 60, 104)
    grid = WAN.token_grid(81, 480, 832)
    assert (grid.t, grid.h, grid.w, grid.patches, grid.tokens) == (21, 30, 52, 1560, 32760)
    assert grid.pixel_spans[:3] == ((0, 1), (1, 5), (5, 9))
    assert grid.teacher_frames == tuple(range(0, 81, 4))
    assert str(grid) == "21 x 30 x 52"


def test_ltx_at_480p():
    grid = LTX.token_grid(121, 480, 704)
    assert (grid.t, grid.h, grid.w) == (16, 15, 22)
    assert grid.teacher_frames == tuple(range(0, 121, 8))


def test_a_token_of_two_latent_frames_spans_both():
    assert [frames for frames in range(1, 40) if COG15.legal_frames(frames)] == [5, 13, 21, 29, 37]
    grid = COG15.token_grid(13, 16, 16)
    assert grid.t == 2
    assert grid.pixel_spans == ((0, 5), (5, 13))
    assert grid.teacher_frames == (4, 12)


def test_a_plain_vae_has_no_frame_of_its_own():
    assert PLAIN.frames_rule == "4k"
    grid = PLAIN.token_grid(12, 16, 32)
    assert grid.pixel_spans == ((0, 4), (4, 8), (8, 12))
    assert grid.teacher_frames == (3, 7, 11)


@given(legal_clips())
def test_grid_and_latents_follow_from_strides(clip):
    geometry, (frames, height, width), (t, h, w) = clip
    grid = geometry.token_grid(frames, height, width)
    assert (grid.t, grid.h, grid.w) == (t, h, w)
    assert geometry.latent_shape(frames, height, width) == (t * geometry.patch[0], h * geometry.patch[1], w * geometry.patch[2])
    assert (grid.patches, grid.tokens) == (h * w, t * h * w)


@given(legal_clips())
def test_spans_partition_the_frames(clip):
    geometry, (frames, height, width), _ = clip
    grid = geometry.token_grid(frames, height, width)
    assert [frame for first, last in grid.pixel_spans for frame in range(first, last)] == list(range(frames))
    assert all(first < last for first, last in grid.pixel_spans)
    assert grid.teacher_frames == tuple(last - 1 for _, last in grid.pixel_spans)
    assert grid.teacher_frames[-1] == frames - 1


@given(geometries(), st.integers(-3, 200))
def test_illegal_frames_name_the_two_nearest(geometry, frames):
    height, width = geometry.size_multiple
    if geometry.legal_frames(frames):
        return
    with pytest.raises(UserError) as error:
        geometry.latent_shape(frames, height, width)
    named = [int(number) for number in re.findall(r"\d+", error.value.problems[0].fix)]
    assert f"num_frames={frames}:" in str(error.value)
    assert all(geometry.legal_frames(number) for number in named)
    assert named[-1] > frames
    if any(geometry.legal_frames(number) for number in range(1, frames)):
        assert named[0] < frames
    assert not any(geometry.legal_frames(number) for number in range(named[0] + 1, named[-1]))


@pytest.mark.parametrize(
    ("geometry", "size", "what", "fix"),
    [
        (WAN, (50, 480, 832), "num_frames=50: this model takes 4k+1 frames", "use 49 or 53"),
        (WAN, (0, 480, 832), "num_frames=0: this model takes 4k+1 frames", "use 1"),
        (LTX, (50, 480, 704), "num_frames=50: this model takes 8k+1 frames", "use 49 or 57"),
        (COG15, (49, 480, 720), "num_frames=49: this model takes 4k+1 with k+1 a multiple of 2 frames", "use 45 or 53"),
        (PLAIN, (13, 64, 64), "num_frames=13: this model takes 4k frames", "use 12 or 16"),
        (WAN, (81, 470, 832), "height=470: this model takes multiples of 16", "use 464 or 480"),
        (WAN, (81, 480, 830), "width=830: this model takes multiples of 16", "use 816 or 832"),
        (WAN, (81, 8, 832), "height=8: this model takes multiples of 16", "use 16"),
        (LTX, (49, 480, 700), "width=700: this model takes multiples of 32", "use 672 or 704"),
    ],
)
def test_errors_say_what_and_what_instead(geometry, size, what, fix):
    for ask in (geometry.latent_shape, geometry.token_grid):
        with pytest.raises(UserError) as error:
            ask(*size)
        assert (error.value.problems[0].what, error.value.problems[0].fix) == (what, fix)
