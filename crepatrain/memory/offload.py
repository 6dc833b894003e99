"""What block_offload saves on the device, and what it and checkpoint_offload take on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from crepatrain.config.plan import Plan
from crepatrain.data.buckets import Bucket
from crepatrain.memory.account import allocated_bytes
from crepatrain.memory.stages import Stage, empty_trained
from crepatrain.placement.block_inputs import host_bytes
from crepatrain.placement.flat import Layout, plain_tensors
from crepatrain.placement.host_memory import expect_host_memory, pinned_bytes
from crepatrain.placement.precision import weights_dtype
from crepatrain.placement.processes import local_processes
from crepatrain.placement.ring import BUFFERS, frozen_parameters, streamed
from crepatrain.training.build import build_family


@dataclass(frozen=True)
class BlockSizes:
    """Bytes of the frozen weights of every block.

    Attributes:
        resident: as the allocator holds them; laid_out: as the ring lays them out.
    """

    resident: Sequence[int]
    laid_out: Sequence[int]

    @classmethod
    def of(cls, plan: Plan) -> "BlockSizes":
        """Of a plan's transformer, without loading it."""
        frozen = [frozen_parameters(block) for block in build_family(plan).blocks(empty_trained(plan)["transformer"])]
        plain = [[plain for each in parameters for plain in plain_tensors(each)] for parameters in frozen]
        return cls([allocated_bytes(each) for each in plain], [Layout(each).size for each in frozen])

    def saved(self, count: int) -> int:
        """Bytes of the device that a ring of so many blocks saves."""
        if not count:
            return 0
        chosen = streamed(self.depth, count)
        largest = max(self.laid_out[index] for index in chosen)
        buffers = min(BUFFERS, count) * (-(-largest // 512) * 512)
        return sum(self.resident[index] for index in chosen) - buffers

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self.resident)

    def moved(self, count: int) -> int:
        """Bytes that it copies to the device in a forward pass."""
        return sum(self.laid_out[index] for index in streamed(self.depth, count))

    def on_host(self, count: int) -> int:
        """Bytes of the host that it takes."""
        return pinned_bytes(self.moved(count))

    def changed(self, stage: Stage, before: int, after: int) -> Stage:
        """A stage with another number of blocks in host memory, which is all that this changes."""
        weights = stage.by_owner["transformer"] + self.saved(before) - self.saved(after)
        return replace(stage, by_owner={**stage.by_owner, "transformer": weights})


def inputs_on_host(plan: Plan, bucket: Bucket) -> int:
    """Bytes of the host that checkpoint_offload takes for clips of a size, at most; 0 where it is off.

    With model_type full some families compute hidden states in bf16 from weights in fp32, and need half.
    """
    if not plan.config.loop.checkpoint_offload:
        return 0
    tokens = plan.geometry.token_grid(bucket.frames, bucket.height, bucket.width).tokens
    numbers = plan.config.loop.train_batch_size * tokens * plan.geometry.width
    return pinned_bytes(host_bytes(plan.geometry.depth, numbers * weights_dtype(plan.config).itemsize))


def expect_room_on_host(plan: Plan, bucket: Bucket, device: torch.device) -> None:
    """Make sure, before anything is cached, that the host memory of block_offload and checkpoint_offload can be had.

    On a CPU weights and activations are in host memory anyway.

    Args:
        bucket: the largest clips.

    Raises:
        UserError: it can't.
    """
    count = plan.config.loop.block_offload
    assert count != "auto"
    needed = {
        "block_offload": BlockSizes.of(plan).on_host(count) if count else 0,
        "checkpoint_offload": inputs_on_host(plan, bucket),
    }
    if any(needed.values()) and device.type == "cuda":
        settings = {key: str(plan.config.value(key)).lower() for key, size in needed.items() if size}
        expect_host_memory(settings, sum(needed.values()), processes=local_processes())
