"""Frame n that is trained is the n-th picture that the file shows, whatever the file, wherever the window begins."""

import struct
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from common import RULE, context_of
from video_files import FRAMES, cut, encode, numbered, write_video_files

from crepatrain.config.plan import read_plan
from crepatrain.data.clip import Clip, Unreadable
from crepatrain.data.decode import FrameReader, probe
from crepatrain.data.digests import content_digest
from crepatrain.data.frames import as_video, crop_resize
from crepatrain.preparing.precompute import filled_caches
from crepatrain.preparing.preflight import read_dataset
from crepatrain.training.build import build_family, build_vae

WINDOW = 5
SIZE = (48, 80)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_video_files(folder)
    return folder


def decoded(path: Path) -> list[np.ndarray]:
    """Every picture, from a full decode by PyAV, turned as a player turns it."""
    with av.open(str(path)) as container:
        return [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in container.decode(video=0)]


def looked_at(path: Path) -> Clip:
    return Clip(path, "", content_digest(path), probe(path), RULE)


def read(clip: Clip, frames: Sequence[int], reader: FrameReader | None = None) -> list[np.ndarray]:
    size = (clip.info.height, clip.info.width)
    return list((reader or FrameReader()).read(clip, frames, size).permute(0, 2, 3, 1).numpy())


def test_cached_latents_are_those_of_the_pictures_shown(files: Path, config_file, tiny_checkpoint, tmp_path: Path):
    """Through the real cache: the first, a middle and the last window of every file."""
    cache = tmp_path / "cache"
    settings = {"height": SIZE[0], "width": SIZE[1], "num_frames": WINDOW, "fps": 240, "max_windows_per_clip": 3}
    base = str(tiny_checkpoint("wan", "tiny"))
    plan = read_plan(
        config_file(
            **settings,
            pretrained_model_name_or_path=base,
            train_data=str(files),
            cache_dir=str(cache),
            crepa_enabled=False,
            missing_captions="empty",
        )
    )
    context = context_of(plan)
    dataset = read_dataset(context)
    caches = filled_caches(context, dataset, teacher=False)
    windows = defaultdict(list)
    for window in dataset.clips.windows:
        windows[window.path].append(window)
    assert windows.keys() == {path for path in files.iterdir() if path.is_file()}
    assert len(windows) > 60

    family = build_family(plan)
    vae = build_vae(plan, family, torch.device("cpu"))
    for path, of_file in windows.items():
        pictures = decoded(path)
        assert [window.frames[0] for window in of_file][:: len(of_file) - 1] == [0, len(pictures) // WINDOW * WINDOW - WINDOW]
        for window in of_file:
            shown = [torch.from_numpy(pictures[number].copy()).permute(2, 0, 1)[None] for number in window.frames]
            clip = torch.cat([crop_resize(picture, SIZE) for picture in shown])
            with torch.no_grad():
                expected = family.encode_video(vae, as_video(clip))[0]
            entry = caches.store.read("latents", caches.latents[window])["latents"]
            assert torch.equal(entry, expected), window.name


def test_the_pictures_are_the_ones_that_were_encoded(files: Path):
    """PyAV's own numbers are right: picture n of a whole file looks like number n."""
    for path in sorted(files.iterdir()):
        if path.stem.endswith("-cut") or path.name.startswith(("turned", "changing")):
            continue
        clip = looked_at(path)
        assert clip.info.frames == FRAMES, path.name
        for number in (0, 13, 26, FRAMES - 1):
            picture = read(clip, [number])[0].astype(int)
            off = {n: np.abs(picture - numbered(n)).mean() for n in range(FRAMES)}
            assert min(off, key=off.__getitem__) == number, path.name


def test_every_frame_of_a_few_is_read_alone(files: Path):
    reader = FrameReader()
    for name in ("h264-mp4-cut.mp4", "hevc-open-mp4.mp4", "mpeg2-ts.ts", "xvid-avi.avi", "turned-90-cut.mp4"):
        clip, pictures = looked_at(files / name), decoded(files / name)
        assert clip.info.frames == len(pictures)
        for number, picture in reversed(list(enumerate(pictures))):
            assert np.array_equal(read(clip, [number], reader)[0], picture), (name, number)


def test_a_long_video_is_read_near_its_end_by_seeking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a transport stream a seek lands behind the time that was asked for, so it begins some groups earlier."""
    encode(tmp_path / "long.ts", "libx264", {"bf": "3", "g": "12"}, ticks=range(400))
    clip, pictures = looked_at(tmp_path / "long.ts"), decoded(tmp_path / "long.ts")
    monkeypatch.setattr("crepatrain.data.decode._by_counting", None)
    assert all(map(np.array_equal, read(clip, range(390, 400)), pictures[390:]))


def test_decord_reads_what_it_gets_right(files: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("_by_seeking", "_by_counting"):
        monkeypatch.setattr(f"crepatrain.data.decode.{name}", None)
    for name in ("h264-mp4.mp4", "vp9-webm.webm", "turned-90.mp4"):
        assert all(map(np.array_equal, read(looked_at(files / name), range(20, 30)), decoded(files / name)[20:30]))


def test_a_file_that_changes_after_it_was_looked_at_is_not_read(tmp_path: Path):
    path = tmp_path / "clip.mp4"
    encode(path, "libx264", {"bf": "3", "g": "12"})
    clip = looked_at(path)
    encode(path, "libx264", {"bf": "3", "g": "12", "crf": "40"})
    with pytest.raises(Unreadable, match="changed"):
        read(clip, [20])
    encode(path, "libx264", {"bf": "3", "g": "12"}, ticks=range(12))
    with pytest.raises(Unreadable, match="fewer frames"):
        read(clip, [20])


def test_marks_of_a_machine_that_rounds_otherwise_do_not_matter(files: Path):
    path = files / "h264-mp4.mp4"
    known = looked_at(path)
    marks = tuple(zlib.crc32(str(mark).encode()) for mark in known.info.marks)
    elsewhere = Clip(path, "", known.digest, probe(path).__class__(**{**vars(known.info), "marks": marks}), RULE)
    assert all(map(np.array_equal, read(elsewhere, range(10, 15)), decoded(path)[10:15]))


@pytest.mark.parametrize("seed", [0, 1, 3, 4])
def test_a_cut_file_that_is_damaged_too_is_refused(files: Path, tmp_path: Path, seed: int):
    """What a cut takes away is forgiven; what is broken behind it is not (unless the container hides it, as with seed 2)."""
    source = files / "h264-open-mkv.mkv"
    cut(source, tmp_path / "cut.mkv", 0.7)
    assert probe(tmp_path / "cut.mkv").frames > 10
    content = bytearray((tmp_path / "cut.mkv").read_bytes())
    draw = np.random.default_rng(seed)
    at = draw.integers(len(content) // 2, len(content) * 3 // 4)
    content[at : at + 400] = draw.bytes(400)
    (tmp_path / "cut.mkv").write_bytes(content)
    with pytest.raises(Unreadable, match="damaged"):
        probe(tmp_path / "cut.mkv")


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
        ((1, 0, 0, -1), lambda picture: picture[::-1]),
        ((0, 1, 1, 0), lambda picture: picture.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda picture: picture[::-1, ::-1].transpose(1, 0, 2)),
        ((0, 1, -1, 0), lambda picture: np.rot90(picture, -1)),
    ],
)
def test_a_mirrored_picture_is_read_as_it_is_shown(tmp_path: Path, matrix: tuple[int, ...], shown: Callable):
    """As cameras that face their owner write: x' = a x + c y, y' = b x + d y in the header of the track."""
    path = tmp_path / "mirrored.mp4"
    encode(path, "libx264", {"bf": "3", "g": "12", "crf": "4"})
    content = path.read_bytes()
    at = content.index(b"tkhd") + 44
    a, b, c, d = (struct.pack(">i", entry << 16) for entry in matrix)
    nothing = bytes(4)
    path.write_bytes(content[:at] + a + b + nothing + c + d + nothing + content[at + 24 :])
    (picture,) = read(looked_at(path), [20])
    assert np.abs(picture.astype(int) - shown(numbered(20))).mean() < 12
