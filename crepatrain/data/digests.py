"""What a file's content is, without reading it again while its size and time stay the same."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crepatrain.errors import UserError
from crepatrain.files import written_aside

_PIECE = 1 << 20


class FileDigests:
    """Content digests of files and folders, remembered across runs.

    Args:
        memo: the JSON file that remembers them.
    """

    def __init__(self, memo: Path) -> None:
        self._memo = memo
        self._known: dict[str, str] = read_memo(memo) or {}
        self._changed = False

    def file(self, path: Path, beat: Callable[[], None] = lambda: None) -> str:
        """Of one file's content.

        Args:
            beat: called after each piece that was read.
        """
        real = path.resolve()
        stat = real.stat()
        stamp = f"{real}|{stat.st_size}|{stat.st_mtime_ns}"
        if stamp not in self._known:
            self._known[stamp] = content_digest(real, beat)
            self._changed = True
        return self._known[stamp]

    def folder(self, path: Path) -> str:
        """Of all JSON, text and safetensors files right inside a folder, names included."""
        files = sorted(file for file in path.iterdir() if file.suffix in {".json", ".txt", ".model", ".safetensors"})
        lines = [f"{file.name} {self.file(file)}" for file in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def save(self) -> None:
        """Remember what was learnt."""
        if self._changed:
            write_memo(self._memo, self._known)
            self._changed = False


def content_digest(path: Path, beat: Callable[[], None] = lambda: None) -> str:
    """Of one file, read in full.

    Args:
        beat: called after each piece that was read.
    """
    real = path.resolve()
    if real.parent.name == "blobs":  # the hub's cache names a file by its content
        return real.name
    digest = hashlib.sha256()
    with real.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            beat()
    return digest.hexdigest()


def read_memo(path: Path) -> dict[str, Any] | None:
    """What a small file remembers; None where it is not there or damaged, and what it held has to be found out again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write_memo(path: Path, content: Any) -> None:
    """Remember something in a small file.

    Raises:
        UserError: the disk is full or can't be written to.
    """
    try:
        with written_aside(path) as aside:
            aside.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror})", "free disk space, or set cache_dir") from error
