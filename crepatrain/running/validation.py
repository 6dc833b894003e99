"""Videos of the validation prompts on the way, with the weights as they are, and figures of how steady they are."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from crepatrain.adapters.recipe import sample_defaults
from crepatrain.alignment.encoders import VisionEncoder
from crepatrain.config.plan import Plan
from crepatrain.config.sections import RunConfig
from crepatrain.data.encode import grid_video, write_video
from crepatrain.errors import UserError
from crepatrain.placement.precision import autocast
from crepatrain.preparing.precompute import Caches, free_memory
from crepatrain.records.runfolder import RunFolder
from crepatrain.reporting.report import refresh_report
from crepatrain.running.session import Run
from crepatrain.sampling.pipeline import call, first_frame
from crepatrain.screen import Screen
from crepatrain.stopping import Stopped, StopSignal
from crepatrain.training import build

_PROMPT_SHOWN = 60


@dataclass(frozen=True, eq=False)
class Validation:
    """Makes the videos of a run. Only the VAE is loaded for them, and the teacher's encoder for the figures."""

    run: Run
    plan: Plan
    caches: Caches
    screen: Screen
    stop: StopSignal

    @staticmethod
    def wanted(config: RunConfig, step: int, total: int) -> bool:
        """Whether videos are made at a step of a run of `total`."""
        return config.validation_prompts is not None and (step >= total or step % config.validation_steps == 0)

    @classmethod
    def owed(cls, config: RunConfig, folder: RunFolder, step: int, total: int) -> bool:
        """Whether videos are due before a run goes on: the base's, or those that a kill behind a checkpoint has cost."""
        return cls.wanted(config, step, total) and (step == 0 or not _video(folder, step).is_file())

    def due(self) -> bool:
        """Whether videos are wanted at the step that the run has reached."""
        return self.wanted(self.run.config, self.run.state.step, self.run.total)

    def make(self) -> bool:
        """A grid of all prompts in RUN/samples, and a line of figures for each.

        Every process makes the same forwards. Random numbers of the training are untouched, and memory is given back.

        Returns:
            Whether it was made: a signal to stop ends it early where there is one process.
        """
        run, config, device = self.run, self.plan.config, self.run.accelerator.device
        prompts = config.validation_prompts or []
        self.screen.say(f"validating at step {run.state.step}: {len(prompts)} videos")
        devices = [device] if device.type == "cuda" else []
        run.adapted.eval()
        try:
            with _fitting(), torch.random.fork_rng(devices=devices), torch.no_grad():
                videos = self._videos(prompts, device)
        except Stopped:
            return False
        finally:
            run.adapted.train()
            free_memory()
        if not run.accelerator.is_main_process:
            return True
        fps = config.fps
        assert fps is not None
        name = f"step-{run.state.step:06d}"
        labelled = [(f"{name} {prompt[:_PROMPT_SHOWN]}", video) for prompt, video in zip(prompts, videos, strict=True)]
        facts = {
            "prompts": prompts,
            "seed": config.validation_seed,
            "steps": config.validation_sampling_steps,
            "step": run.state.step,
        }
        path, by_prompt = _video(run.folder, run.state.step), dict(zip(_told_apart(prompts), videos, strict=True))
        write_video(path, grid_video([labelled]), fps=fps, facts=facts)
        run.folder.show(run.state.step, by_prompt, path)
        if self.plan.encoder is not None:
            self._measure(by_prompt, device)
        with contextlib.suppress(UserError):  # the training goes on without it
            refresh_report(run.folder.root)
        return True

    def _videos(self, prompts: list[str], device: torch.device) -> list[np.ndarray]:
        run, config = self.run, self.plan.config
        settings = sample_defaults(config, run.family) | {"steps": config.validation_sampling_steps}
        pipeline, arguments = self._pipeline(device), run.family.ask(settings)
        videos = []
        for number, prompt in enumerate(prompts):
            asked = arguments | {"prompt": None, "negative_prompt": None} | self._text(prompt, device)
            if config.validation_images and self.plan.task == "i2v":
                asked["image"] = first_frame(Path(config.validation_images[number]), (settings["height"], settings["width"]))
            generator = torch.Generator().manual_seed(config.validation_seed)
            with autocast(config, device):
                videos.append(call(pipeline, asked, generator, self._denoised))
        return videos

    def _denoised(self) -> None:
        """Behind every denoising step. Several processes go on together."""
        if self.run.accelerator.num_processes == 1:
            self.stop.check("while a video was made")

    def _pipeline(self, device: torch.device) -> Any:
        """The family's pipeline around the transformer in training; prompts come encoded, so it needs no text encoder."""
        family = self.run.family
        texts = [part for part in self.plan.variant.parts if part.startswith(("text_encoder", "tokenizer"))]
        parts = {"transformer": self.run.adapted, "vae": build.build_vae(self.plan, family, device), **dict.fromkeys(texts)}
        kind = getattr(diffusers, family.spec.pipelines[self.plan.task])
        pipeline = kind.from_pretrained(build.model_folder(self.plan), **parts).to(device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _text(self, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """The prompt and the negative one of `sample`, encoded."""
        family, store = self.run.family, self.caches.store
        assert self.caches.negative is not None
        text, negative = (
            family.collate_text([store.read("text", key)]) for key in (self.caches.text[prompt], self.caches.negative)
        )
        return {name: tensor.to(device) for name, tensor in family.ask_text(text, negative).items()}

    def _measure(self, videos: Mapping[str, np.ndarray], device: torch.device) -> None:
        encoder = build.build_encoder(self.plan, device)
        with (self.run.folder.root / "samples" / "figures.jsonl").open("a", encoding="utf-8") as file:
            for prompt, video in videos.items():
                frames = torch.from_numpy(video).permute(0, 3, 1, 2)
                line = {"step": self.run.state.step, "prompt": prompt} | steadiness(encoder, frames.to(device), self.plan)
                file.write(json.dumps(line) + "\n")
        del encoder
        free_memory()


def _video(folder: RunFolder, step: int) -> Path:
    return folder.root / "samples" / f"step-{step:06d}.mp4"


def _told_apart(prompts: list[str]) -> list[str]:
    """The same prompt may stand there twice, for two images."""
    return [f"{prompt} ({number})" if prompts.count(prompt) > 1 else prompt for number, prompt in enumerate(prompts, start=1)]


@contextlib.contextmanager
def _fitting() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "validation_prompts: out of GPU memory while a video was made",
            "set vae_dtype to bfloat16, lower num_frames, height and width, or leave validation_prompts out",
        ) from error


@torch.no_grad()
def steadiness(encoder: VisionEncoder, frames: Tensor, plan: Plan) -> dict[str, float]:
    """How much the patches of a video change from frame to frame, and how alike its frames are from end to end.

    Args:
        frames: [F, 3, H, W] uint8.

    Returns:
        flicker: 1 - the mean cosine of a patch with itself in the next frame, so 0 is a still; consistency: the mean cosine
        between the mean features of all pairs of frames, so 1 is one subject throughout.
    """
    features = encoder(frames.unsqueeze(0), plan.encoder_size(plan.grid)).values[0].float()  # [F, P, E]
    if len(features) < 2:
        return {"flicker": 0.0, "consistency": 1.0}
    adjacent = F.cosine_similarity(features[1:], features[:-1], dim=-1).mean()
    means = F.normalize(features.mean(dim=1), dim=-1)
    alike = means @ means.T
    others = ~torch.eye(len(means), dtype=torch.bool, device=alike.device)
    return {"flicker": 1 - adjacent.item(), "consistency": alike[others].mean().item()}
