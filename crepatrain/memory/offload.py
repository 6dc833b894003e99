"""What block_offload saves on the device and takes on the host, and the number that a card needs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from crepatrain.config.plan import Plan
from crepatrain.data.buckets import Bucket
from crepatrain.errors import UserError
from crepatrain.memory.account import allocated_bytes
from crepatrain.memory.stages import GIB, Stage, empty_trained, sampling_stage, training_stage
from crepatrain.placement.flat import Layout, plain_tensors
from crepatrain.placement.host_memory import expect_host_memory, pinned_bytes
from crepatrain.placement.ring import BUFFERS, frozen_parameters, streamed
from crepatrain.screen import Screen
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
        chosen = streamed(len(self.resident), count)
        largest = max(self.laid_out[index] for index in chosen)
        buffers = min(BUFFERS, count) * (-(-largest // 512) * 512)
        return sum(self.resident[index] for index in chosen) - buffers

    def on_host(self, count: int) -> int:
        """Bytes of the host that it takes."""
        return pinned_bytes(sum(self.laid_out[index] for index in streamed(len(self.laid_out), count)))

    def changed(self, stage: Stage, before: int, after: int) -> Stage:
        """A stage with another number of blocks in host memory, which is all that this changes."""
        weights = stage.by_owner["transformer"] + self.saved(before) - self.saved(after)
        return replace(stage, by_owner={**stage.by_owner, "transformer": weights})

    def smallest(self, stages: Sequence[Stage], before: int, room: int) -> int | None:
        """The smallest number with which all stages fit into so many bytes; None where none does."""
        numbers = [0, *range(BUFFERS + 1, len(self.resident) + 1)]  # the buffers hold as many blocks as there are of them
        return next((n for n in numbers if all(self.changed(stage, before, n).peak <= room for stage in stages)), None)


def choose_offload(plan: Plan, bucket: Bucket, room: int | None, screen: Screen) -> Plan:
    """The plan with a number where block_offload is auto.

    Args:
        bucket: the largest clips.
        room: bytes of the GPU that can be used; None: there is none.

    Raises:
        UserError: the model's step can't run on fake tensors, so that nothing is known of it.
    """
    if plan.config.loop.block_offload != "auto":
        return plan
    without = _with_number(plan, 0)
    if room is None:
        screen.note("block_offload: auto is taken as 0, as there is no GPU here")
        return without
    try:
        stages = [training_stage(without, bucket)]
        if plan.config.validation.validation_prompts:
            stages.append(sampling_stage(without, Bucket(*plan.size)))
    except UserError as error:
        raise UserError(f"block_offload=auto: {error.problems[0].what}", "give a number", ("block_offload",)) from error
    sizes = BlockSizes.of(without)
    depth = len(sizes.resident)
    found = sizes.smallest(stages, 0, room)
    count = depth if found is None else found
    peak = max(sizes.changed(stage, 0, count).peak for stage in stages)
    verdict = "which is more than there is: the rehearsal will tell" if found is None else f"of {room / GIB:.1f} GiB"
    host = f", and {sizes.on_host(count) / GIB:.1f} GiB of host memory" if count else ""
    screen.say(f"block_offload: auto is {count} of {depth} blocks: {peak / GIB:.1f} GiB {verdict}{host}")
    return _with_number(plan, count)


def _with_number(plan: Plan, count: int) -> Plan:
    return replace(plan, config=plan.config.changed(block_offload=count))


def expect_room_on_host(plan: Plan, device: torch.device) -> None:
    """Make sure, before anything is cached, that the host memory of block_offload can be had.

    On a CPU the weights are in host memory anyway.

    Raises:
        UserError: it can't.
    """
    count = plan.config.loop.block_offload
    assert count != "auto"
    if count and device.type == "cuda":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        expect_host_memory("block_offload", f"block_offload={count}", BlockSizes.of(plan).on_host(count), processes=processes)
