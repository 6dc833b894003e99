"""The loop never waits for the device, and CREPA costs next to nothing."""

import contextlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from crepatrain.alignment.crepa import Crepa
from crepatrain.alignment.teachers import CachedTeacher
from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.families import get_family
from crepatrain.running.events import StepBegins, StepLaunched
from crepatrain.specs import WAN
from crepatrain.tensors import Batch, PatchFeatures
from crepatrain.training.diffusion import FlowMatching
from crepatrain.training.lora import add_lora, target_modules
from crepatrain.training.metrics import HostCopy
from crepatrain.training.optim import ScheduledOptimizer
from crepatrain.training.step import CrepaTerm, training_loss


class Reads(TorchDispatchMode):
    """Counts what would make a host wait for a GPU, into the last of some counts."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[-1] += func in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("source", ["cached", "pixels", "latents", "backbone"])
def test_a_step_is_launched_without_reading_a_number(config_file, source: str):
    counts: list[int] = []

    def watch(event: object) -> None:
        match event:
            case StepBegins():
                counts.append(0)
                watching.enter_context(Reads(counts))
            case StepLaunched():
                watching.close()

    block = {"crepa_teacher_block_index": 9} if source == "backbone" else {}
    changes = {"gradient_accumulation_steps": 2, "crepa_feature_source": source, "dataloader_num_workers": 1, **block}
    with contextlib.ExitStack() as watching:
        fit(read_plan(config_file(**changes)), Screen(quiet=True), subscribers=[watch])
    assert counts[1:] == [0, 0]  # the first step also starts the readers


def test_an_optimizer_without_a_guard_is_asked_for_one_read(config_file, monkeypatch):
    reads: list[int] = []
    launching = False
    read = HostCopy.read

    def counted(copy: HostCopy) -> dict[str, float]:
        reads[-1] += launching
        return read(copy)

    def watch(event: object) -> None:
        nonlocal launching
        if isinstance(event, StepBegins):
            reads.append(0)
        if isinstance(event, (StepBegins, StepLaunched)):
            launching = isinstance(event, StepBegins)

    monkeypatch.setattr(HostCopy, "read", counted)
    monkeypatch.setattr(ScheduledOptimizer, "guarded", False)  # as those of other packages are
    fit(read_plan(config_file()), Screen(quiet=True), subscribers=[watch])
    assert reads == [1, 1, 1]


@pytest.mark.parametrize("name", ["wan2.1-1.3b"])
def test_a_cached_step_is_within_two_thousandths_of_the_plain_one(name: str):
    """On the meta device at 480 x 832 x 81: LoRA rank 32, gradient checkpointing, a teacher of the width of DINOv2-g."""
    config = WAN.released[name].transformer
    family = get_family("wan", WAN.released[name].checkpoint)
    transformer = family.empty_transformer()
    add_lora(transformer, target_modules(transformer, WAN.lora_targets, WAN), rank=32, alpha=32, dropout=0.0)
    transformer.enable_gradient_checkpointing()
    geometry = WAN.geometry(config, WAN.released[name].vae)
    grid = geometry.token_grid(81, 480, 832)
    with torch.device("meta"):
        crepa = Crepa(geometry.width, 1536)
        latents = torch.empty(1, 16, *geometry.latent_shape(81, 480, 832))
        batch = Batch(
            latents=latents,
            noise=torch.empty_like(latents),
            sigma=torch.empty(1),
            text={"prompt_embeds": torch.empty(1, 512, 4096)},
            grid=grid,
            fps=16.0,
            keys=("meta",),
            teacher=PatchFeatures(torch.empty(1, grid.t, grid.patches, 1536, dtype=torch.float16), (grid.h, grid.w)),
        )
    flops = []
    for term in (None, CrepaTerm(crepa, CachedTeacher(), WAN.default_block, weight=0.5)):
        with FlopCounterMode(display=False) as counter:
            training_loss(family, FlowMatching("uniform"), transformer.train(), transformer.blocks, batch, term).total.backward()
        flops.append(counter.get_total_flops())
    plain, cached = flops
    assert plain > 1e15
    assert plain < cached <= 1.002 * plain
