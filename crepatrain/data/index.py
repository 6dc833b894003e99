"""What is known of every clip of a dataset: found out once, by decoding it in full."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import av

from crepatrain.data.decode import ClipInfo, Unreadable, probe
from crepatrain.data.digests import FileDigests, read_memo, write_memo
from crepatrain.data.listing import Refusal

_INDEX_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Clip:
    """One video or image file with its caption.

    Attributes:
        digest: of the file's content.
    """

    path: Path
    caption: str
    digest: str
    info: ClipInfo


class ClipIndex:
    """Probes clips once: what was learnt of a file is kept under its content's digest.

    Args:
        root: folder of the index, created when something is kept.
        digests: of the files.
    """

    def __init__(self, root: Path, digests: FileDigests) -> None:
        self._root = root
        self._digests = digests

    def read(
        self, captioned: Iterable[tuple[Path, str]], *, advance: Callable[[], None] = lambda: None
    ) -> tuple[list[Clip], list[Refusal]]:
        """Decode every clip that is not known yet, in full, so that damage is found before training.

        Args:
            advance: called after each clip.

        Returns:
            The clips that can be decoded, and the files that can't.
        """

        def look(item: tuple[Path, str]) -> Clip | Refusal:
            path, caption = item
            try:
                digest = self._digests.file(path)
                return Clip(path, caption, digest, self._info(path, digest))
            except OSError as error:
                return Refusal(path, error.strerror or str(error))
            except Unreadable as error:
                return Refusal(path, str(error))
            finally:
                advance()

        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            results = list(pool.map(look, captioned))
        self._digests.save()
        return [r for r in results if isinstance(r, Clip)], [r for r in results if isinstance(r, Refusal)]

    def _info(self, path: Path, digest: str) -> ClipInfo:
        entry = self._root / f"{digest}-{_INDEX_FORMAT}.json"
        known = read_memo(entry)
        if known is not None and "refused" in known and known.get("by") == av.__version__:
            raise Unreadable(known["refused"])
        if known is not None and "refused" not in known:
            return ClipInfo(known["height"], known["width"], tuple(known["timestamps"]))
        try:
            info = probe(path)
        except Unreadable as error:
            write_memo(entry, {"refused": str(error), "by": av.__version__})  # a newer PyAV may read it
            raise
        write_memo(entry, asdict(info))
        return info
