"""Blocks in host memory: the same gradients to the bit, and no buffer written while it may be read."""

import random

import pytest
import torch
from recorded_queues import Late, Recorded, wrong_order
from torch import nn
from torch.utils.checkpoint import checkpoint

from crepatrain.alignment.crepa import Crepa
from crepatrain.alignment.teachers import BackboneTeacher
from crepatrain.config.plan import read_plan
from crepatrain.config.sections import LoopConfig
from crepatrain.errors import UserError
from crepatrain.families import family_class
from crepatrain.placement.checkpointing import checkpoint_blocks
from crepatrain.placement.flat import Layout, plain_tensors
from crepatrain.placement.host_memory import HostMemory
from crepatrain.placement.precision import autocast
from crepatrain.placement.ring import BlockRing, host_bytes, streamed
from crepatrain.specs import FAMILIES
from crepatrain.training import build
from crepatrain.training.diffusion import FlowMatching
from crepatrain.training.lora import trainable_parameters
from crepatrain.training.selftest import random_batch
from crepatrain.training.step import CrepaTerm, LayerSyncTerm, training_loss

CPU = torch.device("cpu")
VARIANTS = [(family, tiny) for family in FAMILIES for tiny in family_class(family).tiny if "nabla" not in tiny]


class Model:
    """An adapted transformer of a tiny checkpoint, which trains on one random clip."""

    def __init__(self, plan):
        self.plan, self.family = plan, build.build_family(plan)
        torch.manual_seed(3)
        self.transformer = build.load_transformer(plan, self.family)
        build.adapt(plan, self.family, self.transformer)
        for parameter in trainable_parameters(self.transformer):
            parameter.data.normal_(std=0.1)
        checkpoint_blocks(plan.config.loop, self.transformer)
        self.transformer.train()
        self.blocks = self.family.blocks(self.transformer)
        self.depth = len(self.blocks)

    def step(self, *, student=0, layersync=True):
        """The gradients of a step with a backbone teacher, by name; with all of those before."""
        torch.manual_seed(5)
        batch = random_batch(self.plan, self.family)
        term = CrepaTerm(Crepa(self.plan.geometry.width, self.plan.geometry.width), BackboneTeacher(self.depth - 1), student, 0.5)
        sync = LayerSyncTerm(0, self.depth - 1, 0.3) if layersync else None
        with autocast(self.plan.config.loop, CPU):
            losses = training_loss(self.family, FlowMatching("uniform"), self.transformer, self.blocks, batch, term, sync)
        losses.total.backward()
        return {n: p.grad.clone() for n, p in self.transformer.named_parameters() if p.grad is not None}

    @torch.no_grad()
    def sample(self):
        """A denoising step."""
        torch.manual_seed(6)
        batch = random_batch(self.plan, self.family)
        with autocast(self.plan.config.loop, CPU):
            return self.family.denoise(self.transformer, batch.noise, batch.sigma, batch)


def with_ring(model, count, *, buffers=2, queues=None):
    """The same model with a ring; returns its queues."""
    queues = queues or Late()
    ring = BlockRing([model.blocks[index] for index in streamed(model.depth, count)], CPU, queues, buffers=buffers)
    with ring.apart():
        model.transformer.to(CPU)
    return queues


@pytest.fixture
def model(tiny_checkpoint, config_file):
    def made(family="wan", tiny="tiny", **changes):
        size = {"height": 128, "width": 192, "num_frames": 17} if family == "ltxvideo" else {}
        more = {"task": "i2v"} if "i2v" in tiny else {}
        more |= {"wan_expert": "low"} if "a14b" in tiny else {}
        folder = str(tiny_checkpoint(family, tiny))
        path = config_file(
            model_family=family,
            pretrained_model_name_or_path=folder,
            crepa_enabled=False,
            crepa_encoder=...,
            crepa_encoder_image_size=...,
            **{"mixed_precision": "bf16"} | size | more | changes,
        )
        return Model(read_plan(path))

    return made


def expect_same(found, expected):
    assert found.keys() == expected.keys()
    assert any(value.any() for value in expected.values())
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("family", "tiny"), VARIANTS)
def test_gradients_are_those_of_resident_blocks(model, family, tiny):
    resident, ringed = model(family, tiny), model(family, tiny)
    queues = with_ring(ringed, resident.depth)
    for student in (0, resident.depth - 2):
        expect_same(ringed.step(student=student), resident.step(student=student))
    assert torch.equal(ringed.sample(), resident.sample())
    assert wrong_order(queues.log) is None


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("checkpointing", [True, "selective"])
@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("share", [0.1, 0.5, 1])
def test_every_number_of_blocks_and_buffers(model, precision, checkpointing, buffers, share):
    changes = {"mixed_precision": precision, "gradient_checkpointing": checkpointing}
    resident, ringed = model(**changes), model(**changes)
    for queues in (Late(), Recorded())[: 2 if share == 1 else 1]:
        ringed = model(**changes)
        with_ring(ringed, max(1, int(share * resident.depth)), buffers=buffers, queues=queues)
        fresh = model(**changes)
        for student in (0, resident.depth // 2):  # the second adds up on the first, as micro-batches do
            expect_same(ringed.step(student=student), fresh.step(student=student))
            assert torch.equal(ringed.sample(), fresh.sample())
        assert wrong_order(queues.log) is None
