"""A tiny transformer of any family that trains on one random clip, for what must change no number."""

import torch

from crepatrain.alignment.crepa import Crepa
from crepatrain.alignment.teachers import BackboneTeacher
from crepatrain.families import family_class
from crepatrain.placement.block_inputs import BlockInputs
from crepatrain.placement.checkpointing import checkpoint_blocks
from crepatrain.placement.precision import autocast
from crepatrain.specs import FAMILIES
from crepatrain.training import build
from crepatrain.training.diffusion import FlowMatching
from crepatrain.training.lora import trainable_parameters
from crepatrain.training.selftest import random_batch
from crepatrain.training.step import CrepaTerm, LayerSyncTerm, training_loss

CPU = torch.device("cpu")
VARIANTS = [(family, tiny) for family in FAMILIES for tiny in family_class(family).tiny if "nabla" not in tiny]


class Model:
    """An adapted transformer of a tiny checkpoint, which trains on one random clip.

    Args:
        queues: for `checkpoint_offload`.
    """

    def __init__(self, plan, queues=None):
        self.plan, self.family = plan, build.build_family(plan)
        torch.manual_seed(3)
        self.transformer = build.load_transformer(plan, self.family, torch.device("cpu"))
        build.adapt(plan, self.family, self.transformer)
        for parameter in trainable_parameters(self.transformer):
            parameter.data.normal_(std=0.1)
        self.blocks = self.family.blocks(self.transformer)
        inputs = BlockInputs(self.blocks, CPU, queues) if plan.config.loop.checkpoint_offload else None
        checkpoint_blocks(plan.config.loop, self.family, self.transformer, inputs)
        self.transformer.train()
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


def expect_same(found, expected):
    assert found.keys() == expected.keys()
    assert any(value.any() for value in expected.values())
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
