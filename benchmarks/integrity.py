"""What digests cost where checkpoints, adapters and cache entries are written and read, beside the same without them."""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from common import arguments, paired, ratio, write

from crepatrain.data import cache
from crepatrain.data.cache import CacheStore
from crepatrain.integrity import expect_listed
from crepatrain.training import checkpoint
from crepatrain.training.checkpoint import read_tensors, replace_file, write_checkpoint

_MIB = 1 << 20
_TENSORS = 8
_ENTRIES = 100


@contextmanager
def without() -> Iterator[None]:
    """Nothing is hashed, neither for a manifest nor for a header."""
    with (
        patch.object(checkpoint, "write_manifest", lambda _: None),
        patch.object(checkpoint, "seal", lambda _: None),
        patch.object(cache, "seal", lambda _: None),
    ):
        yield


def main() -> None:  # noqa: C901 - what is compared, one after the other
    parser = arguments(__doc__ or "")
    parser.add_argument("--mib", type=int, nargs="+", default=[16, 256], help="sizes of a checkpoint")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = []

    def compare(what: str, mib: float, groups: dict[str, Callable[[], object]]) -> None:
        seconds = paired(groups, options.repeats, device)
        base = next(iter(seconds.values()))
        for way, times in seconds.items():
            of, middle = ratio(times, base), statistics.median(times)
            found = {"time ratio": of["median"], "low": of["low"], "high": of["high"]}
            rows.append({"what": what, "MiB": mib, "way": way, "ms": 1000 * middle, "GiB a second": mib / 1024 / middle, **found})

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for mib in options.mib:
            tensors = {str(n): torch.randn(mib * _MIB // _TENSORS // 4) for n in range(_TENSORS)}
            path = folder / "step-000001"

            def save(path: Path = path, tensors: dict[str, torch.Tensor] = tensors) -> None:
                write_checkpoint(path, {"transformer": tensors}, {}, {"state": {"step": 1}})

            def save_without(save: Callable[[], None] = save) -> None:
                with without():
                    save()

            compare("writing a checkpoint", mib, {"without digests": save_without, "with digests": save})
            save()

            def read(path: Path = path) -> float:
                return sum(float(tensor.sum()) for tensor in read_tensors(path, "transformer").values())

            def read_checked(path: Path = path, read: Callable[[], float] = read) -> None:
                assert expect_listed(path)
                read()

            compare("reading a checkpoint", mib, {"unchecked": read, "checked": read_checked})

            def adapter(tensors: dict[str, torch.Tensor] = tensors) -> None:
                replace_file(folder / "a.safetensors", tensors, {"format": "pt"})

            def adapter_without(adapter: Callable[[], None] = adapter) -> None:
                with without():
                    adapter()

            compare("writing an adapter", mib, {"without a digest": adapter_without, "with a digest": adapter})
        for mib in (0.25, 4):
            keys = [f"{n:02d}" for n in range(_ENTRIES)]
            store = CacheStore(folder / f"cache-{mib}")
            for key in keys:
                store.write("latents", key, {"latents": torch.randn(int(mib * _MIB) // 4)})

            def read_entries(*, checked: bool, store: CacheStore = store, keys: list[str] = keys) -> float:
                fresh = CacheStore(store.root)
                fresh._checked |= set() if checked else {("latents", key) for key in keys}
                return sum(float(fresh.read("latents", key)["latents"].sum()) for key in keys)

            def check_entries(store: CacheStore = store, keys: list[str] = keys) -> None:
                with ThreadPoolExecutor() as pool:
                    list(pool.map(partial(store.expect_whole, "latents"), keys))

            compare(
                f"reading {_ENTRIES} cache entries of {mib:g} MiB",
                mib * _ENTRIES,
                {
                    "not the first time": lambda read=read_entries: read(checked=False),
                    "the first time in a process": lambda read=read_entries: read(checked=True),
                    "checked before a run, at once": check_entries,
                },
            )
    write(f"integrity-{options.device}", " ".join(["python", "benchmarks/integrity.py", *sys.argv[1:]]), rows)


if __name__ == "__main__":
    main()
