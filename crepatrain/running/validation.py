"""Videos of the validation prompts on the way, with the weights as they are, and figures of how steady they are."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from crepatrain.alignment.encoders import VisionEncoder
from crepatrain.config.plan import Plan
from crepatrain.config.sections import ValidationConfig
from crepatrain.data.encode import grid_video, write_video
from crepatrain.errors import UserError
from crepatrain.placement.placing import free_memory
from crepatrain.placement.precision import autocast, in_own_dtype
from crepatrain.preparing.precompute import Caches
from crepatrain.records.events import VideosMade
from crepatrain.records.runfolder import RunFolder
from crepatrain.running.session import Run
from crepatrain.sampling.pipeline import call, first_frame, training_pipeline
from crepatrain.stopping import Stopped
from crepatrain.training import build

_PROMPT_SHOWN = 60


@dataclass(frozen=True, eq=False)
class Validation:
    """Makes the videos of a run. Only the VAE is loaded for them, and the teacher's encoder for the figures."""

    run: Run
    caches: Caches

    @staticmethod
    def wanted(config: ValidationConfig, step: int, total: int) -> bool:
        """Whether videos are made at a step of a run of `total`."""
        return config.validation_prompts is not None and (step >= total or step % config.validation_steps == 0)

    @classmethod
    def owed(cls, plan: Plan, folder: RunFolder, step: int, total: int) -> bool:
        """Whether videos are due before a run goes on: the base's, or those that a kill behind a checkpoint has cost.

        Also where it has only cost what is measured of them.
        """
        config = plan.config.validation
        if not cls.wanted(config, step, total):
            return False
        videos = len(config.validation_prompts or ())
        unmeasured = plan.encoder is not None and folder.figures_at(step) < videos
        return step == 0 or unmeasured or not folder.video(step).is_file()

    def validate(self) -> bool:
        """A grid of all prompts in RUN/samples, and a line of figures for each.

        Every process makes the same forwards. Random numbers of the training are untouched, and memory is given back.

        Returns:
            Whether it was made: a signal to stop ends it early where there is one process.
        """
        with self.run.apart_from_training():
            videos = self._make()
            if videos is not None and self.run.folder.writes:
                self._keep(videos)
        return videos is not None

    def _make(self) -> list[np.ndarray] | None:
        """A video [F, H, W, 3] uint8 of each prompt; None where a signal came."""
        run, context = self.run, self.run.context
        context.screen.say(f"validating at step {run.state.step}: {len(run.config.validation.validation_prompts or ())} videos")
        devices = [context.device] if context.device.type == "cuda" else []
        run.transformer.module.eval()
        try:
            with _fitting(), torch.random.fork_rng(devices=devices), torch.no_grad():
                return self._videos()
        except Stopped:
            return None
        finally:
            run.transformer.module.train()
            free_memory()

    def _keep(self, videos: list[np.ndarray]) -> None:
        run, config, step = self.run, self.run.config, self.run.state.step
        prompts = config.validation.validation_prompts or []
        path, by_prompt = run.folder.video(step), dict(zip(_numbered(prompts), videos, strict=True))
        labelled = [(f"{path.stem} {prompt[:_PROMPT_SHOWN]}", video) for prompt, video in zip(prompts, videos, strict=True)]
        facts = {
            "prompts": prompts,
            "seed": config.validation.validation_seed,
            "steps": config.validation.validation_sampling_steps,
            "step": step,
        }
        write_video(path, grid_video([labelled]), fps=run.context.plan.fps, facts=facts)
        try:
            if run.context.plan.encoder is not None:
                self._measure(by_prompt)
        finally:  # the videos are there, whatever comes of their figures
            run.events.emit(VideosMade(step, by_prompt, path))

    def _videos(self) -> list[np.ndarray]:
        run, config, device = self.run, self.run.config, self.run.context.device
        settings = run.family.sample_defaults(*run.context.plan.size, run.context.plan.fps) | {
            "steps": config.validation.validation_sampling_steps
        }
        pipeline, arguments = self._pipeline(), run.family.pipeline_arguments(settings)
        videos = []
        for number, prompt in enumerate(config.validation.validation_prompts or ()):
            asked = arguments | {"prompt": None, "negative_prompt": None} | self._text(prompt)
            if config.validation.validation_images and run.context.plan.task == "i2v":
                asked["image"] = first_frame(
                    Path(config.validation.validation_images[number]), (settings["height"], settings["width"])
                )
            generator = torch.Generator().manual_seed(config.validation.validation_seed)
            with autocast(config.loop, device):
                videos.append(call(pipeline, asked, generator, self._denoised))
        return videos

    def _denoised(self) -> None:
        """Behind every denoising step. Several processes go on together."""
        self.run.folder.beat(self.run.state.step)
        if not self.run.several:
            self.run.context.stop.check("while a video was made")

    def _pipeline(self) -> Any:
        """The family's pipeline around the transformer in training; prompts come encoded, so it needs no text encoder."""
        plan, device, family = self.run.context.plan, self.run.context.device, self.run.family
        folder, vae = build.model_folder(plan), build.build_vae(plan, family, device)
        for method in ("encode", "decode"):
            setattr(vae, method, in_own_dtype(getattr(vae, method), vae.dtype, device))
        return training_pipeline(family, folder, self.run.transformer.module, vae, plan.variant.text_parts, device)

    def _text(self, prompt: str) -> dict[str, Tensor]:
        """The prompt and the negative one of `sample`, encoded."""
        family, store = self.run.family, self.caches.store
        assert self.caches.negative is not None
        text, negative = (
            family.collate_text([store.read("text", key)]) for key in (self.caches.text[prompt], self.caches.negative)
        )
        return {name: tensor.to(self.run.context.device) for name, tensor in family.text_arguments(text, negative).items()}

    def _measure(self, videos: Mapping[str, np.ndarray]) -> None:
        plan, device = self.run.context.plan, self.run.context.device
        encoder = build.build_encoder(plan, device)
        lines = []
        for prompt, video in videos.items():
            frames = torch.from_numpy(video).permute(0, 3, 1, 2)
            lines.append({"prompt": prompt} | steadiness(encoder, frames.to(device), plan))
        self.run.folder.log_figures(self.run.state.step, lines)
        del encoder
        free_memory()


def _numbered(prompts: list[str]) -> list[str]:
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
