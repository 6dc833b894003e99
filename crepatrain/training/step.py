"""The method, once: what one micro-batch costs, in fit, in the memory estimate and in the benchmarks."""

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crepatrain.alignment.capture import capture_blocks
from crepatrain.alignment.crepa import CrepaOutput
from crepatrain.alignment.layersync import layersync_loss
from crepatrain.alignment.teachers import Teacher
from crepatrain.families.base import Family
from crepatrain.geometry import TokenGrid
from crepatrain.tensors import Batch, PatchFeatures
from crepatrain.training.diffusion import FlowMatching

CrepaForward = Callable[[Tensor, PatchFeatures, TokenGrid], CrepaOutput]


@dataclass(frozen=True, eq=False)
class CrepaTerm:
    """CREPA in one step.

    Attributes:
        crepa: the module, or a wrapper around it.
        block: whose output is aligned.
        weight: of this step; 0 measures the score without a gradient.
        timed: entered around all that CREPA adds, its gradient included.
    """

    crepa: CrepaForward
    teacher: Teacher
    block: int
    weight: float
    timed: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext


@dataclass(frozen=True)
class LayerSyncTerm:
    """LayerSync in one step: the student block learns from the deeper teacher block."""

    student: int
    teacher: int
    weight: float


@dataclass(frozen=True, eq=False)
class StepLosses:
    """The losses of one micro-batch.

    Attributes:
        total: scalar, to run backward on.
        diffusion: [B], detached.
        crepa: detached scores and loss, not yet times its weight; None where nothing was measured.
        layersync: [B], detached, not yet times its weight; None where it is off.
    """

    total: Tensor
    diffusion: Tensor
    crepa: CrepaOutput | None
    layersync: Tensor | None


def training_loss(
    family: Family,
    process: FlowMatching,
    transformer: nn.Module,
    blocks: nn.ModuleList,
    batch: Batch,
    crepa: CrepaTerm | None = None,
    layersync: LayerSyncTerm | None = None,
) -> StepLosses:
    """The loss of one micro-batch: diffusion + weight * CREPA + weight * LayerSync.

    Args:
        transformer: the module, or a wrapper around it.
        blocks: of the transformer itself.
        crepa, layersync: None where the step needs nothing of them; then no block is captured.
    """
    wanted: set[int] = set()
    if crepa:
        wanted |= {crepa.block, *crepa.teacher.blocks}
    if layersync:
        wanted |= {layersync.student, layersync.teacher}

    noisy = process.add_noise(batch.latents, batch.noise, batch.sigma)
    with capture_blocks(blocks, wanted) as captured:
        prediction = family.denoise(transformer, noisy, batch.sigma, batch)
    diffusion = process.loss(prediction, batch.latents, batch.noise, family.loss_mask(batch))
    total = diffusion.mean()

    tokens = {index: family.video_tokens(output, batch.grid) for index, output in captured.items()}
    aligned = _align(crepa, batch, tokens) if crepa else None
    if crepa and aligned and crepa.weight > 0:
        total = total + crepa.weight * aligned.loss.mean()
    synced = layersync_loss(tokens[layersync.student], tokens[layersync.teacher]) if layersync else None
    if layersync and synced is not None:
        total = total + layersync.weight * synced.mean()
    return StepLosses(
        total,
        diffusion.detach(),
        aligned and CrepaOutput(aligned.loss.detach(), aligned.alignment, aligned.self_similarity),
        None if synced is None else synced.detach(),
    )


def _align(term: CrepaTerm, batch: Batch, tokens: Mapping[int, Tensor]) -> CrepaOutput:
    with term.timed(), torch.set_grad_enabled(torch.is_grad_enabled() and term.weight > 0):
        return term.crepa(tokens[term.block], term.teacher.features(batch, tokens), batch.grid)
