"""The inputs of checkpointed blocks, which wait in host memory for the backward pass.

Gradient checkpointing keeps what each block was given. Most of that are the hidden states, a tensor for every block; captions,
timesteps and positions are the same tensors for all blocks, and stay. Here the hidden states are copied to host memory while
their block computes, and back while the backward pass is in the block behind it.

Two queues work on one memory, so what must be true of the order is made so, and left to no allocator:

- A tensor that is copied to the host is held here until compute waits for its copy. What is computed next may then have its
  memory. `record_stream` would also be safe, but frees memory when the host sees that a copy has ended, and not in the order of
  the work: a host that is ahead of the GPU, as it is in training, would find none of it free.
- Memory for a tensor that comes back is compute's, and may still be read by what was given to it before. So its copy waits for a
  mark that is made behind the allocation.
- Host memory is written and read by the queue of copies alone, which does this in order.
- A tensor that was fetched, and that nobody asks for, is given up behind its copy.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.autograd.graph import saved_tensors_hooks

from crepatrain.placement.host_memory import HostMemory, pinning
from crepatrain.placement.queues import Queues, queues_of


def host_bytes(depth: int, hidden: int) -> int:
    """Bytes of host memory for the inputs of so many blocks.

    Args:
        hidden: bytes of one block's.
    """
    return (depth - 1) * hidden  # the last block's are needed again at once


class _Room:
    """Host memory with a place for each block's hidden states.

    Attributes:
        hidden: bytes of a place.
        free: the numbers of the places that nobody has.
    """

    def __init__(self, places: int, hidden: int, *, pinned: bool) -> None:
        self.hidden, size = hidden, places * hidden
        with pinning("checkpoint_offload", "checkpoint_offload=true", size, "set checkpoint_offload to false"):
            self._memory = HostMemory(size, pinned=pinned)
            list(self._memory.spans(0, size))  # made now rather than beside the work of the first step
        self.free = list(range(places))

    def parts(self, place: int, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A place in parts, uint8, each with its part of a tensor's bytes."""
        flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        for span, offset in self._memory.spans(place * self.hidden, len(flat)):
            yield span, flat[offset : offset + len(span)]


class _Away:
    """The hidden states of a block that are in host memory; who keeps them keeps the place there.

    Attributes:
        before: gives those of the block before it, which the backward pass needs next, if they are away and needed.
        fetched: on the device again, with the mark behind the copy.
    """

    def __init__(self, like: Tensor, room: _Room | None, queues: Queues, before: Callable[[], "_Away | None"]) -> None:
        self.size, self.stride, self.dtype, self.device = like.size(), like.stride(), like.dtype, like.device
        self.room, self.place = room, room.free.pop() if room else 0
        self.before = before
        self.fetched: tuple[Tensor, Any] | None = None
        self._queues = queues

    def parts(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """As those of its room, if it has values."""
        return self.room.parts(self.place, tensor) if self.room else iter(())

    def __del__(self) -> None:
        if self.room:
            self.room.free.append(self.place)
        if self.fetched:
            self._queues.wait("compute", self.fetched[1])
            self._queues.freed(self.fetched[0])


def _nothing() -> None:
    return None


class BlockInputs:
    """The hidden states that a transformer's blocks are given, in host memory from their forward to their backward.

    Args:
        blocks: in the order in which a forward calls them.
        device: where they compute.
        queues: what copies and computes.
        values: False for a transformer without values, whose hidden states take no memory of the host.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], device: torch.device, queues: Queues | None = None, *, values: bool = True
    ) -> None:
        self._numbers = {id(block): number for number, block in enumerate(blocks)}
        self._pinned, self._values = device.type == "cuda", values
        self._queues = queues or queues_of(device)
        self._room: _Room | None = None
        self._last: Callable[[], _Away | None] = _nothing  # what was sent last, if it is still needed
        self._leaving: tuple[Tensor, Any] | None = None  # what is copied to the host, and the mark behind it

    @contextlib.contextmanager
    def of(self, block: nn.Module, hidden: Tensor) -> Iterator[None]:
        """What gradient checkpointing keeps of a block's hidden states within this goes to host memory.

        The last block's stay, as the backward pass begins with them, and so do those of blocks that are not among these.
        """
        self._let_go()
        number, before = self._numbers.get(id(block)), self._last
        if number is None:
            yield
            return
        last, storage = number == len(self._numbers) - 1, hidden.untyped_storage()._cdata

        def pack(tensor: Tensor) -> Tensor | _Away:
            # What autograd hands over is another tensor object of the same memory.
            if last or tensor.untyped_storage()._cdata != storage:
                return tensor
            away = self._send(tensor, before if number else _nothing)
            self._last = weakref.ref(away)
            return away

        def unpack(kept: Tensor | _Away) -> Tensor:
            if isinstance(kept, _Away):
                return self._bring(kept)
            if last:
                self._fetch_ahead(before())
            return kept

        with saved_tensors_hooks(pack, unpack):
            yield

    @torch.no_grad()
    def _send(self, hidden: Tensor, before: Callable[[], _Away | None]) -> _Away:
        hidden = hidden.detach()  # whose graph is not held with it
        assert is_non_overlapping_and_dense_or_false(hidden), hidden.stride()
        away = _Away(hidden, self._room_for(hidden.nbytes), self._queues, before)
        self._queues.written(hidden)
        self._queues.wait("copies", self._queues.mark("compute"))
        for there, here in away.parts(hidden):
            self._queues.copy(there, here)
        self._leaving = hidden, self._queues.mark("copies")
        return away

    def _let_go(self) -> None:
        """Give up what was copied to the host, behind its copy, which has had the time of a block."""
        if self._leaving is None:
            return
        hidden, copied = self._leaving
        self._queues.wait("compute", copied)
        self._queues.freed(hidden)
        self._leaving = None

    @torch.no_grad()
    def _bring(self, away: _Away) -> Tensor:
        """The hidden states on the device, for the block that is computed again; those of the block before it will follow."""
        self._fetch_ahead(away)
        assert away.fetched is not None
        (hidden, copied), away.fetched = away.fetched, None
        self._queues.wait("compute", copied)
        self._queues.reads(hidden)
        self._fetch_ahead(away.before())
        return hidden

    @torch.no_grad()
    def _fetch_ahead(self, away: _Away | None) -> None:
        """Queue the copy to the device, if that was not done yet."""
        if away is None or away.fetched:
            return
        hidden = torch.empty_strided(away.size, away.stride, dtype=away.dtype, device=away.device)
        self._queues.done(hidden)  # what had this memory before
        self._queues.wait("copies", self._queues.mark("compute"))
        for there, here in away.parts(hidden):
            self._queues.copy(here, there)
        away.fetched = hidden, self._queues.mark("copies")

    def _room_for(self, hidden: int) -> _Room | None:
        """Host memory with a free place of so many bytes: one that was used before, where it is large enough.

        All places of a forward are taken one after the other and are free again behind its backward. So another is made only for
        larger clips, or for a forward whose backward never came.
        """
        if not self._values:
            return None
        room, places = self._room, len(self._numbers) - 1
        if room is None or not room.free or room.hidden < hidden:
            self._room = None  # before there is another
            self._room = room = _Room(places, hidden, pinned=self._pinned)
        return room
