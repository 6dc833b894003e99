"""Blocks in host memory, in the estimate: to the byte what a step holds."""

import pytest
import torch
from plans import bucket_of, plans

from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.memory import stages
from crepatrain.memory.estimate import estimate_memory
from crepatrain.memory.offload import BlockSizes, expect_room_on_host
from crepatrain.placement import host_memory
from crepatrain.specs import FAMILIES

CUDA = torch.device("cuda")


@pytest.fixture
def plan_of(tiny_checkpoint, config_file):
    return plans(tiny_checkpoint, config_file)


CASES = [
    pytest.param(family, precision, marks=[pytest.mark.slow] * ((family, precision) != ("wan", "bf16")))
    for family in FAMILIES
    for precision in ("bf16", "no")
]


@pytest.mark.parametrize(("family", "precision"), CASES)
def test_the_account_of_a_ring_is_the_real_one_to_the_byte(plan_of, family, precision):
    resident = plan_of(family, mixed_precision=precision)
    without, sizes = stages.training_stage(resident, bucket_of(resident)), BlockSizes.of(resident)
    for count in (1, len(sizes.resident)):
        plan = plan_of(family, mixed_precision=precision, block_offload=count)
        fake, real = (stages.training_stage(plan, bucket_of(plan), fake=fake) for fake in (True, False))
        assert fake == real
        assert sizes.changed(without, 0, count) == fake
        assert sizes.changed(fake, count, 0) == without


@pytest.mark.slow
def test_the_account_of_a_video_is_the_real_one_to_the_byte(plan_of):
    found = []
    for count in (0, 4):
        plan = plan_of(validation_prompts=["a"], mixed_precision="bf16", block_offload=count)
        fake, real = (stages.sampling_stage(plan, bucket_of(plan), fake=fake) for fake in (True, False))
        assert fake == real
        found.append(fake)
    assert BlockSizes.of(plan).changed(found[0], 0, 4) == found[1]


@pytest.mark.slow
def test_remedies_name_a_number(plan_of):
    depth = plan_of().geometry.depth
    for changes, words in (
        ({}, f"block_offload: {depth}"),
        ({"gradient_checkpointing": False}, f"gradient_checkpointing: true, block_offload: {depth}"),
    ):
        plan = plan_of(crepa_enabled=False, **changes)
        remedies = dict(estimate_memory(plan, [bucket_of(plan)], Screen(quiet=True), what="estimating").remedies)
        taken = plan_of(crepa_enabled=False, block_offload=depth)
        assert remedies[words] == stages.training_stage(taken, bucket_of(taken)).peak
    whole = plan_of(block_offload=depth)
    estimate = estimate_memory(whole, [bucket_of(whole)], Screen(quiet=True), what="estimating")
    assert not [name for name, _ in estimate.remedies if "block_offload" in name]
    assert estimate.on_host == BlockSizes.of(whole).on_host(depth) > 0
    full = plan_of(model_type="full", crepa_enabled=False)
    offered = estimate_memory(full, [bucket_of(full)], Screen(quiet=True), what="estimating").remedies
    assert not [name for name, _ in offered if "block_offload" in name]


def test_host_memory_is_looked_at_before_the_start(plan_of, monkeypatch):
    plan = plan_of(block_offload=4)
    needed = BlockSizes.of(plan).on_host(4)
    spare = host_memory._SPARE
    monkeypatch.setattr(host_memory, "available_memory", lambda: needed + spare)
    expect_room_on_host(plan, bucket_of(plan), CUDA)
    expect_room_on_host(plan_of(), bucket_of(plan), CUDA)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"block_offload=4: .* GiB of host memory .*2 processes") as raised:
        expect_room_on_host(plan, bucket_of(plan), CUDA)
    expect_room_on_host(plan, bucket_of(plan), torch.device("cpu"))
    assert "lower block_offload" in raised.value.problems[0].fix
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(host_memory, "available_memory", lambda: needed + spare - 1)
    with pytest.raises(UserError, match="are available"):
        expect_room_on_host(plan, bucket_of(plan), CUDA)
