"""Files that naive loaders get wrong: codecs, times, rotations, and damage."""

import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH = 88, 160  # codecs store 96 rows of these 88
STEP = 6  # of brightness, from frame to frame
# PyAV's encoders of the widely used codecs, each as fast as it goes and silent.
FAST = {
    "libx264": {"preset": "ultrafast", "bf": "3", "crf": "8"},
    "libx265": {"preset": "ultrafast", "bf": "3", "crf": "8", "x265-params": "log-level=none:b-adapt=0"},
    "libsvtav1": {"preset": "12", "crf": "20"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "b": "2M"},
    "gif": {},
}


def picture(number: int, *, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """[height, width, 3] uint8: brighter with its number, with a dark mark that moves in one corner, so that no turn keeps it."""
    pixels = np.full((height, width, 3), 20 + STEP * number, np.uint8)
    pixels[4:24, 4 + number % 8 : 24 + number % 8] = (20, 0, 0)
    return pixels


def write_video(
    path: Path,
    codec: str,
    ticks: Sequence[int],
    *,
    time_base: Fraction = Fraction(1, 16),
    pix_fmt: str = "yuv420p",
    height: int = HEIGHT,
    width: int = WIDTH,
    rotation: int = 0,
    sound: str | None = None,
    **options: str,
) -> None:
    """A video of numbered pictures.

    Args:
        ticks: when each is shown, in units of `time_base`.
        rotation: degrees clockwise by which a player turns it.
        sound: the codec of an audio track beside it.
        options: of the encoder.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=round(1 / time_base), options=FAST[codec] | options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = stream.time_base = time_base
        if rotation:
            stream.set_display_rotation(-rotation)  # PyAV counts counter-clockwise
        audio = container.add_stream(sound, rate=48000) if sound else None
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(picture(number, height=height, width=width), format="rgb24")
            frame.pts, frame.time_base = tick, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio:
            mux_silence(container, audio)


def mux_silence(container: av.container.OutputContainer, stream: av.AudioStream) -> None:
    """One second of it, which ends the stream."""
    samples = np.zeros((1, stream.rate), np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate = stream.rate
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_audio(path: Path) -> None:
    """A file with sound and no picture."""
    with av.open(str(path), "w") as container:
        mux_silence(container, container.add_stream("aac", rate=16000))


def damage(source: Path, to: Path, *, size: int, seed: int) -> Path:
    """A copy with `size` random bytes in the middle of its media."""
    content = bytearray(source.read_bytes())
    begin, end = content.index(b"mdat") + 4, content.rindex(b"moov") - 4
    draw = random.Random(seed)
    at = begin + (end - begin - size) // 2 + draw.randrange(-(end - begin) // 8, (end - begin) // 8)
    content[at : at + size] = draw.randbytes(size)
    to.write_bytes(content)
    return to


def write_hard_clips(folder: Path) -> None:
    """One file of each kind: ten that are read, then four that are refused."""
    even = range(16)
    write_video(folder / "av1.mp4", "libsvtav1", even, sound="aac")
    write_video(folder / "hevc-10bit.mp4", "libx265", even, pix_fmt="yuv420p10le", sound="aac")
    write_video(folder / "vp9.webm", "libvpx-vp9", even, sound="libopus")
    # A gif counts in hundredths of a second, so that its frames are not equally far apart.
    hundredths = [round(number * 6.25) for number in even]
    write_video(folder / "animation.gif", "gif", hundredths, time_base=Fraction(1, 100), pix_fmt="rgb8")
    for degrees in (0, 90, 180, 270):
        write_video(folder / f"rotated-{degrees}.mov", "libx264", range(3), rotation=degrees, bf="0")
    variable = [0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 15, 18, 21, 24, 27, 28]
    write_video(folder / "variable-frame-rate.mp4", "libx264", variable, sound="aac")
    # With B-frames, packets are stored in the order in which they are decoded, and an edit list moves the first to time 0.
    write_video(folder / "unordered-timestamps.mov", "libx264", range(12), time_base=Fraction(1, 32), height=50, width=50)

    write_audio(folder / "audio-only.mp4")
    (folder / "empty.mp4").touch()
    whole = folder / "whole.mp4"
    write_video(whole, "libx264", range(32))
    media = whole.read_bytes()
    # A third of the file covers the lengths of many packets too. A decoder may conceal wrong pixels, but no wrong length.
    damage(whole, folder / "corrupted.mp4", size=len(media) // 3, seed=0)
    (folder / "truncated.mp4").write_bytes(media[: len(media) // 2])
    whole.unlink()
