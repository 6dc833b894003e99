"""Which clips and captions a dataset names, and what is wrong with it."""

import json
import os
import re
import shutil
import signal
import socket
import unicodedata
from pathlib import Path

import av
import numpy as np
import pytest
from common import render_clip, render_image

from crepatrain.data.listing import (
    CaptionedClip,
    Listed,
    ListedClip,
    Refusal,
    choose_captions,
    list_clips,
    refusal_error,
)
from crepatrain.data.lists import WHOLE, Part
from crepatrain.data.pictures import IMAGE_SUFFIXES
from crepatrain.data.search import VIDEO_SUFFIXES


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    render_clip(path, frames=3)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "clips"
    path.mkdir()
    return path


@pytest.fixture
def in_time():
    """Ends what would wait for ever."""

    def end(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def add(folder: Path, video: Path, name: str, caption: str | None = None) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(video, path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def write_list(folder: Path, video: Path, name: str, content: str) -> Path:
    """A list, and the clips a to d beside it."""
    for letter in "abcd":
        add(folder, video, f"{letter}.mp4")
    path = folder / name
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    return path


def captions(folder: Path) -> dict[str, str | None]:
    """The captions of a dataset with which nothing is wrong, by the names of its clips."""
    listed = list_clips(folder)
    assert not listed.problems
    assert not listed.refused
    return {clip.name: clip.caption for clip in listed.clips}


def whats(listed: Listed) -> list[str]:
    return [problem.what for problem in listed.problems]


def of(*clips: tuple[str, str | None], by: Path | None = None) -> Listed:
    listed = [
        ListedClip(Path(name), caption, name, f"{Path(name).with_suffix('.txt')}", number if by else None)
        for number, (name, caption) in enumerate(clips, start=1)
    ]
    return Listed(tuple(listed), by=by)


# Folders


def test_images_are_listed_beside_clips(folder: Path, video: Path):
    add(folder, video, "b.mp4", "a dog runs")
    for name in ("a.jpg", "c.PNG", "sub/d.webp", "e.jpeg", "f.bmp"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        render_image(path)
        path.with_suffix(".txt").write_text(f"picture {path.stem}", encoding="utf-8")
    pictures = {name: f"picture {Path(name).stem}" for name in ("a.jpg", "c.PNG", "e.jpeg", "f.bmp", "sub/d.webp")}
    assert captions(folder) == {"b.mp4": "a dog runs"} | pictures


def test_sidecars_are_captions(folder: Path, video: Path):
    add(folder, video, "b.mp4", "  a dog\n runs \n")
    add(folder, video, "a.MP4", "\ufeffä cat")
    assert list(captions(folder).items()) == [("a.MP4", "ä cat"), ("b.mp4", "a dog runs")]


def test_an_empty_sidecar_is_no_caption(folder: Path, video: Path):
    add(folder, video, "a.mp4", " \n ")
    assert captions(folder) == {"a.mp4": None}


def test_clips_of_one_stem_share_a_caption(folder: Path, video: Path):
    add(folder, video, "a.mp4", "both")
    render_image(folder / "a.png")
    assert captions(folder) == {"a.mp4": "both", "a.png": "both"}


@pytest.mark.parametrize("suffix", [".TXT", ".Txt"])
def test_the_case_of_a_sidecars_suffix_does_not_matter_and_the_exact_one_comes_first(folder: Path, video: Path, suffix: str):
    add(folder, video, "b.mp4")
    (folder / f"b{suffix}").write_text("loud", encoding="utf-8")
    assert captions(folder) == {"b.mp4": "loud"}
    (folder / "b.txt").write_text("quiet", encoding="utf-8")
    assert captions(folder) == {"b.mp4": "quiet"}


@pytest.mark.parametrize(("clip", "text"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_sidecar_of_another_unicode_form_is_found(folder: Path, video: Path, clip: str, text: str):
    name = unicodedata.normalize(clip, "café")
    add(folder, video, f"{name}.mp4")
    (folder / f"{unicodedata.normalize(text, 'café')}.txt").write_text("coffee", encoding="utf-8")
    assert captions(folder) == {f"{name}.mp4": "coffee"}


def test_nested_folders_are_searched_and_hidden_ones_are_not(folder: Path, video: Path):
    add(folder, video, "one/two/deep.mkv", "deep")
    add(folder, video, ".trash/old.mp4", "old")
    add(folder, video, "._resource.mp4", "of a Mac")
    assert captions(folder) == {"one/two/deep.mkv": "deep"}


def test_a_folder_that_is_named_like_a_clip_or_a_caption_is_searched(folder: Path, video: Path):
    add(folder, video, "vid1.mp4/clip.mp4", "inside")
    add(folder, video, "a.mp4")
    add(folder, video, "a.txt/b.mp4", "in a.txt")
    assert captions(folder) == {"vid1.mp4/clip.mp4": "inside", "a.mp4": None, "a.txt/b.mp4": "in a.txt"}


def test_linked_folders_are_followed_once(folder: Path, video: Path):
    add(folder.parent, video, "elsewhere/deep/a.mp4", "far")
    add(folder, video, "z/b.mp4", "near")
    (folder / "far").symlink_to(folder.parent / "elsewhere")
    (folder / "again").symlink_to("z")
    listed = list_clips(folder)
    assert [(clip.name, clip.caption) for clip in listed.clips] == [("far/deep/a.mp4", "far"), ("z/b.mp4", "near")]
    assert listed.notes == ("again is a link to a folder that is searched already, z: it is not searched again",)


@pytest.mark.usefixtures("in_time")
def test_links_in_a_circle_end(folder: Path, video: Path):
    add(folder, video, "sub/a.mp4", "one")
    (folder / "sub" / "self").symlink_to(".")
    (folder / "sub" / "up").symlink_to("..")
    (folder / "all").symlink_to("/")
    (folder / "above").symlink_to("../..")
    (folder / "nothing").symlink_to("nothing")
    listed = list_clips(folder)
    assert [clip.name for clip in listed.clips] == ["sub/a.mp4"]
    assert not listed.problems
    assert {note.split()[0] for note in listed.notes} == {"sub/self", "sub/up", "all", "above", "1"}


def test_a_file_behind_a_link_is_a_clip_with_the_caption_of_its_own_name(folder: Path, video: Path):
    (folder / "a.mp4").symlink_to(video)
    (folder / "a.txt").write_text("linked", encoding="utf-8")
    assert captions(folder) == {"a.mp4": "linked"}


def test_links_that_lead_nowhere_are_refused(folder: Path, video: Path):
    add(folder, video, "good.mp4", "good")
    (folder / "gone.mp4").symlink_to("nowhere.mp4")
    (folder / "round.mp4").symlink_to("round.mp4")
    listed = list_clips(folder)
    assert [clip.name for clip in listed.clips] == ["good.mp4"]
    assert [(refusal.path.name, refusal.reason) for refusal in listed.refused] == [
        ("gone.mp4", "it is a link that leads nowhere"),
        ("round.mp4", "it can't be read (Too many levels of symbolic links)"),
    ]


@pytest.mark.usefixtures("in_time")
def test_what_is_no_regular_file_is_never_opened(folder: Path, video: Path, monkeypatch: pytest.MonkeyPatch):
    add(folder, video, "good.mp4", "good")
    add(folder, video, "spoken.mp4")
    os.mkfifo(folder / "pipe.mp4")
    os.mkfifo(folder / "spoken.txt")
    (folder / "zero.mp4").symlink_to("/dev/zero")
    monkeypatch.chdir(folder)  # the name of a socket may not be long
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.mp4")
        listed = list_clips(folder)
    assert [(refusal.path.name, refusal.reason.split(",")[0]) for refusal in listed.refused] == [
        ("pipe.mp4", "it is a named pipe"),
        ("socket.mp4", "it is a socket"),
        ("zero.mp4", "it is a device"),
    ]
    assert whats(listed) == [f"{folder / 'spoken.txt'}: it is a named pipe, and not a file of content"]


@pytest.mark.usefixtures("in_time")
def test_a_list_that_is_a_pipe_is_never_opened(folder: Path):
    os.mkfifo(folder / "metadata.csv")
    for given in (folder, folder / "metadata.csv"):
        assert whats(list_clips(given)) == [f"{folder / 'metadata.csv'}: it is a named pipe, and not a file of content"]


def test_a_name_that_is_not_utf8_is_refused_in_words_that_can_be_printed(folder: Path, video: Path):
    shutil.copyfile(video, os.fsencode(folder) + b"/caf\xe9.mp4")
    Path(os.fsdecode(os.fsencode(folder) + b"/dr\xe9.zip")).touch()
    listed = list_clips(folder)
    (refusal,) = listed.refused
    assert refusal.reason == "its name is not UTF-8"
    assert refusal.remedy == "rename it"
    for words in (str(refusal.path), *listed.notes):
        words.encode()


def test_left_out_files_are_counted_by_suffix_in_one_note(folder: Path, video: Path):
    add(folder, video, "a.mp4", "one")
    for name in ("b.heic", "c.HEIC", "sub/d.heic", "e.zip", "README", "Thumbs.db", "desktop.ini", ".DS_Store", "orphan.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert list_clips(folder).notes == ("5 files left out: 3 .heic, 1 without a suffix, 1 .zip",)
    for name in ("b.heic", "c.HEIC", "README", "e.zip"):
        (folder / name).unlink()
    assert list_clips(folder).notes == ("1 file left out: 1 .heic (d.heic)",)


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        (".3gp", "mpeg4"),
        (".3g2", "mpeg4"),
        (".m2ts", "mpeg2video"),
        (".MTS", "mpeg2video"),
        (".vob", "mpeg2video"),
        (".m2v", "mpeg2video"),
        (".asf", "msmpeg4"),
        (".f4v", "libx264"),
        (".nut", "ffv1"),
        (".mxf", "mpeg2video"),
        (".ivf", "libvpx"),
    ],
)
def test_containers_that_ffmpeg_reads_are_clips(folder: Path, suffix: str, codec: str):
    kinds = {".m2ts": "mpegts", ".MTS": "mpegts", ".f4v": "mp4", ".m2v": "mpeg2video"}
    path = folder / f"a{suffix}"
    with av.open(str(path), "w", format=kinds.get(suffix)) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 176, 144, "yuv420p"
        for index in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((144, 176, 3), 40 * index, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert captions(folder) == {path.name: None}
    with av.open(str(path)) as container:
        assert len(list(container.decode(video=0))) == 5


def test_a_folder_that_can_not_be_read_is_named(folder: Path, video: Path, monkeypatch: pytest.MonkeyPatch):
    add(folder, video, "a.mp4", "one")
    add(folder, video, "closed/b.mp4", "two")
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)  # root may read everything
    listed = list_clips(folder)
    assert whats(listed) == [f"{folder / 'closed'}: the folder can't be read (Permission denied)"]
    assert [clip.name for clip in listed.clips] == ["a.mp4"]


def test_no_kind_of_file_is_both_a_video_and_an_image():
    assert not VIDEO_SUFFIXES & IMAGE_SUFFIXES


def test_folders_that_are_apart_are_not_searched(folder: Path, video: Path):
    add(folder, video, "a.mp4", "one")
    add(folder, video, "runs/first/samples/step-000002.mp4")
    add(folder.parent, video, "second/samples/step-000002.mp4")
    (folder / "linked").symlink_to(folder.parent / "second")
    listed = list_clips(folder, apart=lambda path: path.resolve().name in {"first", "second"})
    assert [clip.name for clip in listed.clips] == ["a.mp4"]
    assert listed.notes == ("not searched for clips, as folders of runs or of caches: linked, runs/first",)


def test_no_videos_is_an_error_that_names_what_is_there(folder: Path):
    (folder / "notes.txt").write_text("nothing here", encoding="utf-8")
    (folder / "a.heic").touch()
    (what,) = whats(list_clips(folder))
    assert what == f"train_data={folder}: no video files or images in it (1 file left out: 1 .heic (a.heic))"
    assert ".mp4" in list_clips(folder).problems[0].fix


def test_every_caption_that_is_not_text_is_named(folder: Path, video: Path):
    wrong = {"x/a": b"\xe9t\xe9", "y/a": b"\xff\xfea\0", "z/a": "été".encode("utf-16-le"), "nul": b"a\nb\0c"}
    for name, content in wrong.items():
        add(folder, video, f"{name}.mp4").with_suffix(".txt").write_bytes(content)
    add(folder, video, "good.mp4", "fine")
    listed = list_clips(folder)
    assert sorted(whats(listed)) == [
        f"{folder / 'nul.txt'}: line 2 holds a NUL byte, as a file of UTF-16 does",
        *(f"{folder / name}.txt: it is not UTF-8" for name in ("x/a", "y/a", "z/a")),
    ]
    assert {problem.fix for problem in listed.problems} == {"save it as UTF-8"}
    assert len(listed.clips) == 5  # whatever else is wrong with them is found as well
    assert not choose_captions(listed, "error").problems


# Lists


def test_a_list_may_name_images(folder: Path):
    render_image(folder / "a.png")
    render_image(folder / "b.png")
    rows = [{"image": "a.png", "text": "one"}, {"file_name": "b.png", "caption": "two"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert captions(folder) == {"a.png": "one", "b.png": "two"}


def test_a_jsonl_list_is_read(folder: Path, video: Path):
    add(folder, video, "sub/a.mp4")
    outside = add(folder.parent, video, "elsewhere.mp4")
    add(folder, video, "b.mp4")
    rows = [
        {"file_name": "sub/a.mp4", "text": " one\ntwo "},
        {"video": str(outside), "caption": "absolute"},
        {"Path": "b.mp4", "caption": None, "frames": 5},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    expected = {"sub/a.mp4": "one two", str(outside): "absolute", "b.mp4": None}
    assert captions(folder) == expected
    assert captions(folder / "metadata.jsonl") == expected
    assert list_clips(folder).clips[0].source == "metadata.jsonl, entry 1"


def test_a_caption_may_hold_any_character(folder: Path, video: Path):
    row = {"video": "a.mp4", "caption": "one\u2028two\u0085three"}
    write_list(folder, video, "list.jsonl", json.dumps(row, ensure_ascii=False))
    assert captions(folder / "list.jsonl") == {"a.mp4": "one two three"}


def test_a_csv_list_is_read(folder: Path, video: Path):
    content = 'video,caption\na.mp4,"one, two"\nb.mp4,"first\nsecond"\nc.mp4,\nd.mp4\n'
    path = write_list(folder, video, "list.csv", content)
    assert captions(path) == {"a.mp4": "one, two", "b.mp4": "first second", "c.mp4": None, "d.mp4": None}


@pytest.mark.parametrize(
    "content",
    [
        'video, caption\na.mp4, "one, two"\nb.mp4, it is 5" high\n',
        'Video ,\tCaption\r\na.mp4,"one, two"\r\n\r\nb.mp4,it is 5" high\r\n',
        ',caption,video\n0,"one, two",a.mp4\n1,it is 5" high,b.mp4\n',  # with the index of a table
        'video,caption,\na.mp4,"one, two",\nb.mp4,it is 5" high,\n',
        '\ufeffvideo,caption\ra.mp4,"one, two"\rb.mp4,it is 5" high\r',
    ],
)
def test_a_csv_may_be_written_in_several_ways(folder: Path, video: Path, content: str):
    assert captions(write_list(folder, video, "list.csv", content)) == {"a.mp4": "one, two", "b.mp4": 'it is 5" high'}


def test_a_caption_of_any_length_is_read(folder: Path, video: Path):
    long = "word " * 40_000 + "end"
    assert captions(write_list(folder, video, "list.csv", f'video,caption\na.mp4,"{long}"\nb.mp4,short\n')) == {
        "a.mp4": long,
        "b.mp4": "short",
    }


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("list.jsonl", '{"video": "a.mp4"}\n{oops', ["list.jsonl, entry 2 (line 2)", "not valid JSON"]),
        ("list.jsonl", '["a.mp4"]', ["line 1", "not an object", "JSON array"]),
        ("list.jsonl", '[\n{"video": "a.mp4"},\n{"video": "b.mp4"}\n]', ["JSON array", "on each line"]),
        ("list.jsonl", '"a.mp4"', ["entry 1 (line 1)", "not an object"]),
        ("list.jsonl", '\n\n{"caption": "alone"}', ["entry 1 (line 3)", "no video", "file_name"]),
        ("list.jsonl", "\n", ["the list is empty"]),
        (
            "list.jsonl",
            '{"video": "a.mp4", "caption": ["a dog", "a cat"]}',
            ["entry 1", "caption is a list", '["a dog", "a cat"]'],
        ),
        ("list.jsonl", '{"video": "a.mp4", "caption": {"en": "a dog"}}', ["entry 1", "caption is an object"]),
        ("list.jsonl", '{"video": "a.mp4", "text": 5}', ["entry 1", "text is a number, 5", '"text": "..."']),
        ("list.jsonl", '{"video": "a.mp4", "caption": 0}', ["caption is a number, 0"]),
        ("list.jsonl", '{"video": "a.mp4", "caption": true}', ["caption is true or false, true"]),
        ("list.jsonl", '{"video": "a.mp4", "caption": false}', ["caption is true or false, false"]),
        ("list.jsonl", '{"video": "a.mp4", "caption": NaN}', ["caption is a number, NaN"]),
        ("list.jsonl", '{"video": "a.mp4", "caption": "NaN"}', ["entry 1", "missing value"]),
        ("list.jsonl", '{"video": ["a.mp4"], "caption": "x"}', ["video is a list"]),
        ("list.jsonl", '{"video": 7, "caption": "x"}', ["video is a number, 7"]),
        ("list.jsonl", '{"video": "a.mp4", "caption": "x", "caption": "y"}', ["caption stands twice"]),
        ("list.jsonl", '{"video": "a.mp4", "caption": "\\ud800"}', ["entry 1", "no character"]),
        ("list.jsonl", '{"video": "\\udcff.mp4", "caption": "x"}', ["entry 1", "no character"]),
        ("list.jsonl", '{"video": "a\\u0000.mp4", "caption": "x"}', ["entry 1", "no character"]),
        ("list.jsonl", '{"video": "a.mp4", "caption": "a\\u0000b"}', ["entry 1", "no character"]),
        ("list.jsonl", '{"video": "a.mp4", "caption": ' + "[" * 100_000 + "]" * 100_000 + "}", ["entry 1", "too deeply"]),
        ("list.jsonl", '{"video": "a.mp4", "n": ' + "9" * 6000 + "}", ["entry 1", "number that is too long"]),
        ("list.csv", "caption\nalone\n", ["header 'caption'", "no column for the video"]),
        ("list.csv", "a.mp4,a dog\n", ["header 'a.mp4,a dog'", "first line is the header"]),
        ("list.csv", "video,caption\n", ["the list is empty"]),
        ("list.csv", "", ["the list is empty", "video,caption"]),
        ("list.csv", "\n\n", ["the list is empty"]),
        ("list.csv", "\n\nvideo;caption\n", ["separated by ';'"]),
        ("list.csv", "video,caption\n,alone\n", ["entry 1 (line 2)", "no video"]),
        ("list.csv", "video,caption\na.mp4,a dog, running\n", ["entry 1 (line 2)", "more columns than the header", "in quotes"]),
        ("list.csv", "video,caption,\na.mp4,a dog, running\n", ["entry 1", "column 3, which has no name"]),
        ("list.csv", "video,caption,caption\na.mp4,a,b\n", ["'caption' twice"]),
        ("list.csv", "video,caption, Caption\na.mp4,a,b\n", ["'caption' twice"]),
        ("list.csv", "video;caption\na.mp4;a dog\n", ["separated by ';'", "by commas"]),
        ("list.csv", "video\tcaption\na.mp4\ta dog\n", ["separated by tabs", "by commas"]),
        ("list.csv", "video|caption\na.mp4|a dog\n", ["separated by '|'"]),
        ("list.csv", 'video,caption\na.mp4,x\nb.mp4,"a dog\nc.mp4,a cat\n', ["entry 2 (line 3)", "quotes do not close"]),
        ("list.csv", 'video,caption\nb.mp4,"a dog\nc.mp4,"a cat"\n', ["entry 1 (line 2)", "quotes do not close"]),
        ("list.csv", 'video,caption\nb.mp4,"a dog\nc.mp4,a cat"\nd.mp4,x\n', ["entry 1 (line 2)", "swallows"]),
        ("list.csv", 'video,"caption\nb.mp4,a dog\n', ["line 1", "can't be read"]),
        ("list.csv", "video,caption\na.mp4,x\nb.mp4,a\0b\n", ["line 3", "NUL"]),
        ("list.csv", "video,caption\na.mp4,nan\n", ["entry 1", "'nan'", "missing value"]),
        ("list.csv", "video,caption\na.mp4,x\n./a.mp4,y\n", ["entry 2 (line 3)", "./a.mp4 is entry 1 already"]),
    ],
)
def test_a_list_that_is_wrong_is_reported_once(folder: Path, video: Path, name: str, content: str, words: list[str]):
    (problem,) = list_clips(write_list(folder, video, name, content)).problems
    assert all(word in str(problem) for word in [name, *words]), str(problem)
    assert "NAME.txt" not in str(problem)
    assert len(str(problem)) < 600


def test_all_that_is_wrong_with_a_list_is_reported_at_once_and_the_rest_is_read(folder: Path, video: Path):
    rows = [
        '{"video": "a.mp4", "caption": 5}',
        "{",
        '{"caption": "x"}',
        '{"video": "b.mp4", "caption": "good"}',
        '{"video": "gone.mp4"}',
    ]
    listed = list_clips(write_list(folder, video, "list.jsonl", "\n".join(rows)))
    assert [what.split(": ")[0].split(", ")[1] for what in whats(listed)] == [f"entry {n} (line {n})" for n in (1, 2, 3)]
    assert [(clip.name, clip.caption) for clip in listed.clips] == [("a.mp4", ""), ("b.mp4", "good")]
    assert [clip.path.name for clip in choose_captions(listed, "error").clips] == ["a.mp4", "b.mp4"]
    assert [refusal.reason for refusal in listed.refused] == ["there is no such file (entry 5 of list.jsonl)"]


def test_a_flood_of_problems_ends(folder: Path, video: Path):
    listed = list_clips(write_list(folder, video, "list.jsonl", "{\n" * 5000))
    assert len(listed.problems) == 101
    assert "4900 more entries" in listed.problems[-1].what


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "METADATA.CSV"])
def test_a_list_that_is_not_utf8_is_reported(folder: Path, name: str):
    (folder / name).write_bytes('{"video": "a.mp4", "caption": "été"}'.encode("latin-1"))
    assert whats(list_clips(folder)) == [f"{folder / name}: it is not UTF-8"]


def test_a_listed_folder_or_pipe_is_refused(folder: Path, video: Path):
    (folder / "sub.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    name = "x" * 300
    rows = [{"video": name, "caption": "x"} for name in ("sub.mp4", "pipe.mp4", f"{name}.mp4", "a.mp4")]
    listed = list_clips(write_list(folder, video, "list.jsonl", "\n".join(map(json.dumps, rows))))
    assert [refusal.reason.split(",")[0] for refusal in listed.refused] == [
        "it is a folder",
        "it is a named pipe",
        "it can't be read (File name too long) (entry 3 of list.jsonl)",
    ]
    assert [clip.name for clip in listed.clips] == ["a.mp4"]


@pytest.mark.parametrize(("written", "there"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_listed_name_of_another_unicode_form_is_found(folder: Path, video: Path, written: str, there: str):
    path = add(folder, video, f"{unicodedata.normalize(there, 'café')}.mp4")
    name = unicodedata.normalize(written, "café") + ".mp4"
    (folder / "metadata.jsonl").write_text(json.dumps({"video": name, "caption": "x"}), encoding="utf-8")
    assert [clip.path for clip in list_clips(folder).clips] == [path]


def test_what_a_list_leaves_out_of_its_folder_is_noted(folder: Path, video: Path):
    write_list(folder, video, "metadata.csv", "video,caption\na.mp4,x\n")
    (folder / "metadata.jsonl").write_text('{"video": "b.mp4", "caption": "y"}', encoding="utf-8")
    assert list_clips(folder).notes == (
        "metadata.csv is not read, as metadata.jsonl is",
        "3 clips in the folder left out, as metadata.jsonl does not list them: a.mp4, c.mp4, d.mp4",
    )
    assert list_clips(folder / "metadata.csv").notes == ()


# Captions

FOUND = of(("with.mp4", "said"), ("sub/a_red-fox.mp4", None))


def test_a_missing_caption_is_an_error_that_names_the_remedy():
    (problem,) = choose_captions(FOUND, "error").problems
    assert problem.what == "sub/a_red-fox.mp4: no caption"
    assert problem.fix == "write sub/a_red-fox.txt, or set missing_captions to empty, filename or skip"


def test_all_missing_captions_are_in_one_message():
    (problem,) = choose_captions(of(*((f"{i}.mp4", None) for i in range(9))), "error").problems
    assert all(f"{i}.mp4" in problem.what for i in range(9))
    assert "NAME.txt" in problem.fix
    (problem,) = choose_captions(of(*((f"{i}.mp4", None) for i in range(104))), "error").problems
    assert "and 4 more" in problem.what


@pytest.mark.parametrize(
    ("clips", "remedy"),
    [
        ([("a.mp4", "x"), ("b.mp4", None)], "give entry 2 of metadata.csv a caption"),
        ([("a.mp4", None), ("b.mp4", "x"), ("c.mp4", None)], "give entries 1, 3 of metadata.csv a caption"),
        ([("a.mp4", None)], "give every entry of metadata.csv a caption, in a column named one of caption, text, prompt, cap"),
    ],
)
def test_a_caption_that_a_list_lacks_is_to_be_written_into_the_list(clips, remedy: str):
    (problem,) = choose_captions(of(*clips, by=Path("metadata.csv")), "error").problems
    assert problem.fix.startswith(f"{remedy}, or set missing_captions")


@pytest.mark.parametrize(("mode", "caption"), [("empty", ""), ("filename", "a red fox")])
def test_a_missing_caption_can_be_filled(mode, caption: str):
    chosen = choose_captions(FOUND, mode)
    assert [clip.caption for clip in chosen.clips] == ["said", caption]
    assert not chosen.problems
    assert not chosen.refused


def test_a_clip_without_a_caption_can_be_skipped():
    chosen = choose_captions(FOUND, "skip")
    assert chosen.clips == (CaptionedClip(Path("with.mp4"), "said", "with.txt"),)
    assert chosen.refused == (Refusal(Path("sub/a_red-fox.mp4"), "no caption"),)
    assert "no caption" in str(refusal_error(chosen.refused))


def test_a_prefix_and_a_suffix_are_put_around_every_caption_as_they_are():
    chosen = choose_captions(FOUND, "filename", prefix="zxcq person, ", suffix=", 4k")
    assert [clip.caption for clip in chosen.clips] == ["zxcq person, said, 4k", "zxcq person, a red fox, 4k"]


# Parts of files, and other forms of lists


PARTS = [
    ({"start": 1, "end": 2.5}, Part(1.0, 2.5)),
    ({"start": "0", "end": " 3 "}, Part(0.0, 3.0)),
    ({"fps": 12, "repeats": 0.5}, Part(fps=12.0, repeats=0.5)),
    ({"start": None, "end": ""}, WHOLE),
]


@pytest.mark.parametrize(("written", "part"), PARTS)
def test_an_entry_may_be_a_part_of_a_file(tmp_path, written, part):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.json").write_text(json.dumps([{"video": "a.mp4", "caption": "c"} | written]), encoding="utf-8")
    [clip] = list_clips(tmp_path).clips
    assert (clip.part, clip.caption, clip.source) == (part, "c", "metadata.json, entry 1")


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"start": -1}, "start is -1"),
        ({"end": 0}, "end is 0"),
        ({"start": 2, "end": 2}, "end is 2, and start 2"),
        ({"fps": "fast"}, 'fps is "fast", and no number'),
        ({"repeats": True}, "repeats is true, and no number"),
        ({"start": "nan"}, "and no number"),
        ({"start": [1]}, "and no number"),
        ({"end": 10**400}, "too long|no number"),
    ],
)
def test_a_part_that_is_none_is_one_message(tmp_path, written, words):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "list.jsonl").write_text(json.dumps({"video": "a.mp4", "caption": "c"} | written), encoding="utf-8")
    [problem] = list_clips(tmp_path / "list.jsonl").problems
    assert re.search(words, problem.what)
    assert "entry 1 (line 1)" in problem.what
    assert problem.fix


def test_two_parts_of_a_file_are_two_clips_and_the_same_part_is_one_too_many(tmp_path):
    (tmp_path / "a.mp4").touch()
    rows = [{"video": "a.mp4", "cap": "c", "start": start, "end": end} for start, end in ((0, 1), (1, 2), (0, 1))]
    (tmp_path / "list.json").write_text(json.dumps(rows), encoding="utf-8")
    listed = list_clips(tmp_path / "list.json")
    assert [str(clip.part) for clip in listed.clips] == [" from 0 s to 1 s", " from 1 s to 2 s"]
    assert [problem.what for problem in listed.problems] == [
        f"{tmp_path / 'list.json'}, entry 3: a.mp4 from 0 s to 1 s is entry 1 already"
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "it is no list"),
        ("[1]", "entry 1: not an object"),
        ('[{"video": "a.mp4"},]', "line 1 is not valid JSON"),
        ("[" * 100_000, "nested too deeply|not valid JSON"),
        ("[]", "the list is empty"),
        ('[{"video": "a.mp4", "video": "b.mp4"}]', "video stands twice"),
        ("[" + "9" * 6000 + "]", "too long"),
    ],
)
def test_a_json_list_that_is_none_is_one_message(tmp_path, text, words):
    (tmp_path / "list.json").write_text(text, encoding="utf-8")
    [problem] = list_clips(tmp_path / "list.json").problems
    assert re.search(words, problem.what), problem.what
    assert problem.fix


@pytest.mark.parametrize("key", ["media_path", "video_path", "path", "file_name"])
def test_names_that_other_programs_give(tmp_path, key):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "metadata.jsonl").write_text(json.dumps({key: "a.mp4", "text": "c"}), encoding="utf-8")
    assert [(clip.name, clip.caption) for clip in list_clips(tmp_path).clips] == [("a.mp4", "c")]


def test_a_file_of_names_and_a_file_of_captions(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "videos.txt").write_text("a.mp4\nb.mp4\n", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("one, with a comma\ntwo\n", encoding="utf-8")
    assert [(clip.name, clip.caption) for clip in list_clips(tmp_path).clips] == [
        ("a.mp4", "one, with a comma"),
        ("b.mp4", "two"),
    ]
    (tmp_path / "prompts.txt").write_text("one\n", encoding="utf-8")
    [problem] = list_clips(tmp_path).problems
    assert "it has 1 lines, and videos.txt has 2" in problem.what
