"""Damage as a disk makes it: single bits that are another."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """A file with one bit that is another, and of another time; afterwards it is as it was."""
    content = path.read_bytes()
    harmed = bytearray(content)
    harmed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(harmed)
    # The clock of a file system may stand still between two writes.
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))
    try:
        yield
    finally:
        path.write_bytes(content)


def some_bits(path: Path, count: int, seed: int = 0) -> list[int]:
    """Random places in a file, and the first and the last."""
    bits = path.stat().st_size * 8
    return [0, bits - 1, *random.Random(f"{path.name}/{seed}").sample(range(bits), min(count, bits))]


def harm(path: Path) -> None:
    """Flip the lowest bit of the file's last byte for good."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
