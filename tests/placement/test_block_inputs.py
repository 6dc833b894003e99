"""Inputs of blocks in host memory, and parts of blocks computed again: no number changes, and no memory is used too early."""

import gc
import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from recorded_queues import Late, Recorded, wrong_order
from torch import nn
from torch.utils.checkpoint import checkpoint
from trained_blocks import CPU, VARIANTS, expect_same

from crepatrain.errors import UserError
from crepatrain.memory.account import StorageAccount
from crepatrain.placement import block_inputs, host_memory
from crepatrain.placement.block_inputs import BlockInputs
from crepatrain.placement.queues import InOrder
from crepatrain.placement.ring import BlockRing, streamed

OFFLOADED, NESTED = {"checkpoint_offload": True}, {"nested_checkpointing": True}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("changes", [OFFLOADED | NESTED, pytest.param(OFFLOADED, marks=SLOW), pytest.param(NESTED, marks=SLOW)])
@pytest.mark.parametrize(("family", "tiny"), VARIANTS)
def test_gradients_are_those_without(model, family, tiny, changes):
    plain, saving = model(family, tiny), model(family, tiny, queues := Late(), **changes)
    for student in (0, plain.depth - 2):  # the second step adds up on the first, as micro-batches do
        expect_same(saving.step(student=student), plain.step(student=student))
        assert torch.equal(saving.sample(), plain.sample())
    assert wrong_order(queues.log) is None
    assert bool(queues.log) == ("checkpoint_offload" in changes)


@SLOW
def test_capture_at_any_block(model):
    plain, saving = model(), model(queues=Late(), **OFFLOADED | NESTED)
    for student in range(plain.depth - 1):
        expect_same(saving.step(student=student), plain.step(student=student))


CASES = [
    {"gradient_checkpointing": "selective"},
    {"base_quantization": "int8"},
    {"lora_dropout": 0.3},
    {"mixed_precision": "no"},
    {"lora_targets": ["blocks.4.attn1.to_q", "blocks.7.ffn.net.2"]},  # no gradient reaches the blocks before
    {"model_type": "full"},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
@pytest.mark.parametrize("kind", [Late, pytest.param(Recorded, marks=SLOW)])
def test_with_other_settings(model, changes, kind):
    more = OFFLOADED | ({} if "gradient_checkpointing" in changes else NESTED)
    plain, saving = model(**changes), model(queues=(queues := kind()), **changes | more)
    for _ in range(2):
        expect_same(saving.step(), plain.step())
    assert wrong_order(queues.log) is None


@pytest.mark.parametrize("changes", [OFFLOADED, OFFLOADED | NESTED])
def test_with_weights_in_host_memory_too(model, changes):
    plain, saving = model(), model(queues=(queues := Late()), **changes)
    ring = BlockRing([saving.blocks[index] for index in streamed(plain.depth, plain.depth)], CPU, of_ring := Late())
    with ring.apart():
        saving.transformer.to(CPU)
    for student in (0, 4):
        expect_same(saving.step(student=student), plain.step(student=student))
    assert torch.equal(saving.sample(), plain.sample())
    assert wrong_order(queues.log) is None
    assert wrong_order(of_ring.log) is None


@SLOW
def test_with_compiled_blocks(model):
    torch.compiler.reset()
    plain, saving = model(compile=True), model(queues=(queues := Late()), compile=True, **OFFLOADED)
    for each in (plain, saving):
        for block in each.blocks:
            block.compile()
    for _ in range(2):
        expect_same(saving.step(), plain.step())
    assert wrong_order(queues.log) is None
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return hidden + self.out(torch.tanh(self.into(hidden))) * text


class Stack:
    """Blocks of no transformer, with what keeps their inputs."""

    def __init__(self, queues, depth=6):
        torch.manual_seed(1)
        self.blocks = nn.ModuleList([Block(8) for _ in range(depth)])
        self.shift = nn.Parameter(torch.zeros(8))
        self.inputs = BlockInputs(self.blocks, CPU, queues) if queues else None

    def forward(self, rows=5, *, transposed=False):
        torch.manual_seed(rows)
        hidden, text = torch.randn(rows, 8), torch.randn(8)
        hidden = hidden.T.contiguous().T if transposed else hidden
        hidden = hidden + self.shift
        for block in self.blocks:
            if self.inputs:
                with self.inputs.of(block, hidden):
                    hidden = checkpoint(block, hidden, text, use_reentrant=False)
            else:
                hidden = checkpoint(block, hidden, text, use_reentrant=False)
        return hidden.square().mean()

    def gradients(self):
        found = [parameter.grad.clone() for parameter in self.blocks.parameters()]
        self.blocks.zero_grad()
        return found


def expect_equal(found, expected):
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(one.any() for one in expected)


@pytest.mark.parametrize("kind", [Late, Recorded])
def test_clips_of_several_sizes(kind):
    plain, saving = Stack(None), Stack(queues := kind())
    for rows, transposed in ((5, False), (9, True), (2, False), (9, False), (9, True)):
        for stack in (plain, saving):
            stack.forward(rows, transposed=transposed).backward()
        expect_equal(saving.gradients(), plain.gradients())
    assert wrong_order(queues.log) is None


def test_host_memory_is_made_once_for_the_largest_clips(monkeypatch):
    made = []

    class Counted(host_memory.HostMemory):
        def __init__(self, size, *, pinned):
            made.append(size)
            super().__init__(size, pinned=pinned)

    monkeypatch.setattr(block_inputs, "HostMemory", Counted)
    stack = Stack(Late())
    for rows in (9, 5, 9, 2, 9):
        stack.forward(rows).backward()
    assert made == [5 * 9 * 8 * 4]
    stack.forward(10).backward()
    assert made[1:] == [5 * 10 * 8 * 4]


def test_forwards_without_a_backward_and_two_at_once():
    plain, saving = Stack(None), Stack(queues := Late())
    losses = [(stack.forward(5), stack.forward(5) * 3) for stack in (plain, saving)]
    for first, second in losses:
        second.backward()
        first.backward()
    expect_equal(saving.gradients(), plain.gradients())
    saving.forward(5)  # and its graph is gone at once
    for stack in (plain, saving):
        stack.forward(5).backward(retain_graph=True)
    expect_equal(saving.gradients(), plain.gradients())
    assert wrong_order(queues.log) is None


def test_a_backward_that_ends_early_leaves_nothing_behind():
    """What was fetched for a block whose turn never comes is given up behind its copy."""
    saving = Stack(queues := Late())
    loss = saving.forward()
    torch.autograd.grad(loss, [saving.blocks[5].into.weight])
    torch.autograd.grad(saving.forward(), [saving.blocks[3].into.weight])
    del loss
    gc.collect()
    plain = Stack(None)
    for stack in (plain, saving):
        stack.forward().backward()
    expect_equal(saving.gradients(), plain.gradients())
    assert wrong_order(queues.log) is None
    freed = Counter(entry[0] for entry in queues.log)["freed"]
    assert freed == 3 * 5 + 2, "what was sent, and what was not asked for"


def test_two_hidden_states_are_on_the_device_whatever_the_depth():
    for depth in (4, 12):
        stack = Stack(InOrder(), depth=depth)
        stack.blocks.requires_grad_(False)
        stack.inputs = BlockInputs(stack.blocks, CPU, values=False)
        with StorageAccount() as account:
            stack.forward(4096).backward()
        stack.inputs = None
        with StorageAccount() as without:
            stack.forward(4096).backward()
        # It holds the last block's and the one before; without it, those of all blocks.
        assert without.on(CPU).peak - account.on(CPU).peak == (depth - 2) * 4096 * 8 * 4


def log_of_two_steps():
    saving = Stack(queues := Recorded(), depth=9)
    kept = []  # the allocator gives no address twice
    queues.freed, freed = lambda tensor: (kept.append(tensor), freed(tensor)), queues.freed
    for _ in range(2):
        saving.forward().backward()
    return queues.log


def test_an_order_without_one_wait_is_refused():
    """None is there without need, but for those that repeat one."""
    log, tried = log_of_two_steps(), 0
    assert wrong_order(log) is None
    for place, entry in enumerate(log):
        if entry[0] == "wait":
            tried += 1
            assert wrong_order(log[:place] + log[place + 1 :]), (place, entry, log[place - 3 : place + 4])
    assert tried == 2 * 4 * 8, "for each block two sent and two brought, in each step"


def test_an_order_in_which_a_part_comes_too_early_is_refused():
    """A mark before what it stands for, a copy, a read or a release before the wait that it needs."""
    log, tried = log_of_two_steps(), Counter()
    pairs = {(one, other) for one in ("done", "written", "copy") for other in ("mark",)}
    pairs |= {("wait", "copy"), ("wait", "reads"), ("wait", "freed")}
    for place, (before, entry) in enumerate(pairwise(log)):
        if (before[0], entry[0]) in pairs:
            tried[before[0], entry[0]] += 1
            assert wrong_order([*log[:place], entry, before, *log[place + 2 :]]), (place, before, entry)
    assert tried.keys() == pairs
    assert min(tried.values()) >= 16


def test_random_disorder_is_refused():
    log, generator = log_of_two_steps(), random.Random(4)
    assert all(wrong_order(generator.sample(log, len(log))) for _ in range(200))


def test_memory_that_is_not_pinned_is_an_error_in_words(monkeypatch):
    def refuses(*_sizes, **_options):
        raise RuntimeError("CUDA error: out of memory")

    stack = Stack(Late())
    monkeypatch.setattr(host_memory.torch, "empty", refuses)
    with pytest.raises(UserError, match=r"checkpoint_offload=true: the system does not pin .* \(CUDA error: out of memory\)"):
        stack.forward()
