"""Finding out whether a file is what was written: digests inside safetensors files, and a list of digests in a folder.

A digest is blake2b over those of a file's pieces, so that the pieces of a large file are hashed side by side. That of a
safetensors file stands in its own header, and is made over the whole file with zeros where it stands.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from crepatrain.files import safetensors_header

DIGEST_KEY = "crepatrain.digest"
MANIFEST_FILE = "manifest.json"
# Of a folder with a manifest; folders of format 1 have none.
MANIFEST_FORMAT = 2

# In the headers of the files that a manifest lists: where it stands, a folder without a manifest has lost it.
LISTED_KEY = "crepatrain.listed"

_PIECE = 8 << 20
_READ = 1 << 18
_BYTES = 32
_NAME = "blake2b:"
_UNKNOWN = f"{_NAME}{'0' * (2 * _BYTES)}"
_DIGEST = re.compile(rf"{_NAME}[0-9a-f]{{{2 * _BYTES}}}")
_AT_ONCE = min(8, os.cpu_count() or 1)


class Damaged(Exception):
    """A file is not what was written. The message says why, without the file's name."""


def content_seal(path: Path, value: str = _UNKNOWN) -> str:
    """The digest of a file's content.

    Args:
        value: what is read as if it was of zeros where a safetensors file's header holds it.

    Raises:
        OSError: the file can't be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = 0 if value == _UNKNOWN else 8 + min(int.from_bytes(file.read(8), "little"), size)
        file.seek(0)
        began = file.read(max(1, -(-header // _PIECE)) * _PIECE)  # whole pieces, as the header may end within one
    began = began[:header].replace(value.encode(), _UNKNOWN.encode()) + began[header:]

    def piece(start: int) -> bytes:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            found, part, left = hashlib.blake2b(digest_size=_BYTES), memoryview(bytearray(min(_READ, _PIECE))), _PIECE
            while left and (count := file.readinto(part[: min(left, len(part))])):  # one small buffer stays in a core's cache
                found.update(part[:count])
                left -= count
            return found.digest()

    pieces = [_hashed(began[at : at + _PIECE]) for at in range(0, len(began), _PIECE)]
    starts = range(len(began), size, _PIECE)
    if len(starts) > 1:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            pieces += pool.map(piece, starts)
    else:
        pieces += map(piece, starts)
    return f"{_NAME}{_hashed(size.to_bytes(8, 'little') + b''.join(pieces)).hex()}"


def _hashed(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_BYTES).digest()


def unsealed(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a safetensors file, with room for its digest; `seal` has to follow."""
    return {**metadata, DIGEST_KEY: _UNKNOWN}


def seal(path: Path) -> None:
    """Put the digest of a safetensors file into it, and its metadata in order, so that equal content makes equal files.

    Args:
        path: of a file with the metadata of `unsealed`.

    Raises:
        OSError: it can't be read or written.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(ordered) == length, path
        file.seek(8)
        file.write(ordered)
    digest = content_seal(path)
    with path.open("r+b") as file:
        file.seek(8)
        file.write(ordered.replace(_UNKNOWN.encode(), digest.encode()))


def sealed_metadata(path: Path) -> dict[str, str] | None:
    """The metadata of a safetensors file, once its digest was found to be right; None of a file that has no digest.

    Raises:
        Damaged: it is another file than the one that was sealed, or no safetensors file.
        OSError: it can't be read.
    """
    header = safetensors_header(path)
    if header is None:
        path.stat()  # of a file that is not there the error says that
        raise Damaged("it is cut off, or no safetensors file")
    metadata = _metadata(header)
    values = [value for value in metadata.values() if isinstance(value, str) and _DIGEST.fullmatch(value)]
    digest = metadata.get(DIGEST_KEY)
    if digest is None and not values:
        return None
    # Where the key or the digest itself is harmed, the other still shows that there was one.
    if digest not in values:
        raise Damaged(f"its {DIGEST_KEY} is damaged")
    if content_seal(path, digest) != digest:
        raise Damaged(f"its content is not the one of its {DIGEST_KEY}")
    return metadata


def _metadata(header: Mapping[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def write_manifest(folder: Path) -> None:
    """List every file of a folder with its digest, in the folder.

    Raises:
        OSError: a file can't be read, or the list not be written.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST_FILE)
    files = {name: content_seal(folder / name) for name in names}
    (folder / MANIFEST_FILE).write_text(_as_text(files), encoding="utf-8")


def expect_listed(folder: Path) -> bool:
    """Hold every file of a folder against its manifest.

    Returns:
        Whether it has one.

    Raises:
        Damaged: with the name of the first file that is not what was written.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        headers = [safetensors_header(file) for file in sorted(folder.glob("*.safetensors"))]
        if any(LISTED_KEY in _metadata(header) for header in headers if header):
            raise Damaged(f"{MANIFEST_FILE} is missing")
        return False
    try:
        raw = path.read_bytes()
        content: Any = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST_FILE} can't be read") from error
    number = content.get("format") if isinstance(content, dict) else None
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or _as_text(files, number).encode() != raw:
        raise Damaged(f"{MANIFEST_FILE} is damaged")
    if number != MANIFEST_FORMAT:
        raise Damaged(f"it is of format {number}, and this version reads {MANIFEST_FORMAT}")
    for name, digest in files.items():
        try:
            found = content_seal(folder / name)
        except (OSError, ValueError) as error:
            raise Damaged(f"{name} can't be read ({getattr(error, 'strerror', None) or error})") from error
        if found != digest:
            raise Damaged(f"the content of {name} is not the one in {MANIFEST_FILE}")
    return True


def _as_text(files: Mapping[str, Any], number: Any = MANIFEST_FORMAT) -> str:
    return json.dumps({"format": number, "files": files}, indent=2) + "\n"
