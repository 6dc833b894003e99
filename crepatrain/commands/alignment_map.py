"""Measuring where in the picture the transformer agrees with the teacher: a cosine per patch, beside the frames."""

import base64
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from crepatrain.alignment.capture import capture_blocks
from crepatrain.alignment.crepa import Crepa
from crepatrain.alignment.teachers import Teacher
from crepatrain.config.plan import Plan, make_plan
from crepatrain.data.buckets import Window
from crepatrain.data.decode import FrameReader
from crepatrain.data.encode import as_jpeg
from crepatrain.data.loader import Draw
from crepatrain.errors import UserError
from crepatrain.families.base import Family
from crepatrain.placement.devices import open_device
from crepatrain.placement.placing import place
from crepatrain.placement.precision import autocast
from crepatrain.preparing.context import Context
from crepatrain.preparing.precompute import filled_caches
from crepatrain.preparing.preflight import read_dataset
from crepatrain.records.layout import RunLayout, checkpoints, step_of
from crepatrain.records.opening import config_of
from crepatrain.records.whole import expect_whole
from crepatrain.running.session import build_training_set, restore_modules
from crepatrain.screen import Screen
from crepatrain.stopping import StopSignal
from crepatrain.tensors import Batch
from crepatrain.training import build
from crepatrain.training.checkpoint import replace_json
from crepatrain.training.diffusion import FlowMatching

_CLIPS = 3
_SIGMA = 0.5
# The largest width and height of a picture in the report, in pixels.
_PICTURE_WIDTH = 256


def write_alignment_map(root: Path, screen: Screen) -> None:
    """Measure a run's newest checkpoint on the first windows of a few clips, into its alignment_map.json.

    Raises:
        UserError: the run has no projector or no checkpoint, a damaged one, or what it was made from is gone.
    """
    layout = RunLayout(root)
    plan = make_plan(config_of(root, screen).changed(output_dir=str(root)))
    if not plan.config.crepa.crepa_enabled:
        raise UserError(f"{root}: it was trained without CREPA, so it has no projector", "leave out --map")
    found = checkpoints(layout.checkpoints)
    if not found:
        raise UserError(f"{root}: it has no checkpoint yet", "wait for the first one, or leave out --map")
    expect_whole(found[-1])
    device = open_device(screen)
    with StopSignal() as stop:
        context = Context(plan, screen, device, stop)
        dataset = read_dataset(context)
        firsts = {window.clip: window for window in reversed(dataset.clips.windows)}
        windows = tuple(reversed(firsts.values()))[:_CLIPS]
        dataset = replace(dataset, clips=replace(dataset.clips, windows=windows))
        caches = filled_caches(context, dataset, teacher=True)
    screen.say(f"measuring {found[-1]}")
    probe = _Probe.load(plan, found[-1], device)
    samples = build_training_set(plan, probe.family, caches, lambda _step: True, drops=False)
    clips = []
    for index, window in enumerate(dataset.clips.windows):
        batch = samples.read([Draw(index, step=0, slot=index)])
        fixed = replace(batch, sigma=torch.full_like(batch.sigma, probe.sigma))
        clips.append(_clip(window, probe.cosines(fixed.to(device)), fixed))
    facts = {"step": step_of(found[-1]), "block": plan.config.crepa.block, "sigma": probe.sigma, "clips": clips}
    replace_json(layout.alignment_map_file, facts)


@dataclass(frozen=True, eq=False)
class _Probe:
    """A trained run, ready to be measured."""

    plan: Plan
    family: Family
    process: FlowMatching
    transformer: nn.Module
    crepa: Crepa
    teacher: Teacher

    @classmethod
    def load(cls, plan: Plan, checkpoint: Path, device: torch.device) -> "_Probe":
        family = build.build_family(plan)
        transformer, crepa = build.load_transformer(plan, family, device), build.build_crepa(plan).to(device)
        build.adapt(plan, family, transformer)
        place(plan.config.loop, family, transformer, device)
        restore_modules(checkpoint, transformer, crepa, average=plan.config.optim.use_ema)  # the average is the run's result
        process, teacher = build.build_process(plan), build.build_teacher(plan, family, device)
        return cls(plan, family, process, transformer.eval(), crepa, teacher)

    @property
    def sigma(self) -> float:
        """The fixed noise level: the middle one, or the nearest to it that the transformer is for."""
        low, high = self.process.between
        return min(max(_SIGMA, low), high)

    @torch.no_grad()
    def cosines(self, batch: Batch) -> Tensor:
        """[T, rows, columns] of a batch of one."""
        block = self.plan.config.crepa.block
        noisy = self.process.add_noise(batch.latents, batch.noise, batch.sigma)
        blocks = self.family.blocks(self.transformer)
        wanted, device = {block, *self.teacher.blocks}, batch.latents.device
        with autocast(self.plan.config.loop, device), capture_blocks(blocks, wanted) as captured:
            self.family.denoise(self.transformer, noisy, batch.sigma, batch)
        tokens = {index: self.family.video_tokens(output, batch.grid) for index, output in captured.items()}
        return self.crepa.patch_similarity(tokens[block], self.teacher.features(batch, tokens), batch.grid)[0]


def _clip(window: Window, cosines: Tensor, batch: Batch) -> dict[str, Any]:
    """A window's pictures and cosines [T, rows, columns], as plain values."""
    frames = tuple(window.frames[frame] for frame in batch.grid.teacher_frames)
    pictures = FrameReader().read(window.clip, frames, (window.bucket.height, window.bucket.width))
    return {
        "name": window.name,
        "caption": window.clip.caption,
        "mean": cosines.mean().item(),
        "frames": [
            {"frame": frame, "picture": _jpeg(picture), "cosine": [[round(value, 4) for value in row] for row in rows.tolist()]}
            for frame, picture, rows in zip(frames, pictures, cosines.cpu(), strict=True)
        ],
    }


def _jpeg(picture: Tensor) -> str:
    """[3, H, W] uint8 as a data URI."""
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((_PICTURE_WIDTH, _PICTURE_WIDTH))
    return f"data:image/jpeg;base64,{base64.b64encode(as_jpeg(image)).decode('ascii')}"
