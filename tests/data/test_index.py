"""What a folder of clips holds, and what of it can't be used."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from common import render_clip, render_image
from hard_clips import damage, write_audio

from crepatrain.data import index
from crepatrain.data.clip import Clip
from crepatrain.data.decode import probe
from crepatrain.data.digests import FileDigests
from crepatrain.data.index import ClipIndex
from crepatrain.data.listing import Refusal, choose_captions, list_clips, refusal_error
from crepatrain.errors import UserError


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 40 frames."""
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    render_clip(path, frames=40, width=160)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "clips"
    path.mkdir()
    return path


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were decoded, as they are."""
    seen: list[Path] = []

    def spy(path: Path, beat: Callable[[], None]):
        seen.append(path)
        return probe(path, beat)

    monkeypatch.setattr(index, "probe", spy)
    return seen


def read(folder: Path, root: Path) -> tuple[list[Clip], list[Refusal]]:
    captioned, _ = choose_captions(list_clips(folder), "empty")
    return ClipIndex(root / "index", FileDigests(root / "digests.json")).read(captioned)


def add(folder: Path, video: Path, name: str, caption: str | None = None) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(video, path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def decoder_complains(path: Path) -> bool:
    """Whether FFmpeg itself marks a frame as damaged."""
    with av.open(str(path)) as container:
        try:
            return any(frame.is_corrupt for frame in container.decode(video=0))
        except av.FFmpegError:
            return True


def test_images_are_listed_beside_clips(folder: Path, video: Path, tmp_path: Path):
    clip = add(folder, video, "b.mp4", "a dog runs")
    for name in ("a.jpg", "c.PNG", "sub/d.webp", "e.jpeg", "f.bmp"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        render_image(path)
        path.with_suffix(".txt").write_text(f"picture {path.stem}", encoding="utf-8")
    (folder / "notes.psd").write_bytes(b"no image of ours")
    found = dict(list_clips(folder))
    expected = {clip: "a dog runs"} | {folder / name: f"picture {Path(name).stem}" for name in ("a.jpg", "c.PNG", "sub/d.webp")}
    assert found == expected | {folder / "e.jpeg": "picture e", folder / "f.bmp": "picture f"}
    clips, refused = read(folder, tmp_path)
    assert not refused
    assert {clip.path.name: clip.info.frames for clip in clips} == {path.name: 40 if path == clip else 1 for path in found}


def test_a_list_may_name_images(folder: Path, tmp_path: Path):
    render_image(folder / "a.png", height=64, width=96)
    rows = [{"image": "a.png", "text": "one"}, {"file_name": "a.png", "caption": "two"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert list_clips(folder) == [(folder / "a.png", "one"), (folder / "a.png", "two")]
    clips, _ = read(folder, tmp_path)
    assert [(clip.caption, clip.info.height, clip.info.width) for clip in clips] == [("one", 64, 96), ("two", 64, 96)]


def test_a_known_image_is_not_decoded_again(folder: Path, tmp_path: Path, probed: list[Path]):
    render_image(folder / "a.png")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:200])
    first, second = read(folder, tmp_path), read(folder, tmp_path)
    assert len(probed) == 2
    assert [clip.info for clip in first[0]] == [clip.info for clip in second[0]]
    assert first[1] == second[1]


def test_a_broken_image_is_refused_by_name_in_one_message(folder: Path, tmp_path: Path):
    render_image(folder / "good.png")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:300])
    (folder / "empty.jpg").touch()
    clips, refused = read(folder, tmp_path)
    assert [clip.path.name for clip in clips] == ["good.png"]
    assert {refusal.path.name: refusal.reason for refusal in refused} == {
        "cut.png": "it is no image, or is cut off",
        "empty.jpg": "the file is empty",
    }
    problems = refusal_error(refused).problems
    assert [problem.what.partition(": ")[0] for problem in problems] == [str(folder / "cut.png"), str(folder / "empty.jpg")]


def test_sidecars_are_captions(folder: Path, video: Path):
    first = add(folder, video, "b.mp4", "  a dog\n runs \n")
    second = add(folder, video, "a.MP4", "\ufeffä cat")
    assert list_clips(folder) == [(second, "ä cat"), (first, "a dog runs")]


def test_nested_folders_are_searched_and_hidden_ones_are_not(folder: Path, video: Path):
    deep = add(folder, video, "one/two/deep.mkv", "deep")
    add(folder, video, ".trash/old.mp4", "old")
    add(folder, video, "._resource.mp4", "of a Mac")
    assert list_clips(folder) == [(deep, "deep")]


def test_a_jsonl_list_is_read(folder: Path, video: Path):
    inside, outside = add(folder, video, "sub/a.mp4"), add(folder.parent, video, "elsewhere.mp4")
    rows = [
        {"file_name": "sub/a.mp4", "text": " one\ntwo "},
        {"video": str(outside), "caption": "absolute"},
        {"path": "sub/a.mp4"},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    expected = [(inside, "one two"), (outside, "absolute"), (inside, None)]
    assert list_clips(folder) == expected
    assert list_clips(folder / "metadata.jsonl") == expected


def test_a_caption_may_hold_any_character(folder: Path):
    rows = [{"video": "a.mp4", "caption": "one\u2028two\u0085three"}]
    (folder / "metadata.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False), encoding="utf-8")
    assert list_clips(folder) == [(folder / "a.mp4", "one two three")]


def test_a_csv_list_is_read(folder: Path):
    (folder / "metadata.csv").write_text('video,caption\na.mp4,"one, two"\nb.mp4,"first\nsecond"\nc.mp4,\n', encoding="utf-8")
    expected = [(folder / "a.mp4", "one, two"), (folder / "b.mp4", "first second"), (folder / "c.mp4", None)]
    assert list_clips(folder) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.jsonl", '{"video": "a.mp4"}\n{oops', ["metadata.jsonl, line 2", "not valid JSON"]),
        ("metadata.jsonl", '["a.mp4"]', ["line 1", "not an object"]),
        ("metadata.jsonl", '{"caption": "alone"}', ["entry 1", "no video", "file_name"]),
        ("metadata.jsonl", "\n", ["the list is empty"]),
        ("metadata.csv", "caption\nalone\n", ["entry 1", "no video"]),
        ("metadata.csv", "video,caption\n", ["the list is empty"]),
    ],
)
def test_a_list_that_is_wrong_is_reported(folder: Path, name: str, content: str, words: list[str]):
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        list_clips(folder)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_list_that_is_not_utf8_is_reported(folder: Path, name: str):
    (folder / name).write_bytes('{"video": "a.mp4", "caption": "été"}'.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{name}.*not UTF-8"):
        list_clips(folder)


def test_a_caption_that_is_not_utf8_is_reported(folder: Path, video: Path):
    add(folder, video, "a.mp4").with_suffix(".txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8"):
        list_clips(folder)


def test_no_videos_is_an_error(folder: Path):
    (folder / "notes.txt").write_text("nothing here", encoding="utf-8")
    with pytest.raises(UserError, match=r"no video files") as error:
        list_clips(folder)
    assert str(folder) in str(error.value)
    assert ".mp4" in str(error.value)


FOUND = [(Path("with.mp4"), "said"), (Path("a_red-fox.mp4"), None)]


def test_a_missing_caption_is_an_error_that_names_the_remedy():
    with pytest.raises(UserError) as error:
        choose_captions(FOUND, "error")
    for word in ("a_red-fox.mp4", "a_red-fox.txt", "missing_captions", "empty", "filename", "skip"):
        assert word in str(error.value)
    assert "with.mp4" not in str(error.value)


def test_many_missing_captions_are_counted():
    with pytest.raises(UserError, match=r"and 4 more"):
        choose_captions([(Path(f"{i}.mp4"), None) for i in range(9)], "error")


@pytest.mark.parametrize(("mode", "caption"), [("empty", ""), ("filename", "a red fox")])
def test_a_missing_caption_can_be_filled(mode, caption: str):
    assert choose_captions(FOUND, mode) == ([(Path("with.mp4"), "said"), (Path("a_red-fox.mp4"), caption)], [])


def test_a_clip_without_a_caption_can_be_skipped():
    chosen, refused = choose_captions(FOUND, "skip")
    assert chosen == [(Path("with.mp4"), "said")]
    assert refused == [Refusal(Path("a_red-fox.mp4"), "no caption")]


def test_an_empty_sidecar_is_no_caption(folder: Path, video: Path):
    add(folder, video, "a.mp4", " \n ")
    assert list_clips(folder)[0][1] is None


def test_broken_files_are_refused_by_name_and_the_rest_goes_on(folder: Path, video: Path, tmp_path: Path):
    good = add(folder, video, "good.mp4", "fine")
    (folder / "cut.mp4").write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video", encoding="utf-8")
    damage(video, folder / "damaged.mp4", size=4096, seed=0)
    write_audio(folder / "sound.mp4")
    clips, refused = read(folder, tmp_path)
    assert [clip.path for clip in clips] == [good]
    reasons = {refusal.path.name: refusal.reason for refusal in refused}
    assert set(reasons) == {"cut.mp4", "empty.mp4", "text.mp4", "damaged.mp4", "sound.mp4"}
    assert "cut off" in reasons["cut.mp4"]
    assert "empty" in reasons["empty.mp4"]
    assert "no video" in reasons["text.mp4"]
    assert "damaged" in reasons["damaged.mp4"]
    assert "no video stream" in reasons["sound.mp4"]
    error = str(refusal_error(refused))
    assert all(name in error and reason in error for name, reason in reasons.items())
    assert "unusable_clips" in error


@pytest.mark.parametrize("size", [16, 256, 1024])
def test_damage_in_mid_stream_is_found(folder: Path, video: Path, tmp_path: Path, size: int):
    """Whatever the decoder itself notices; it may conceal damage rather than stop at it."""
    for seed in range(12):
        path = damage(video, folder / f"damaged-{seed}.mp4", size=size, seed=seed)
        if not decoder_complains(path):
            path.unlink()
    damaged = sorted(folder.iterdir())
    assert damaged
    clips, refused = read(folder, tmp_path)
    assert not [clip.path.name for clip in clips]
    assert [refusal.path for refusal in refused] == damaged


@pytest.mark.parametrize("width", [32, 48, 96, 144, 160, 402])
def test_a_clip_of_any_width_is_read(folder: Path, tmp_path: Path, width: int):
    render_clip(folder / "clip.mp4", frames=3, width=width, height=64)
    clips, refused = read(folder, tmp_path)
    assert not refused
    assert clips[0].info.width == width


def test_a_file_in_the_list_that_does_not_exist_is_refused(folder: Path, video: Path, tmp_path: Path):
    add(folder, video, "here.mp4")
    lines = [json.dumps({"video": name, "caption": "x"}) for name in ("here.mp4", "gone.mp4")]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    clips, refused = read(folder, tmp_path)
    assert [clip.path.name for clip in clips] == ["here.mp4"]
    assert [refusal.path.name for refusal in refused] == ["gone.mp4"]
    assert "No such file" in refused[0].reason


def test_a_known_file_is_not_decoded_again(folder: Path, video: Path, tmp_path: Path, probed: list[Path]):
    add(folder, video, "a.mp4")
    (folder / "empty.mp4").touch()
    first = read(folder, tmp_path)
    assert len(probed) == 2
    second = read(folder, tmp_path)
    assert len(probed) == 2
    assert [clip.info for clip in first[0]] == [clip.info for clip in second[0]]
    assert first[1] == second[1]


def test_a_renamed_file_is_still_known(folder: Path, video: Path, tmp_path: Path, probed: list[Path]):
    path = add(folder, video, "a.mp4")
    read(folder, tmp_path)
    path.rename(folder / "b.mp4")
    clips, _ = read(folder, tmp_path)
    assert [clip.path.name for clip in clips] == ["b.mp4"]
    assert len(probed) == 1


def test_a_changed_file_is_looked_at_again(folder: Path, video: Path, tmp_path: Path, probed: list[Path]):
    path = add(folder, video, "a.mp4")
    before, _ = read(folder, tmp_path)
    render_clip(path, frames=12, width=160, seed=5)
    after, _ = read(folder, tmp_path)
    assert len(probed) == 2
    assert before[0].digest != after[0].digest
    assert (before[0].info.frames, after[0].info.frames) == (40, 12)


def test_a_change_that_keeps_the_size_is_seen(folder: Path, video: Path, tmp_path: Path):
    path = add(folder, video, "a.mp4")
    os.utime(path, ns=(10**18, 10**18))
    read(folder, tmp_path)
    damage(video, path, size=4096, seed=0)
    assert path.stat().st_size == video.stat().st_size
    clips, refused = read(folder, tmp_path)
    assert not clips
    assert [refusal.path for refusal in refused] == [path]


def test_copies_of_one_file_are_all_clips(folder: Path, video: Path, tmp_path: Path):
    """They are probed at once, by threads that write the same entry."""
    for number in range(4):
        add(folder, video, f"{number}.mp4")
    for attempt in range(40):
        clips, refused = read(folder, tmp_path / str(attempt))
        assert not refused
        assert len(clips) == 4


def test_each_clip_advances_once(folder: Path, video: Path, tmp_path: Path):
    add(folder, video, "a.mp4")
    (folder / "empty.mp4").touch()
    ticks: list[int] = []
    captioned, _ = choose_captions(list_clips(folder), "empty")
    ClipIndex(tmp_path / "index", FileDigests(tmp_path / "digests.json")).read(captioned, advance=lambda: ticks.append(1))
    assert len(ticks) == 2


def test_hard_clips_are_read_or_refused_with_a_reason(hard_clips: Path, tmp_path: Path):
    clips, refused = read(hard_clips, tmp_path)
    assert {clip.path.name for clip in clips} == {
        "animation.gif",
        "av1.mp4",
        "hevc-10bit.mp4",
        "rotated-0.mov",
        "rotated-90.mov",
        "rotated-180.mov",
        "rotated-270.mov",
        "unordered-timestamps.mov",
        "variable-frame-rate.mp4",
        "vp9.webm",
    }
    reasons = {refusal.path.name: refusal.reason for refusal in refused}
    assert set(reasons) == {"audio-only.mp4", "corrupted.mp4", "empty.mp4", "truncated.mp4"}
    assert "no video stream" in reasons["audio-only.mp4"]
    assert "damaged" in reasons["corrupted.mp4"]
    assert "empty" in reasons["empty.mp4"]
    assert "cut off" in reasons["truncated.mp4"]
    for clip in clips:
        assert list(clip.info.timestamps) == sorted(clip.info.timestamps)
        assert clip.info.frames > 1


def test_a_read_that_failed_once_is_asked_again(folder: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk's error says nothing about the file."""
    add(folder, video, "a.mp4", "a")
    real = av.open

    def failing(path: str) -> None:
        raise av.error.OSError(5, "Input/output error", path)

    monkeypatch.setattr(av, "open", failing)
    clips, refused = read(folder, tmp_path / "cache")
    assert (clips, [refusal.reason for refusal in refused]) == ([], ["Input/output error"])
    assert "run the command again" in refused[0].remedy
    monkeypatch.setattr(av, "open", real)
    clips, refused = read(folder, tmp_path / "cache")
    assert (len(clips), refused) == (1, [])


def test_a_refusal_is_remembered_until_another_pyav_may_know_better(
    folder: Path, tmp_path: Path, probed: list[Path], monkeypatch: pytest.MonkeyPatch
):
    (folder / "a.mp4").write_bytes(b"no video")
    (folder / "a.txt").write_text("a", encoding="utf-8")
    for _ in range(2):
        assert [refusal.reason for refusal in read(folder, tmp_path / "cache")[1]] == ["it is no video, or is cut off"]
    assert len(probed) == 1
    monkeypatch.setattr(av, "__version__", "1000.0.0")
    read(folder, tmp_path / "cache")
    assert len(probed) == 2


def test_a_read_that_hangs_is_given_up_and_named(folder: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add(folder, video, "a.mp4", "a")
    stuck = add(folder, video, "b.mp4", "b")
    add(folder, video, "c.mp4", "c")
    stuck.write_bytes(stuck.read_bytes() + b"\0" * 64)  # a content of its own
    answers = threading.Event()

    def hanging(path: Path, beat: Callable[[], None]):
        if path == stuck:
            answers.wait()
        return probe(path, beat)

    monkeypatch.setattr(index, "probe", hanging)
    captioned, _ = choose_captions(list_clips(folder), "empty")
    clips, refused = ClipIndex(tmp_path / "index", FileDigests(tmp_path / "digests.json"), patience=1).read(captioned)
    answers.set()
    assert [clip.path.name for clip in clips] == ["a.mp4", "c.mp4"]
    assert [refusal.path for refusal in refused] == [stuck]
    assert "nothing came for 1 seconds" in refused[0].reason
