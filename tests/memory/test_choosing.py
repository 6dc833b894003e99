"""What `memory: auto` and `block_offload: auto` choose: the settings that cost the least time of those that fit."""

from typing import Any

import pytest
from common import Listening
from plans import bucket_of, plans

from crepatrain.commands.dryrun import fits
from crepatrain.config.memory_checks import MEMORY_KEYS
from crepatrain.config.plan import Plan
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.memory import choosing, stages
from crepatrain.memory.choosing import Chooser, choose_memory
from crepatrain.memory.estimate import estimate_memory
from crepatrain.memory.offload import BlockSizes

EVERYTHING = 1 << 50


@pytest.fixture
def plan_of(tiny_checkpoint, config_file):
    return plans(tiny_checkpoint, config_file)


class Chosen:
    """What is chosen for a plan, card by card: what was estimated for one is known for the next."""

    def __init__(self, plan: Plan) -> None:
        self._chooser = Chooser(plan, plan.open_keys, bucket_of(plan))

    def __call__(self, room: int, host: int | None = None) -> dict[str, Any]:
        return dict(self._chooser.choose(room, host).values)


def chosen(plan: Plan, room: int | None, host: int | None = None) -> dict[str, Any]:
    config = choose_memory(plan, bucket_of(plan), room, host, Screen(quiet=True)).config.loop
    return {key: getattr(config, key) for key in plan.open_keys}


def peak_with(plan_of, **settings: Any) -> int:
    plan = plan_of(**settings)
    return stages.training_stage(plan, bucket_of(plan)).peak


def test_block_offload_alone_is_the_smallest_number_that_fits(plan_of):
    plan, resident = plan_of(block_offload="auto"), plan_of()
    depth = resident.geometry.depth
    peaks = {count: peak_with(plan_of, block_offload=count) for count in (0, 3, depth)}
    assert peaks[depth] < peaks[3] < peaks[0]
    within = Chosen(plan)
    for count, peak in peaks.items():
        assert within(peak) == {"block_offload": count}
    assert within(peaks[3] - 1) == {"block_offload": 4}
    assert chosen(plan, 1) == within(1) == {"block_offload": depth}, "the rehearsal says that nothing fits"
    assert chosen(plan, None) == {"block_offload": 0}
    assert choose_memory(resident, bucket_of(plan), None, None, Screen(quiet=True)) is resident


USUAL = {"block_offload": 0, "checkpoint_offload": False, "nested_checkpointing": False, "base_quantization": "none"}


@pytest.mark.slow
def test_the_cheapest_in_time_comes_first(plan_of):
    plan, depth = plan_of(memory="auto"), plan_of().geometry.depth
    assert plan.open_keys == MEMORY_KEYS
    rungs = [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": "selective"},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": "selective", "block_offload": depth},
        {"gradient_checkpointing": True, "block_offload": depth},
        {"gradient_checkpointing": True, "block_offload": depth, "checkpoint_offload": True},
        {"gradient_checkpointing": True, "block_offload": depth, "checkpoint_offload": True, "nested_checkpointing": True},
    ]
    peaks = [peak_with(plan_of, **rung) for rung in rungs]
    assert peaks == sorted(set(peaks), reverse=True), "each of them saves something here"
    within = Chosen(plan)
    for rung, peak in zip(rungs, peaks, strict=True):
        found = within(peak)
        assert {**found, "block_offload": depth if found["block_offload"] else 0} == USUAL | rung
    assert within(peaks[0] - 1) == within(peaks[1])
    assert within(1) == USUAL | rungs[-1], "the rehearsal says that nothing fits"


@pytest.mark.slow
def test_what_is_set_stays(plan_of):
    plan = plan_of(
        memory="auto", gradient_checkpointing=True, block_offload=0, checkpoint_offload=False, nested_checkpointing=False
    )
    assert plan.open_keys == {"base_quantization"}
    assert chosen(plan, EVERYTHING) == {"base_quantization": "none"}
    plan = plan_of(memory="auto", gradient_checkpointing="selective", base_quantization="int8", block_offload="auto")
    assert plan.open_keys == {"block_offload", "checkpoint_offload", "nested_checkpointing"}
    within, depth = Chosen(plan), plan.geometry.depth
    assert within(EVERYTHING) == {"block_offload": 0, "checkpoint_offload": False, "nested_checkpointing": False}
    assert within(1) == {"block_offload": depth, "checkpoint_offload": True, "nested_checkpointing": False}


@pytest.mark.slow
def test_what_can_not_be_is_not_chosen(plan_of):
    full = plan_of(memory="auto", model_type="full", crepa_enabled=False)
    least = {"gradient_checkpointing": True, "checkpoint_offload": True, "nested_checkpointing": True}
    assert chosen(full, 1) == USUAL | least, "weights that are trained stay on the GPU"
    within = Chosen(plan_of(memory="auto", compile=True))
    assert within(peak_with(plan_of, gradient_checkpointing="selective"))["gradient_checkpointing"] is True
    assert within(1)["nested_checkpointing"] is False


@pytest.mark.slow
def test_a_machine_without_the_host_memory_quantises(plan_of):
    off = {"checkpoint_offload": False, "nested_checkpointing": False}
    plan = plan_of(memory="auto", mixed_precision="bf16", gradient_checkpointing=True, **off)
    depth = plan.geometry.depth
    sizes, halved = (BlockSizes.of(plan_of(mixed_precision="bf16", base_quantization=how)) for how in ("none", "int8"))
    room, host = peak_with(plan_of, mixed_precision="bf16", block_offload=depth), sizes.on_host(depth)
    within = Chosen(plan)
    assert within(room, host) == {"block_offload": depth, "base_quantization": "none"}
    assert within(1, host) == within(1) == within(room, host), "numbers change for want of host memory alone"
    assert halved.on_host(depth) < host - 1
    found = within(peak_with(plan_of, mixed_precision="bf16", base_quantization="int8", block_offload=depth), host - 1)
    assert found["base_quantization"] == "int8"
    assert 0 < found["block_offload"] <= depth
    assert within(1, 0) == {"block_offload": 0, "base_quantization": "int8"}, "nothing has room on the host"


@pytest.mark.slow
def test_cards_share_what_was_estimated(plan_of, monkeypatch):
    plan, made = plan_of(), []

    def counted(*arguments: Any) -> stages.Stage:
        made.append(arguments)
        return stages.training_stage(*arguments)

    monkeypatch.setattr(choosing, "training_stage", counted)
    chooser = Chooser(plan, MEMORY_KEYS, bucket_of(plan))
    for room in (EVERYTHING, 1, EVERYTHING, 1):
        chooser.choose(room, None)
    assert len(made) == 5, "three ways to checkpoint, inputs in host memory, parts alone"


@pytest.mark.slow
def test_it_says_what_it_chose_and_what_that_costs(plan_of):
    plan, screen = plan_of(memory="auto"), Listening()
    choose_memory(plan, bucket_of(plan), 1, None, screen)
    words = screen.lists["memory: auto"]
    assert "copied to the GPU" in words[f"block_offload: {plan.geometry.depth}"]
    assert "to host memory and back" in words["checkpoint_offload: true"]
    assert words["nested_checkpointing: true"]
    assert words["host memory"].endswith("GiB, pinned")
    assert "base_quantization: none" not in words, "what costs nothing is not spoken of"
    assert words["gradient_checkpointing: true"]
    assert "gradient_checkpointing: selective" in words["not enough"]
    assert "more than" in words["needed"]


def test_without_an_estimate_it_says_so(plan_of):
    nabla = {"height": 128, "width": 128, "compile": True}
    for changes, fix in (({"block_offload": "auto"}, "give block_offload a number"), ({"memory": "auto"}, "memory to manual")):
        plan = plan_of("kandinsky5_video", "tiny-nabla", **nabla, **changes)
        with pytest.raises(UserError, match=r"auto: no estimate") as raised:
            chosen(plan, 1 << 30)
        assert fix in raised.value.problems[0].fix


@pytest.mark.slow
def test_what_would_fit_is_said_of_a_config_that_does_not(plan_of):
    plan, screen = plan_of(), Listening()
    depth = plan.geometry.depth
    needed = peak_with(plan_of, block_offload=depth)
    estimate = estimate_memory(plan, [bucket_of(plan)], Screen(quiet=True), what="estimating")
    for gigabytes in (needed / (1 << 30), 0.0):
        assert not fits(plan, [bucket_of(plan)], estimate, gigabytes, screen)
        assert f"block_offload: {depth}" in screen.lists[f"for {gigabytes:g} GB"]
    assert "the least" in screen.lists["for 0 GB"]["needed"]
    assert fits(plan, [bucket_of(plan)], estimate, 1.0, screen)
    assert len(screen.lists) == 2
