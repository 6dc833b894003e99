"""What it costs to prove that every frame is the right one: frames per second of each way to read, and the share of caching."""

import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import decord
import torch
from common import arguments, paired, ratio, write

from crepatrain.commands.random_checkpoint import make_random
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.data import decode
from crepatrain.data.clip import Clip, Rule
from crepatrain.data.decode import FrameReader, probe
from crepatrain.data.digests import content_digest
from crepatrain.preparing.context import Context
from crepatrain.preparing.precompute import filled_caches
from crepatrain.preparing.preflight import read_dataset
from crepatrain.stopping import StopSignal


def unproven_decord(clip: Clip) -> None:
    """As frames were read before they were held against anything."""
    reader = decord.VideoReader(str(clip.path), num_threads=1)
    for start in range(0, clip.info.frames, 16):
        reader.get_batch(list(range(start, min(start + 16, clip.info.frames)))).asnumpy()


def by(ways: tuple[Callable, ...], clip: Clip) -> None:
    with patch.object(decode, "_FAST_WAYS", ways):
        FrameReader().read(clip, range(clip.info.frames), (clip.info.height, clip.info.width))


@contextmanager
def no_proof() -> Iterator[None]:
    """Pictures are counted, and neither converted nor marked."""

    def decode_only(path: Path, *_: object, **__: object) -> tuple["decode._Shown", float]:
        shown = decode._Shown()
        with decode._opened(path) as (container, stream):
            for frame in container.decode(stream):
                shown.sizes.append((frame.height, frame.width))
                shown.pts.append(frame.pts)
                shown.seconds.append(frame.time)
                shown.marks.append(0)
            return shown, float(stream.average_rate or 25)

    with patch.object(decode, "_mark", lambda _: 0), patch.object(decode, "_decode", decode_only):
        yield


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--clips", type=Path, required=True, help="folder of captioned clips")
    options = parser.parse_args()
    device = torch.device(options.device)
    paths = sorted(path for path in options.clips.iterdir() if path.suffix in {".mp4", ".mkv"})
    clips = [Clip(path, "", content_digest(path), probe(path), Rule((0, 0, 0), None)) for path in paths]
    frames = sum(clip.info.frames for clip in clips)

    def over_all(work: Callable[[Clip], object]) -> Callable[[], object]:
        return lambda: [work(clip) for clip in clips]

    def look(clip: Clip) -> None:
        probe(clip.path)

    def look_without(clip: Clip) -> None:
        with no_proof():
            probe(clip.path)

    groups: list[dict[str, Callable[[], object]]] = [
        {"first look, without marks": over_all(look_without), "first look": over_all(look)},
        {
            "read by decord, unproven": over_all(unproven_decord),
            "read by decord": over_all(lambda clip: by((decode._by_decord,), clip)),
            "read by seeking": over_all(lambda clip: by((decode._by_seeking,), clip)),
            "read by counting": over_all(lambda clip: by((), clip)),
        },
    ]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_random("wan", folder / "model", None, 0, Screen(quiet=True))
        numbers = itertools.count()
        (folder / "clips").mkdir()
        (folder / "clips" / paths[0].name).symlink_to(paths[0].resolve())

        def cache() -> None:
            config = folder / "config.json"
            values = {
                "model_family": "wan",
                "pretrained_model_name_or_path": str(folder / "model"),
                "train_data": str(folder / "clips"),
                "cache_dir": str(folder / f"cache-{next(numbers)}"),
                "output_dir": str(folder / "run"),
                "num_frames": 17,
                "height": 240,
                "width": 416,
                "fps": 60,
                "max_train_steps": 1,
                "missing_captions": "empty",
            }
            config.write_text(json.dumps(values), encoding="utf-8")
            context = Context(read_plan(config), Screen(quiet=True), device, StopSignal())
            filled_caches(context, read_dataset(context), teacher=False)

        def cache_without() -> None:
            with no_proof():
                cache()

        groups.append({"caching with a tiny VAE, without marks": cache_without, "caching with a tiny VAE": cache})
        for group in groups:
            caching = group is groups[-1]  # of the first clip, every window
            seconds = paired(group, max(1, options.repeats // 3) if caching else options.repeats, device)
            base = next(iter(seconds.values()))
            for way, times in seconds.items():
                of = ratio(times, base)
                rate = (clips[0].info.frames if caching else frames) / statistics.median(times)
                rows.append(
                    {"way": way, "frames a second": rate, "time ratio": of["median"], "low": of["low"], "high": of["high"]}
                )
    write(f"decode-{options.device}", " ".join(["python", "benchmarks/decode.py", *sys.argv[1:]]), rows)


if __name__ == "__main__":
    main()
