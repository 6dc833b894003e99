"""What is known of every clip of a dataset: found out once, by decoding it in full."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av

from crepatrain.data.clip import Clip, ClipInfo, Rule, Unreadable
from crepatrain.data.decode import probe
from crepatrain.data.digests import FileDigests, read_memo, write_memo
from crepatrain.data.listing import Refusal
from crepatrain.data.watched import PATIENCE, Beat, GivenUp, read_ahead

# Raised whenever what an entry says of a file is found out in another way. 2: frames are counted and marked by PyAV alone.
_INDEX_FORMAT = 2


class ClipIndex:
    """Probes clips once: what was learnt of a file is kept under its content's digest.

    Args:
        root: folder of the index, created when something is kept.
        digests: of the files.
        patience: seconds without a sign of life after which the reading of a file is given up.
    """

    def __init__(self, root: Path, digests: FileDigests, patience: float = PATIENCE) -> None:
        self._root = root
        self._digests = digests
        self._patience = patience

    def read(
        self, captioned: Sequence[tuple[Path, str, Rule]], *, advance: Callable[[], None] = lambda: None
    ) -> tuple[list[Clip], list[Refusal]]:
        """Decode every clip that is not known yet, in full, so that damage is found before training.

        Args:
            advance: called after each clip.

        Returns:
            The clips that can be decoded, and the files that can't.
        """

        def look(item: tuple[Path, str, Rule], beat: Beat) -> Clip:
            path, caption, rule = item
            digest = self._digests.file(path, beat)
            return Clip(path, caption, digest, self._info(path, digest, beat), rule)

        clips: list[Clip] = []
        refused: list[Refusal] = []
        try:
            for (path, *_), looking in read_ahead(look, captioned, at_once=min(4, os.cpu_count() or 1)):
                try:
                    clips.append(looking.result(self._patience))
                except Unreadable as error:
                    refused.append(Refusal(path, str(error)))
                except OSError as error:
                    remedy = "see that it can be read, and run the command again"
                    refused.append(Refusal(path, error.strerror or str(error), remedy))
                except GivenUp:
                    reason = f"reading it was given up: nothing came for {self._patience:g} seconds"
                    refused.append(Refusal(path, reason, "see whether its disk answers, or copy it to another one"))
                advance()
        finally:
            self._digests.save()
        return clips, refused

    def _info(self, path: Path, digest: str, beat: Beat) -> ClipInfo:
        entry = self._root / f"{digest}-{_INDEX_FORMAT}.json"
        known = read_memo(entry)
        # Another PyAV may read what this one refuses, and may round colours in another way.
        if known is not None and known.get("by") == av.__version__:
            if "refused" in known:
                raise Unreadable(known["refused"])
            return _info_of(known["info"])
        try:
            info = probe(path, beat)
        except Unreadable as error:
            write_memo(entry, {"refused": str(error), "by": av.__version__})
            raise
        write_memo(entry, {"info": asdict(info), "by": av.__version__})
        return info


def _info_of(known: dict[str, Any]) -> ClipInfo:
    lists = {name: tuple(known[name]) for name in ("timestamps", "pts", "marks")}
    return ClipInfo(known["height"], known["width"], still=known["still"], **lists)
