"""What is found out of clips by decoding them, and which of them can't be used."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from common import RULE, render_clip, render_image
from hard_clips import damage, write_audio

from crepatrain.data import index
from crepatrain.data.clip import Clip
from crepatrain.data.decode import probe
from crepatrain.data.digests import FileDigests
from crepatrain.data.index import ClipIndex
from crepatrain.data.listing import Refusal, choose_captions, list_clips, refusal_error


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
    listed = list_clips(folder)
    captioned = [(clip.path, clip.caption, RULE) for clip in choose_captions(listed, "empty").clips]
    clips, refused = ClipIndex(root / "index", FileDigests(root / "digests.json")).read(captioned)
    return clips, [*listed.refused, *refused]


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
    assert "no such file" in refused[0].reason


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
    captioned = [(clip.path, "", RULE) for clip in list_clips(folder).clips]
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
    captioned = [(path, "", RULE) for path in sorted(folder.glob("*.mp4"))]
    clips, refused = ClipIndex(tmp_path / "index", FileDigests(tmp_path / "digests.json"), patience=1).read(captioned)
    answers.set()
    assert [clip.path.name for clip in clips] == ["a.mp4", "c.mp4"]
    assert [refusal.path for refusal in refused] == [stuck]
    assert "nothing came for 1 seconds" in refused[0].reason
