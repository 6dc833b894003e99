"""Which clips are held out."""

from pathlib import Path

import pytest

from crepatrain.data.buckets import ClipWindows
from crepatrain.data.clip import Clip, ClipInfo, Rule
from crepatrain.data.cutting import Cutting, cut_clips
from crepatrain.errors import UserError
from crepatrain.preparing.held_out import hold_out, shares_in_words


def windows_of(*digests: str, frames: int = 10) -> ClipWindows:
    """Clips of these contents, cut into two windows each."""
    info = ClipInfo(64, 96, tuple(i / 16 for i in range(frames)))
    rule = Rule((5, 64, 96), 16.0)
    clips = [Clip(Path(f"{number}.mp4"), "", digest, info, rule) for number, digest in enumerate(digests)]
    return cut_clips(clips, 16.0, Cutting((16, 16), lambda frames: frames % 4 == 1))


def contents(clips: ClipWindows) -> set[str]:
    return {window.clip.digest for window in clips.windows}


@pytest.mark.parametrize(
    ("share", "clips", "held"),
    [
        (0.3, 10, 3),
        (0.3, 3, 1),
        (0.01, 10, 1),
        (0.5, 2, 1),
        (0.5, 10, 5),
        (0.05, 100, 5),
        (0.1, 14, 1),
        (0.1, 16, 2),
        (0.45, 2, 1),
    ],
)
def test_exactly_the_share_is_held_out(share: float, clips: int, held: int):
    names = [f"{number * 7919 % 1000:04d}" for number in range(1, clips + 1)]
    trained, measured = hold_out(windows_of(*names), share)
    assert contents(measured) == set(sorted(names)[:held])
    assert contents(trained) == set(sorted(names)[held:])
    assert len(measured.windows) == 2 * held


def test_a_clip_that_joins_moves_only_those_at_the_border():
    _, before = hold_out(windows_of("a", "c", "e", "g", "i", "k"), 0.3)
    assert contents(before) == {"a", "c"}
    assert contents(hold_out(windows_of("z", "a", "c", "e", "g", "i", "k"), 0.3)[1]) == {"a", "c"}
    assert contents(hold_out(windows_of("b", "a", "c", "e", "g", "i", "k"), 0.3)[1]) == {"a", "b"}
    assert contents(hold_out(windows_of(*"acegikxyz"), 0.3)[1]) == {"a", "c", "e"}


def test_the_order_of_the_files_does_not_matter():
    assert contents(hold_out(windows_of(*"dbca"), 0.5)[1]) == contents(hold_out(windows_of(*"abcd"), 0.5)[1]) == {"a", "b"}


def test_a_share_is_of_contents_and_copies_stay_together():
    whole = windows_of("a", "b", "a", "c", "d", "a")
    trained, held = hold_out(whole, 0.25)
    assert contents(held) == {"a"}
    assert contents(trained) == {"b", "c", "d"}
    assert shares_in_words(held, whole) == "3 of 6 clips (50%) and 6 of 12 windows (50%)"


def test_one_content_can_not_be_on_both_sides():
    with pytest.raises(UserError, match=r"eval_share=0.5: there is one clip"):
        hold_out(windows_of("a", "a"), 0.5)
