"""Pinned host memory: how much of it there may be, and some of it for weights."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor

from crepatrain.errors import UserError

_GIB = 1 << 30
# torch rounds each piece of pinned memory up to a power of two: pieces of that size lose nothing.
_PIECE = _GIB
# What is left for everything else on the machine: readers of clips, Python, the page cache that weights are read through.
_SPARE = 2 * _GIB
_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def pinned_bytes(size: int) -> int:
    """What pinned memory for so many bytes takes."""
    return sum(_pieces(size))


def _pieces(size: int) -> Iterator[int]:
    yield from [_PIECE] * (size // _PIECE)
    if rest := size % _PIECE:
        yield 1 << (rest - 1).bit_length()


class HostMemory:
    """Bytes in host memory, one address space over several allocations, each made when it is first looked at.

    Args:
        pinned: False on a machine without a GPU.
        must_pin: False where memory that the system does not pin is taken as it is.
    """

    def __init__(self, size: int, *, pinned: bool, must_pin: bool = True) -> None:
        self._sizes, self._pinned, self._must_pin = list(_pieces(size)), pinned, must_pin
        self._pieces: list[Tensor | None] = [None] * len(self._sizes)

    def spans(self, start: int, size: int) -> Iterator[tuple[Tensor, int]]:
        """The memory from an address on, in parts that lie in one allocation each, with where each begins behind `start`."""
        end, address = start + size, start
        while address < end:
            piece, offset = self._piece(address // _PIECE), address % _PIECE
            length = min(end - address, _PIECE - offset)
            yield piece[offset : offset + length], address - start
            address += length

    def _piece(self, index: int) -> Tensor:
        piece = self._pieces[index]
        if piece is None:
            piece = self._pieces[index] = self._allocated(self._sizes[index])
        return piece

    def _allocated(self, size: int) -> Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError:
            if not self._pinned or self._must_pin:
                raise
            self._pinned = False
            return self._allocated(size)


@contextlib.contextmanager
def pinning(key: str, setting: str, size: int, fix: str) -> Iterator[None]:
    """Say in words that the system does not pin so much memory.

    Args:
        key: of the config, that needs the memory; setting: as it is set.
        size: bytes that are pinned in all.
        fix: what to do about it.

    Raises:
        UserError: it does not.
    """
    try:
        yield
    except RuntimeError as error:
        needed, reason = pinned_bytes(size) / _GIB, str(error).splitlines()[0]
        raise UserError(
            f"{setting}: the system does not pin {needed:.1f} GiB of host memory ({reason})",
            f"{fix}; Windows' subsystem for Linux pins about half of the machine's memory at most",
            (key,),
        ) from error


def expect_host_memory(settings: Mapping[str, str], size: int, *, processes: int = 1) -> None:
    """Make sure that the machine can pin so much memory, before any of it is taken.

    The limit on locked memory (ulimit -l) is not looked at: CUDA's driver pins memory itself, and no such limit holds for it.

    Args:
        settings: keys of the config that need the memory, as they are set.
        size: bytes that each process pins.
        processes: on this machine.

    Raises:
        UserError: it has not that much.
    """
    needed, room = size * processes, available_memory()
    if needed + _SPARE <= room:
        return
    each = f" ({processes} processes with {size / _GIB:.1f} GiB each)" if processes > 1 else ""
    setting = ", ".join(f"{key}={value}" for key, value in settings.items())
    smaller = [f"set {key} to false" if value == "true" else f"lower {key}" for key, value in settings.items()]
    raise UserError(
        f"{setting}: {needed / _GIB:.1f} GiB of host memory would be pinned{each} and {_SPARE / _GIB:.0f} GiB are left for "
        f"everything else, but {room / _GIB:.1f} GiB are available",
        f"{' or '.join(smaller)}, end other programs, or use a machine with more memory",
        tuple(settings),
    )


def pinnable_memory(processes: int) -> int:
    """Bytes of host memory that each process on this machine can pin, with something left for everything else."""
    return max(0, available_memory() - _SPARE) // processes


def available_memory() -> int:
    """Bytes of host memory that can still be taken: of the machine, or of the container if that has less."""
    free = psutil.virtual_memory().available
    try:
        limit = _CONTAINER.read_text(encoding="ascii").strip()
    except OSError:  # not in a container of that kind
        return free
    return free if limit == "max" else min(free, int(limit))
