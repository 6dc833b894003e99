"""Blocks whose frozen weights live in host memory: a few buffers on the device, filled ahead of the block that needs them.

The copy in host memory is always right, since nothing trains these weights: they are copied to the device and never back. What is
trained stays on the device. A block's weights are needed twice in a step, forward and where gradient checkpointing computes the
block again; what autograd keeps in between would be overwritten, so a ring goes with gradient checkpointing only.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from crepatrain.config.sections import LoopConfig
from crepatrain.errors import UserError
from crepatrain.placement.flat import Layout, plain_tensors
from crepatrain.placement.host_memory import HostMemory, pinnable_memory, pinned_bytes, pinning
from crepatrain.placement.queues import Queues, queues_of

BUFFERS = 2
"""On the device: one that is read, and one that is filled meanwhile."""


def streamed(depth: int, count: int) -> list[int]:
    """Which blocks live in host memory: evenly spaced, so that those between them give a copy time."""
    return [(2 * number + 1) * depth // (2 * count) for number in range(count)]


_Holders = list[tuple[nn.Module, str]]


def _frozen(block: nn.Module) -> tuple[list[nn.Parameter], list[_Holders]]:
    """The parameters of a block that are not trained, and the modules that hold each, by its name there."""
    found: dict[int, tuple[nn.Parameter, _Holders]] = {}
    for part in block.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                found.setdefault(id(parameter), (parameter, []))[1].append((part, name))
    return [parameter for parameter, _ in found.values()], [holders for _, holders in found.values()]


def frozen_parameters(block: nn.Module) -> list[nn.Parameter]:
    """The parameters of a block that are not trained, as the ring lays them out."""
    return _frozen(block)[0]


class _Streamed:
    """One block of the ring.

    Attributes:
        start: where its weights lie in host memory.
    """

    def __init__(self, block: nn.Module, start: int) -> None:
        self.block, self.start = block, start
        self._here, self._holders = _frozen(block)
        self.layout = Layout(self._here)
        self._away = self.layout.parameters(None)
        self._of_buffer: list[list[nn.Parameter]] = []

    def take_out(self) -> list[nn.Parameter]:
        """The weights as they were loaded; the block has none from here on."""
        here, self._here = self._here, []
        self._set([None] * len(here))
        return here

    def leave(self) -> None:
        """The block's weights are away: whoever uses them finds tensors without values."""
        self._set(self._away)

    def know(self, buffer: Tensor) -> None:
        """The next of the buffers that its weights may be in."""
        self._of_buffer.append(self.layout.parameters(buffer))

    def enter(self, number: int) -> None:
        """The block's weights are in the buffer of that number."""
        self._set(self._of_buffer[number])

    def _set(self, parameters: Sequence[nn.Parameter | None]) -> None:
        for parameter, holders in zip(parameters, self._holders, strict=True):
            for part, name in holders:
                part._parameters[name] = parameter


@dataclass
class _Buffer:
    """A buffer on the device.

    Attributes:
        memory: uint8, as large as the largest block's weights.
        holds: the block whose weights are in it, or will be once what was queued is done.
        free: behind everything that reads what was in it.
        ready: behind the copy of what is in it.
    """

    memory: Tensor
    free: Any
    holds: int | None = None
    ready: Any = None


def ring_of(config: LoopConfig, blocks: nn.ModuleList, device: torch.device) -> "BlockRing | None":
    """The ring of a config's block_offload, for blocks that are not on a device yet; None where it is 0."""
    assert config.block_offload != "auto", "it is chosen before a model is placed"
    if not config.block_offload:
        return None
    return BlockRing([blocks[index] for index in streamed(len(blocks), config.block_offload)], device)


def leave_to_ring(transformer: nn.Module) -> None:
    """Let DistributedDataParallel send no weights around that are in host memory: every process has read the same."""
    away = [name for name, parameter in transformer.named_parameters() if parameter.is_meta]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, away)


class BlockRing:
    """The ring of a transformer's blocks.

    Args:
        blocks: those whose weights live in host memory, in the order in which a forward calls them. Sizes may differ.
        device: where they compute.
        queues: what copies and computes.
        buffers: on the device.
        must_pin: False where host memory that the system does not pin will do, from which copies take longer.

    Raises:
        UserError: weights of a kind that can't be moved so.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        queues: Queues | None = None,
        *,
        buffers: int = BUFFERS,
        must_pin: bool = True,
    ) -> None:
        self._device, self._must_pin = device, must_pin
        self._queues = queues or queues_of(device)
        self._blocks: list[_Streamed] = []
        total = 0
        for block in blocks:
            _expect_movable(block)
            self._blocks.append(_Streamed(block, total))
            total += self._blocks[-1].layout.size
        self._total, self._host = total, None
        self._buffers: list[_Buffer] = []
        self._oldest = list(range(min(buffers, len(blocks))))  # the numbers of the buffers, that which was read longest ago first
        self._reading: int | None = None  # the block that is computing, or was the last to
        self._last = 0

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Within it the blocks lack the weights that the ring has, so that the others can be moved; at its end the ring works.

        Weights on the meta device have no copy in host memory, and their buffers no values.

        Raises:
            UserError: no more memory can be pinned.
        """
        taken = [block.take_out() for block in self._blocks]
        if not any(parameter.is_meta for parameters in taken for parameter in parameters):
            pinned = self._device.type == "cuda" and (self._must_pin or pinned_bytes(self._total) <= pinnable_memory(1))
            self._host = HostMemory(self._total, pinned=pinned, must_pin=self._must_pin)
            for number in range(len(taken)):
                with pinning("block_offload", f"block_offload={len(self._blocks)}", self._total, "lower block_offload"):
                    self._keep(self._blocks[number], taken[number])
                taken[number] = []  # so the host never holds much more than the weights once
        yield
        size = max(block.layout.size for block in self._blocks)
        made = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in self._oldest]
        for memory in made:
            self._queues.fills(memory)
        free = self._queues.mark("compute")  # what had this memory before may still be read by what was queued then
        self._buffers = [_Buffer(memory, free) for memory in made]
        for number, block in enumerate(self._blocks):
            for buffer in self._buffers:
                block.know(buffer.memory)
            block.leave()
            block.block.register_forward_pre_hook(functools.partial(self._before, number), prepend=True)

    @torch.no_grad()
    def _keep(self, block: _Streamed, weights: Sequence[nn.Parameter]) -> None:
        """Put a block's weights into host memory."""
        assert self._host is not None
        whole = torch.empty(block.layout.size, dtype=torch.uint8)
        for view, plain in zip(
            block.layout.views(whole), (plain for each in weights for plain in plain_tensors(each)), strict=True
        ):
            view.copy_(plain)
        for span, offset in self._host.spans(block.start, block.layout.size):
            span.copy_(whole[offset : offset + len(span)])

    def _before(self, number: int, _block: nn.Module, _inputs: Any) -> None:
        """A block is about to compute, in a forward or again in a backward pass."""
        # A copy is no part of what the block computes: selective checkpointing expects the very operators of the forward again.
        with _disable_current_modes():
            self._provide(number)

    def _provide(self, number: int) -> None:
        self._finish()
        buffer = self._buffer_of(number)
        if buffer is None:
            buffer = self._fetch(number, beside=None)
        self._queues.wait("compute", self._buffers[buffer].ready)
        self._queues.reads(self._buffers[buffer].memory)
        self._blocks[number].enter(buffer)
        self._oldest.remove(buffer)
        self._oldest.append(buffer)
        ahead = self._ahead(number)
        self._reading = self._last = number
        if ahead is not None and len(self._buffers) > 1 and self._buffer_of(ahead) is None:
            self._fetch(ahead, beside=buffer)

    def _finish(self) -> None:
        """The block that computed last is done: another begins only when all of its forward, or of its backward, was queued."""
        if self._reading is None:
            return
        block, buffer = self._blocks[self._reading], self._buffer_of(self._reading)
        assert buffer is not None
        self._queues.done(self._buffers[buffer].memory)
        self._buffers[buffer].free = self._queues.mark("compute")
        block.leave()
        self._reading = None

    def _buffer_of(self, number: int) -> int | None:
        return next((index for index, buffer in enumerate(self._buffers) if buffer.holds == number), None)

    def _ahead(self, number: int) -> int | None:
        """The block that will compute next; None where it is here already, or not known."""
        last, gradient = self._last, torch.is_grad_enabled()
        if number and number <= last:  # backward; the last block of a forward is the first that is computed again
            return number - 1
        if number + 1 < len(self._blocks):
            return number + 1
        return None if gradient else 0  # as in the next denoising step of a video

    def _fetch(self, number: int, beside: int | None) -> int:
        """Queue the copy of a block's weights into a buffer whose block is done.

        Args:
            beside: the buffer of the block that is computing.
        """
        index = next(index for index in self._oldest if index != beside)
        buffer, block = self._buffers[index], self._blocks[number]
        self._queues.wait("copies", buffer.free)
        if self._host is not None:
            for span, offset in self._host.spans(block.start, block.layout.size):
                self._queues.copy(buffer.memory[offset : offset + len(span)], span)
        buffer.holds, buffer.ready = number, self._queues.mark("copies")
        return index


def _expect_movable(block: nn.Module) -> None:
    for parameter in frozen_parameters(block):
        kind = type(parameter)
        if kind is not nn.Parameter and not is_traceable_wrapper_subclass(parameter):
            raise UserError(
                f"block_offload: weights of the kind {kind.__name__} can't be moved to host memory",
                "set block_offload to 0, or base_quantization to none, int8 or fp8",
                ("block_offload",),
            )
