"""Which entries of the caches a run can use: those that are there, of the right form, and what was written."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from crepatrain.config.plan import Plan
from crepatrain.data.buckets import Window
from crepatrain.data.cache import CacheStore, Form, Kind
from crepatrain.data.digests import read_memo, write_memo
from crepatrain.errors import UserError
from crepatrain.integrity import Damaged
from crepatrain.preparing.context import Context
from crepatrain.preparing.preflight import Dataset
from crepatrain.training.build import build_family

_FLOATS = ("F32", "BF16", "F16")
# Damaged entries that are named, each in a line.
_NAMED = 5
# Progress is shown from so many bytes on that have to be read.
_LONG = 1 << 30
_AT_ONCE = min(8, os.cpu_count() or 1)
# What remembers the entries that were found whole, as long as their size and time stay the same.
_MEMO_FILE = "checked.json"


@dataclass(frozen=True)
class Entry:
    """An entry that a run reads.

    Attributes:
        forms: of its tensors, by name.
    """

    kind: Kind
    key: str
    forms: Mapping[str, Form]

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.key}"


class EntryForms:
    """What the entries of a dataset have to be."""

    def __init__(self, plan: Plan, dataset: Dataset) -> None:
        self._plan, self._dataset, self._family = plan, dataset, build_family(plan)

    def text(self) -> dict[str, Form]:
        shapes = self._family.text_shapes()
        return {name: Form(shape, _FLOATS, up_to=len(shape) == 2) for name, shape in shapes.items()}

    def latents(self, window: Window) -> dict[str, Form]:
        return {"latents": Form(self._latents(window), ("F32",))}

    def image(self, window: Window) -> dict[str, Form]:
        shapes = self._family.image_shapes(self._latents(window))
        # Those of two dimensions are tokens, of which a small image encoder makes fewer.
        return {name: Form(shape, _FLOATS, up_to=len(shape) == 2) for name, shape in shapes.items()}

    def teacher(self, window: Window) -> dict[str, Form]:
        assert self._plan.encoder is not None
        grid = self._dataset.grids[window.bucket]
        rows, columns = self._plan.teacher_grid(grid)
        shape = (grid.t, rows * columns, self._plan.encoder.width)
        if self._plan.config.crepa.crepa_cache_dtype == "int8":
            return {"values": Form(shape, ("I8",)), "scale": Form((*shape[:2], 1), ("F16",))}
        return {"values": Form(shape, ("F16",))}

    def _latents(self, window: Window) -> tuple[int, int, int, int]:
        geometry, bucket = self._plan.geometry, window.bucket
        return (geometry.latent_channels, *geometry.latent_shape(bucket.frames, bucket.height, bucket.width))


def missing_entries(context: Context, store: CacheStore, entries: Iterable[Entry]) -> set[tuple[Kind, str]]:
    """The entries that have to be written: those that are not there, and those that are not what is needed, each with a line.

    Every entry's form is looked at; its content is read where it was not yet found whole as it lies there.

    Raises:
        Stopped: a signal came.
    """
    wanted = {entry.name: entry for entry in entries}
    memo_file = store.root / _MEMO_FILE
    memo = read_memo(memo_file)
    known = memo if isinstance(memo, dict) else {}
    missing, stamps, damaged = list[str](), dict[str, str](), dict[str, str]()
    size = 0
    for name, entry in wanted.items():
        try:
            stat = store.path(entry.kind, entry.key).stat()
        except OSError:
            missing.append(name)
            continue
        wrong = store.mismatch(entry.kind, entry.key, entry.forms)
        stamp = f"{stat.st_size}|{stat.st_mtime_ns}"
        if wrong:
            damaged[name] = wrong
        elif known.get(name) != stamp:
            stamps[name] = stamp
            size += stat.st_size
    with _progress(context, len(stamps), shown=size >= _LONG) as advance:
        damaged |= _damaged(context, store, [wanted[name] for name in stamps], advance)
    found_whole = {name: stamp for name, stamp in stamps.items() if name not in damaged}
    if found_whole:
        with contextlib.suppress(UserError):  # of a cache that is only read: what can't be remembered is checked again
            write_memo(memo_file, known | found_whole)
    paths = {name: store.path(wanted[name].kind, wanted[name].key) for name in damaged}
    for name in list(damaged)[:_NAMED]:
        context.screen.note(f"cache entry {paths[name]} is damaged ({damaged[name]}): it is written anew")
    if len(damaged) > _NAMED:
        context.screen.note(f"{len(damaged) - _NAMED} more cache entries are damaged: they are written anew")
    return {(wanted[name].kind, wanted[name].key) for name in (*missing, *damaged)}


def _damaged(context: Context, store: CacheStore, entries: Sequence[Entry], advance: Callable[[], None]) -> dict[str, str]:
    """Why entries are not what was written, by their names, of those that are not."""

    def look(entry: Entry) -> str | None:
        try:
            store.expect_whole(entry.kind, entry.key)
        except (Damaged, OSError) as error:
            return str(error)
        return None

    found: dict[str, str] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(entries), 4 * _AT_ONCE):
            context.stop.check("no cache entry was changed")
            some = entries[start : start + 4 * _AT_ONCE]
            for entry, wrong in zip(some, pool.map(look, some), strict=True):
                if wrong:
                    found[entry.name] = wrong
                advance()
    return found


@contextmanager
def _progress(context: Context, count: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    if not shown:
        yield lambda: None
        return
    with context.screen.progress("checking cache entries", count) as advance:
        yield advance
