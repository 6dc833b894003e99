"""Blocks in host memory: the same gradients to the bit, and no buffer written while it may be read."""

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from recorded_queues import Late, Recorded, wrong_order
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from trained_blocks import VARIANTS, expect_same

from crepatrain.errors import UserError
from crepatrain.placement import host_memory
from crepatrain.placement.flat import Layout
from crepatrain.placement.host_memory import HostMemory
from crepatrain.placement.ring import BlockRing, streamed

CPU = torch.device("cpu")


def with_ring(model, count, *, buffers=2, queues=None):
    """The same model with a ring; returns its queues."""
    queues = queues or Late()
    ring = BlockRing([model.blocks[index] for index in streamed(model.depth, count)], CPU, queues, buffers=buffers)
    with ring.apart():
        model.transformer.to(CPU)
    return queues


@pytest.mark.parametrize(("family", "tiny"), VARIANTS)
def test_gradients_are_those_of_resident_blocks(model, family, tiny):
    resident, ringed = model(family, tiny), model(family, tiny)
    queues = with_ring(ringed, resident.depth)
    for student in (0, resident.depth - 2):
        expect_same(ringed.step(student=student), resident.step(student=student))
    assert torch.equal(ringed.sample(), resident.sample())
    assert wrong_order(queues.log) is None


# Every number of buffers, with as many blocks as there are, one of them, and some.
CASES = [(True, 2, 1), (True, 1, 1), ("selective", 2, 0.5), ("selective", 3, 1), (True, 2, 0.1)]


@pytest.mark.parametrize(("checkpointing", "buffers", "share"), CASES)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("no", marks=pytest.mark.slow)])
def test_every_number_of_blocks_and_buffers(model, precision, checkpointing, buffers, share):
    changes = {"mixed_precision": precision, "gradient_checkpointing": checkpointing}
    resident = model(**changes)
    expected = [resident.step(), resident.sample(), resident.step(student=resident.depth // 2), resident.sample()]
    for queues in (Late(), Recorded()):
        ringed = model(**changes)
        with_ring(ringed, max(1, int(share * resident.depth)), buffers=buffers, queues=queues)
        expect_same(ringed.step(), expected[0])
        assert torch.equal(ringed.sample(), expected[1])
        expect_same(ringed.step(student=resident.depth // 2), expected[2])  # adds up on the first, as micro-batches do
        assert torch.equal(ringed.sample(), expected[3])
        assert wrong_order(queues.log) is None


@pytest.mark.slow
def test_capture_at_any_block(model):
    resident, ringed = model(), model()
    with_ring(ringed, resident.depth)
    for student in range(resident.depth - 1):
        expect_same(ringed.step(student=student), resident.step(student=student))


@pytest.mark.slow
def test_compiled_blocks_are_one_graph(model):
    """The same numbers as with compiled blocks that stay where they are, and no block is compiled for itself."""
    torch.compiler.reset()
    resident, ringed = model(compile=True), model(compile=True)
    for block in resident.blocks:
        block.forward = torch.compile(block.forward)
    expected = [resident.step(), resident.sample()]
    compiled = counters["stats"]["unique_graphs"]
    with_ring(ringed, resident.depth)
    for block in ringed.blocks:
        block.forward = torch.compile(block.forward)
    expect_same(ringed.step(), expected[0])
    assert torch.equal(ringed.sample(), expected[1])
    assert counters["stats"]["unique_graphs"] == compiled < resident.depth
    torch.compiler.reset()


def test_without_checkpointing_autograd_notices(model):
    """A config is refused; this is the net below."""
    ringed = model(gradient_checkpointing=False)
    with_ring(ringed, ringed.depth)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ringed.step()


class Block(nn.Module):
    """Any kind of block, with a weight that is trained and one that is not."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, inner), nn.Linear(inner, width)
        self.tied = self.into
        self.gain = nn.Parameter(torch.ones(width))
        self.register_buffer("constant", torch.ones(width))
        self.requires_grad_(False)
        self.gain.requires_grad_(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gain * self.out(torch.tanh(self.tied(x))) * self.constant


def stacked(lists, x):
    for block in (block for blocks in lists for block in blocks):
        x = checkpoint(block, x, use_reentrant=False)
    return x


def two_lists():
    torch.manual_seed(1)
    return [nn.ModuleList([Block(8, 24) for _ in range(3)]), nn.ModuleList([Block(8, 4).bfloat16().float() for _ in range(4)])]


def test_lists_of_blocks_of_several_sizes():
    resident, ringed = two_lists(), two_lists()
    flat = [block for blocks in ringed for block in blocks]
    ring = BlockRing(flat, CPU, queues := Late())
    with ring.apart():
        pass
    for lists in (resident, ringed):
        for _ in range(2):
            torch.manual_seed(2)
            stacked(lists, torch.randn(5, 8)).square().mean().backward()
    for one, other in zip((block for blocks in resident for block in blocks), flat, strict=True):
        assert torch.equal(one.gain.grad, other.gain.grad)
        assert other.gain.grad.any()
    assert wrong_order(queues.log) is None


def log_of_two_steps():
    ringed = two_lists()
    ring = BlockRing([block for blocks in ringed for block in blocks], CPU, queues := Recorded())
    with ring.apart():
        pass
    for _ in range(2):
        stacked(ringed, torch.randn(5, 8)).square().mean().backward()
    return queues.log


def is_waited_for(log, mark):
    return any(entry[0] == "wait" and entry[2] == mark[2] for entry in log)


def test_an_order_without_one_wait_is_refused():
    """None is there without need, but for those that repeat one."""
    log, tried = log_of_two_steps(), 0
    assert wrong_order(log) is None
    for place, entry in enumerate(log):
        if entry[0] == "wait" and entry not in log[:place]:
            tried += 1
            assert wrong_order(log[:place] + log[place + 1 :]), (place, entry)
    assert tried > 20


def test_an_order_in_which_a_part_comes_too_early_is_refused():
    """A mark before what it stands for, a copy or a read before the wait that it needs."""
    log, tried = log_of_two_steps(), Counter()
    for place, (before, entry) in enumerate(pairwise(log)):
        pair = before[0], entry[0]
        needed = {
            ("done", "mark"): entry[0] == "mark" and is_waited_for(log, entry),
            ("copy", "mark"): entry[0] == "mark" and is_waited_for(log, entry),
            ("wait", "copy"): before not in log[:place],
            ("wait", "reads"): before not in log[:place],
        }.get(pair, False)
        if needed:
            tried[pair] += 1
            assert wrong_order([*log[:place], entry, before, *log[place + 2 :]]), (place, before, entry)
    assert len(tried) == 4
    assert min(tried.values()) > 9


def test_random_disorder_is_refused():
    log, generator = log_of_two_steps(), random.Random(4)
    assert all(wrong_order(generator.sample(log, len(log))) for _ in range(200))


def test_weights_lie_in_host_memory_as_they_were():
    block = Block(8, 24)
    block.transposed = nn.Parameter(torch.randn(6, 5).T, requires_grad=False)
    block.number = nn.Parameter(torch.tensor(3.0, dtype=torch.bfloat16), requires_grad=False)
    parameters = [parameter for parameter in block.parameters() if not parameter.requires_grad]
    layout = Layout(parameters)
    buffer = torch.empty(layout.size, dtype=torch.uint8)
    for view, parameter in zip(layout.views(buffer), parameters, strict=True):
        assert view.data_ptr() % 64 == 0
        view.copy_(parameter)
    for found, parameter in zip(layout.parameters(buffer), parameters, strict=True):
        assert torch.equal(found, parameter)
        assert found.stride() == parameter.stride()
        assert not found.requires_grad
    assert all(parameter.is_meta for parameter in layout.parameters(None))


def test_host_memory_is_one_address_space(monkeypatch):
    monkeypatch.setattr(host_memory, "_PIECE", 64)
    assert host_memory.pinned_bytes(64 * 3 + 5) == 64 * 3 + 8
    memory = HostMemory(64 * 3 + 5, pinned=False)
    for span, offset in memory.spans(60, 130):
        span.copy_(torch.arange(offset, offset + len(span), dtype=torch.uint8))
    found = torch.cat([span for span, _ in memory.spans(60, 130)])
    assert torch.equal(found, torch.arange(130, dtype=torch.uint8))
    assert [len(span) for span, _ in memory.spans(60, 130)] == [4, 64, 62]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU pins memory")
def test_memory_that_is_not_pinned_is_taken_where_it_will_do():
    with pytest.raises(RuntimeError):
        list(HostMemory(100, pinned=True).spans(0, 100))
    ((span, start),) = HostMemory(100, pinned=True, must_pin=False).spans(0, 100)
    assert (len(span), start, span.is_pinned()) == (100, 0, False)


@pytest.mark.parametrize(("depth", "count"), [(10, 1), (10, 3), (40, 17), (7, 7)])
def test_streamed_blocks_are_spread(depth, count):
    chosen = streamed(depth, count)
    gaps = {later - earlier for earlier, later in pairwise(chosen)}
    assert len(set(chosen)) == count
    assert set(chosen) <= set(range(depth))
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_weights_of_an_unknown_kind_are_refused():
    class Packed(nn.Parameter):
        pass

    block = Block(8, 4)
    block.into.weight = Packed(torch.randn(4, 8), requires_grad=False)
    with pytest.raises(UserError, match="weights of the kind Packed"):
        BlockRing([block], CPU)


def test_memory_that_is_not_pinned_is_an_error_in_words(monkeypatch):
    def refuses(*_sizes, **_options):
        raise RuntimeError("CUDA error: out of memory")

    ring = BlockRing([Block(8, 4)], CPU)
    monkeypatch.setattr(host_memory.torch, "empty", refuses)
    with (
        pytest.raises(UserError, match=r"block_offload=1: the system does not pin .* \(CUDA error: out of memory\)"),
        ring.apart(),
    ):
        pass


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_quantised_weights(model, kind):
    quantization = pytest.importorskip("torchao.quantization", reason="quantised weights need torchao")
    resident, ringed = model(), model()
    for each in (resident, ringed):
        for block in each.blocks:
            quantization.quantize_(
                block, getattr(quantization, kind)(), lambda module, name: isinstance(module, nn.Linear) and "lora_" not in name
            )
    queues = with_ring(ringed, resident.depth)
    for _ in range(2):
        expect_same(ringed.step(), resident.step())
    assert torch.equal(ringed.sample(), resident.sample())
    assert wrong_order(queues.log) is None
