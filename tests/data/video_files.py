"""Video files of the kinds that people have: containers, codecs, groups of pictures, cuts, rotations, uneven times."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FRAMES = 40
# Encoder, its options, suffixes. All of them with groups of a dozen pictures, so that later frames are reached by a seek.
_OPEN = "open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0"
_CODECS: tuple[tuple[str, str, dict[str, str], tuple[str, ...]], ...] = (
    ("h264", "libx264", {"bf": "3", "g": "12"}, ("mp4", "mkv", "mov", "ts", "m2ts", "flv", "3gp")),
    ("h264-ps", "libx264", {"bf": "3", "g": "12"}, ("mpg",)),
    ("h264-no-b", "libx264", {"bf": "0", "g": "12"}, ("avi", "mp4")),
    ("h264-open", "libx264", {"x264-params": _OPEN}, ("mp4", "mkv", "ts")),
    ("h264-refresh", "libx264", {"x264-params": "intra-refresh=1:keyint=12"}, ("mp4",)),
    ("hevc", "libx265", {"x265-params": f"{_OPEN.replace('=1', '=0', 1)}:log-level=none"}, ("mp4", "mov", "ts")),
    ("hevc-open", "libx265", {"x265-params": f"{_OPEN}:log-level=none"}, ("mp4", "mkv")),
    ("xvid", "mpeg4", {"bf": "2", "g": "12", "q": "2"}, ("avi", "mp4")),
    ("mpeg2", "mpeg2video", {"bf": "2", "g": "12"}, ("ts", "mxf")),
    ("mpeg2-ps", "mpeg2video", {"bf": "2", "g": "12"}, ("mpg", "vob")),
    ("mpeg1", "mpeg1video", {"bf": "2", "g": "12"}, ("mpeg",)),
    ("vp9", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}, ("webm",)),
    ("vp8", "libvpx", {"g": "12", "deadline": "realtime", "cpu-used": "8"}, ("webm", "ogv")),
    ("av1", "libsvtav1", {"preset": "12", "g": "12"}, ("mp4", "mkv")),
    ("wmv", "wmv2", {"g": "12"}, ("wmv",)),
    ("msmpeg4", "msmpeg4", {"g": "12"}, ("asf",)),
    ("mjpeg", "mjpeg", {}, ("avi", "mov")),
    ("prores", "prores_ks", {}, ("mov",)),
    ("lossless", "ffv1", {}, ("mkv",)),
    ("sorenson", "flv", {"g": "12"}, ("flv",)),
    ("gif", "gif", {}, ("gif",)),
)
_FORMATS = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le", "gif": "rgb8"}
_CUT = {"h264", "h264-open", "hevc", "hevc-open", "xvid", "mpeg2", "vp9"}


def numbered(number: int, height: int = 96, width: int = 160) -> np.ndarray:
    """[height, width, 3] uint8: sixteen-pixel squares of colours that no other number has."""
    squares = np.random.default_rng(number).integers(30, 226, (height // 16, width // 16, 3), dtype=np.uint8)
    return squares.repeat(16, axis=0).repeat(16, axis=1)


def encode(
    path: Path,
    codec: str,
    options: dict[str, str],
    *,
    ticks: Sequence[int] = range(FRAMES),
    rate: int = 25,
    rotation: int = 0,
    sizes: Callable[[int], tuple[int, int]] = lambda _: (96, 160),
) -> None:
    """Numbered pictures, shown at these ticks of 1 / rate seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = sizes(0)
        stream.pix_fmt = _FORMATS.get(codec, "yuv420p")
        stream.codec_context.time_base = Fraction(1, rate)
        if rotation:
            stream.set_display_rotation(-rotation)
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(numbered(number, *sizes(number)), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cut(source: Path, to: Path, seconds: float) -> None:
    """What everybody does: everything from a time on, copied without encoding, so from the keyframe before it."""
    with av.open(str(source)) as given, av.open(str(to), "w") as container:
        stream = given.streams.video[0]
        copy = container.add_stream_from_template(stream)
        start = round(seconds / stream.time_base) + (stream.start_time or 0)
        given.seek(start, stream=stream)
        for packet in given.demux(stream):
            if packet.dts is None:
                continue
            packet.pts, packet.dts = packet.pts - start, packet.dts - start
            packet.stream = copy
            container.mux(packet)


def write_video_files(folder: Path) -> None:
    """Some fifty files."""
    for name, codec, options, suffixes in _CODECS:
        for suffix in suffixes:
            path = folder / f"{name}-{suffix}.{suffix}"
            encode(path, codec, options)
            if name in _CUT:
                cut(path, folder / f"{name}-{suffix}-cut.{suffix}", 0.7)
    h264 = {"bf": "3", "g": "12"}
    uneven = np.cumsum([1 + (number * 7) % 4 for number in range(FRAMES)]).tolist()
    for suffix in ("mp4", "mkv", "ts"):
        encode(folder / f"uneven-{suffix}.{suffix}", "libx264", h264, ticks=uneven, rate=50)
    for degrees in (90, 180, 270):
        encode(folder / f"turned-{degrees}.mp4", "libx264", h264, rotation=degrees)
        cut(folder / f"turned-{degrees}.mp4", folder / f"turned-{degrees}-cut.mp4", 0.7)
    # A stream that changes its size: two files, one after the other.
    for number, size in enumerate(((96, 160), (64, 96))):
        encode(folder / f"part-{number}.ts", "libx264", h264, sizes=lambda _, size=size: size)
    parts = [folder / f"part-{number}.ts" for number in range(2)]
    (folder / "changing.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()
