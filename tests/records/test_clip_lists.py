"""What happened to a dataset, clip by clip."""

from pathlib import Path

import pytest

from crepatrain.records.clip_lists import ListedClip, differences, read_clip_list


def clip(file: str, content: str = "", caption: str = "c", cut: str = "w") -> ListedClip:
    return ListedClip(file=file, content=content or f"content of {file}", caption=caption, cut=cut)


BEFORE = [clip("a.mp4"), clip("b.mp4"), clip("z/c.mp4")]


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ([*BEFORE, clip("d.mp4")], ["1 clip added (d.mp4)"]),
        ([*BEFORE, clip("d.mp4", "content of a.mp4")], ["1 clip added (d.mp4)"]),  # a copy
        (BEFORE[:1], ["2 clips removed (b.mp4, z/c.mp4)"]),
        ([clip("x.mp4", "content of a.mp4"), *BEFORE[1:]], ["1 clip renamed (a.mp4 to x.mp4)"]),
        ([clip("a.mp4", "other"), *BEFORE[1:]], ["1 clip with another content (a.mp4)"]),
        ([clip("a.mp4", caption="other"), *BEFORE[1:]], ["1 clip with another caption (a.mp4)"]),
        ([clip("a.mp4", cut="other"), *BEFORE[1:]], ["1 clip cut into other windows (a.mp4)"]),
        (BEFORE[::-1], ["the clips stand in another order"]),
        (
            [clip("x.mp4", "content of a.mp4", caption="new"), BEFORE[1], clip("n.mp4")],
            [
                "1 clip added (n.mp4)",
                "1 clip removed (z/c.mp4)",
                "1 clip renamed (a.mp4 to x.mp4)",
                "1 clip with another caption (x.mp4)",
            ],
        ),
    ],
)
def test_what_happened_is_named(now: list[ListedClip], words: list[str]):
    assert [difference.words for difference in differences(BEFORE, now)] == words


def test_two_clips_of_one_content_are_renamed_one_to_one():
    before = [clip("a.mp4", "same"), clip("b.mp4", "same")]
    found = differences(before, [clip("c.mp4", "same"), clip("d.mp4", "same"), clip("e.mp4", "same")])
    assert [difference.words for difference in found] == [
        "1 clip added (e.mp4)",
        "2 clips renamed (a.mp4 to c.mp4, b.mp4 to d.mp4)",
    ]


def test_many_are_counted():
    (difference,) = differences(BEFORE, [*BEFORE, *(clip(f"{number}.mp4") for number in range(300))])
    assert difference.words == "300 clips added (0.mp4, 1.mp4, 2.mp4, 3.mp4, 4.mp4 and 295 more)"


@pytest.mark.parametrize("text", [None, "", "{}", '[{"file": 1}]', "[" * 100_000])
def test_a_list_that_can_not_be_read_is_none(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "list.json").write_text(text)
    assert read_clip_list(tmp_path / "list.json") is None
