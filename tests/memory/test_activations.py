"""Fewer activations on the device, in the estimate: to the byte what a step holds, and what is asked of the host."""

import pytest
import torch
from plans import bucket_of, plans

from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.memory import stages
from crepatrain.memory.account import StorageAccount
from crepatrain.memory.choosing import Chooser
from crepatrain.memory.estimate import estimate_memory
from crepatrain.memory.offload import BlockSizes, expect_room_on_host, inputs_on_host
from crepatrain.placement import block_inputs, host_memory
from crepatrain.placement.checkpointing import checkpoint_blocks
from crepatrain.placement.host_memory import HostMemory, pinned_bytes
from crepatrain.specs import FAMILIES

CUDA, SLOW = torch.device("cuda"), pytest.mark.slow
LARGE = {"crepa_enabled": False, "height": 256, "width": 256}


@pytest.fixture
def plan_of(tiny_checkpoint, config_file):
    return plans(tiny_checkpoint, config_file)


@pytest.mark.parametrize("family", [pytest.param(name, marks=[SLOW] * (name != "wan")) for name in FAMILIES])
def test_what_is_saved(plan_of, family):
    def step(**changes):
        plan = plan_of(family, **LARGE, **changes)
        return stages.training_stage(plan, bucket_of(plan))

    def activations(stage):  # the more blocks have their gradients, the fewer inputs are left: those are not looked at
        return stage.by_owner.get("activations", 0) + stage.by_owner.get("temporaries", 0)

    plan = plan_of(family, **LARGE)
    hidden, depth = plan.grid.tokens * plan.geometry.width * 4, plan.geometry.depth
    without, offloaded, nested = step(), step(checkpoint_offload=True), step(nested_checkpointing=True)
    both = step(checkpoint_offload=True, nested_checkpointing=True)
    saved = activations(without) - activations(offloaded)
    assert saved == (depth - 2) * hidden, "the last block's are there, and the next one's"
    assert nested.allocated < without.allocated - 3 * hidden
    assert both.allocated < min(nested.allocated, offloaded.allocated) - 3 * hidden


@pytest.mark.parametrize("family", [pytest.param(name, marks=[SLOW] * (name != "wan")) for name in FAMILIES])
@pytest.mark.parametrize("changes", [{"mixed_precision": "bf16"}, {"train_batch_size": 2}, {"model_type": "full"}], ids=str)
def test_the_host_memory_of_a_step_is_the_estimate(plan_of, monkeypatch, family, changes):
    sizes: list[int] = []

    class Counted(HostMemory):
        def __init__(self, size, *, pinned: bool):
            sizes.append(pinned_bytes(size))
            super().__init__(size, pinned=pinned)

    monkeypatch.setattr(block_inputs, "HostMemory", Counted)
    plan = plan_of(family, checkpoint_offload=True, **changes)
    step = stages.TrainingStep(plan, bucket_of(plan))
    with StorageAccount() as account:
        step.place(account)
    assert not sizes, "a transformer without values takes none"
    inputs = block_inputs.BlockInputs(step._family.blocks(step._trained["transformer"]), torch.device("cpu"))

    checkpoint_blocks(plan.config.loop, step._family, step._trained["transformer"], inputs)
    step.run(StorageAccount())
    assert sizes == [inputs_on_host(plan, bucket_of(plan))]


def test_nothing_is_asked_of_the_host_without_it(plan_of):
    plan = plan_of()
    assert inputs_on_host(plan, bucket_of(plan)) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"gradient_checkpointing": False}, marks=SLOW),
        pytest.param({"gradient_checkpointing": "selective"}, marks=SLOW),
        pytest.param({"checkpoint_offload": True, "block_offload": 4}, marks=SLOW),
    ],
    ids=str,
)
def test_remedies_are_the_estimates_of_the_configs_that_take_them(plan_of, changes):
    plan = plan_of(**LARGE, **changes)
    estimate = estimate_memory(plan, [bucket_of(plan)], Screen(quiet=True), what="estimating")
    remedies, depth = dict(estimate.remedies), plan.geometry.depth
    tried = 0
    for nested, offload, blocks in ((0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)):
        taken = {"checkpoint_offload": True} if offload else {}
        taken |= {"nested_checkpointing": True} if nested else {}
        if nested or not plan.config.loop.gradient_checkpointing:
            taken |= {"gradient_checkpointing": True}
        taken |= {"block_offload": depth} if blocks else {}
        values = dict(plan.config.loop)
        words = ", ".join(f"{key}: {str(value).lower()}" for key, value in taken.items() if values[key] != value)
        other = plan_of(**LARGE | changes | taken)
        if words in remedies:
            tried += 1
            assert remedies[words] == stages.training_stage(other, bucket_of(other)).peak, words
    assert tried == (3 if "checkpoint_offload" in changes else 4)
    least = plan_of(
        **LARGE | changes | {"checkpoint_offload": True, "nested_checkpointing": True, "gradient_checkpointing": True}
    )
    offered = estimate_memory(least, [bucket_of(least)], Screen(quiet=True), what="estimating").remedies
    assert not [name for name, _ in offered if "checkpoint_offload" in name or "nested" in name]


def test_compiled_blocks_are_offered_what_they_can_take(plan_of):
    plan = plan_of(**LARGE, compile=True)
    offered = dict(estimate_memory(plan, [bucket_of(plan)], Screen(quiet=True), what="estimating").remedies)
    assert "checkpoint_offload: true" in offered
    assert not [name for name in offered if "nested" in name]


def test_host_memory_is_looked_at_before_the_start(plan_of, monkeypatch):
    plan = plan_of(block_offload=4, checkpoint_offload=True)
    of_inputs = inputs_on_host(plan, bucket_of(plan))
    needed = BlockSizes.of(plan).on_host(4) + of_inputs
    spare = host_memory._SPARE
    monkeypatch.setattr(host_memory, "available_memory", lambda: needed + spare)
    expect_room_on_host(plan, bucket_of(plan), CUDA)
    monkeypatch.setattr(host_memory, "available_memory", lambda: needed + spare - 1)
    with pytest.raises(UserError, match=r"block_offload=4, checkpoint_offload=true: .* of host memory would be pinned") as raised:
        expect_room_on_host(plan, bucket_of(plan), CUDA)
    assert "lower block_offload or set checkpoint_offload to false" in raised.value.problems[0].fix
    assert raised.value.problems[0].keys == ("block_offload", "checkpoint_offload")
    expect_room_on_host(plan, bucket_of(plan), torch.device("cpu"))
    alone = plan_of(checkpoint_offload=True)
    monkeypatch.setattr(host_memory, "available_memory", lambda: of_inputs + spare - 1)
    with pytest.raises(UserError, match=r"^checkpoint_offload=true: "):
        expect_room_on_host(alone, bucket_of(alone), CUDA)


def test_blocks_are_chosen_for_what_the_inputs_leave_of_the_host(plan_of):
    plan = plan_of(block_offload="auto", checkpoint_offload=True, crepa_enabled=False)
    depth, sizes = plan.geometry.depth, BlockSizes.of(plan)
    chooser = Chooser(plan, plan.open_keys, bucket_of(plan))
    host = sizes.on_host(depth) + inputs_on_host(plan, bucket_of(plan))
    assert chooser.choose(1, host).values == {"block_offload": depth}
    assert chooser.choose(1, host).on_host == host
    assert chooser.choose(1, sizes.on_host(depth)).values["block_offload"] < depth
