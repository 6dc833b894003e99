"""Adapters with random weights, and their files as a run writes them."""

import torch
from safetensors import safe_open

from crepatrain.adapters.writing import write_result
from crepatrain.records.runfolder import RunFolder
from crepatrain.tensors import Batch
from crepatrain.training import build
from crepatrain.training.checkpoint import write_checkpoint
from crepatrain.training.lora import live_adapter, trained_state


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def randomised(transformer, std=0.2):
    """An adapter that has learned something."""
    torch.manual_seed(0)
    with torch.no_grad():
        for down, up, _ in live_adapter(transformer).values():
            down.normal_(std=std)
            up.normal_(std=std)
    return transformer


@torch.no_grad()
def predict(family, transformer):
    """The transformer's output for a fixed random batch."""
    grid = family.geometry.token_grid(9, 64, 96)
    torch.manual_seed(1)
    latents = torch.randn(1, family.geometry.latent_channels, *family.geometry.latent_shape(9, 64, 96)[-3:])
    text = family.collate_text([{name: torch.randn(shape) for name, shape in family.text_shapes().items()}])
    batch = Batch(latents, latents, torch.tensor([0.7]), text, grid, 16.0, ("key",))
    return family.denoise(transformer, latents, torch.tensor([0.7]), batch)


class FakeRun:
    """A run's folder as `fit` leaves it, of random weights."""

    def __init__(self, plan, limit=None):
        self.plan, self.family = plan, build.build_family(plan)
        self.folder = RunFolder(plan.config)
        self.folder.claim(0)
        self.fingerprint = {
            "models": {part: f"digest of {part}" for part in plan.variant.parts},
            "samples": "digest",
            "unit": 2,
            "windows": 3,
            "total": 9,
            "versions": {"crepatrain": "0", "torch": "0"},
        }

    def checkpoint(self, step, *, keep=True):
        torch.manual_seed(step)
        transformer = build.load_transformer(self.plan, self.family, torch.device("cpu"))
        build.adapt(self.plan, self.family, transformer)
        if self.plan.config.model.model_type == "lora":
            randomised(transformer, std=0.1 * step)
        write_result(self.folder, self.family, self.fingerprint, transformer, step)
        if keep:
            name = {"lora": "adapter", "full": "transformer"}[self.plan.config.model.model_type]
            tensors = {name: trained_state(transformer)}
            write_checkpoint(
                self.folder.checkpoints / f"step-{step:06d}", tensors, trees={}, plain={"fingerprint": self.fingerprint}
            )
        return transformer
