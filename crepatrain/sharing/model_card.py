"""The README.md of a repository on the hub: what a run has made, for people and for the hub's own pages."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from crepatrain.adapters.compatibility import comfyui_hint, load_call
from crepatrain.errors import UserError
from crepatrain.families.base import Family
from crepatrain.labels import LABELS
from crepatrain.records.reading import RunRecord, first_and_last, mean

# What is between these is written anew each time; the rest of a card is its owner's.
_BEGIN, _END = "<!-- crepatrain: begin, written anew by `crepatrain push` -->", "<!-- crepatrain: end -->"
_TASKS = {"t2v": ("text-to-video", "text"), "i2v": ("image-to-video", "text and a first frame")}
_NUMBERS = ("diffusion_loss", "crepa_alignment_score", "crepa_similarity_self")


@dataclass(frozen=True)
class Shown:
    """A video of the card: its place in the repository, its prompts, and whether the base alone has made it."""

    place: str
    prompts: Sequence[str]
    base: bool = False

    @property
    def words(self) -> str:
        return ("before training: " if self.base else "") + "; ".join(self.prompts)


@dataclass(frozen=True, eq=False)
class Card:
    """What a card is written from.

    Attributes:
        repo: on the hub.
        weights: in the repository: the adapter's file, or the transformer's folder.
        recipe: as an adapter's header holds it.
    """

    run: RunRecord
    family: Family
    repo: str
    weights: str
    recipe: Mapping[str, Any]
    videos: Sequence[Shown]

    def over(self, before: str | None) -> str:
        """The card's text; everything in the one before stays that `crepatrain push` did not write.

        Raises:
            UserError: that one can't be read.
        """
        try:
            card = ModelCard(before or f"---\n{{}}\n---\n{_BEGIN}\n{_END}\n")
            kept = card.data.to_dict()
        except (ValueError, TypeError, YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the card's metadata can't be read ({reason})", "fix what is between its --- lines") from error
        head, begun, rest = card.text.partition(_BEGIN)
        _, ended, tail = rest.partition(_END)
        if begun and not ended:
            raise UserError(f"the card has lost the line {_END}", "put it back behind what `crepatrain push` has written")
        own = self._metadata()
        own["tags"] = list(dict.fromkeys([*own["tags"], *kept.get("tags", [])]))
        card.data = ModelCardData(**(kept | own))
        part = f"{_BEGIN}\n{self._text()}\n{_END}"
        card.text = head + part + tail if begun else f"{card.text.rstrip()}\n\n{part}\n"
        return str(card)

    @property
    def _lora(self) -> bool:
        return self.weights.endswith(".safetensors")

    @property
    def base(self) -> str:
        """A hub id, or the name of a local folder."""
        return self.recipe["base"]["repo"]

    @property
    def links_base(self) -> bool:
        """Whether the base is on the hub."""
        return "/" in self.base

    def _metadata(self) -> dict[str, Any]:
        tag = _TASKS[self.family.task][0]
        own = ["lora", "template:diffusion-lora"] if self._lora else []
        metadata: dict[str, Any] = {
            "library_name": "diffusers",
            "pipeline_tag": tag,
            "tags": [tag, "diffusers", *own, self.family.variant.architecture, *(["crepa"] if self.recipe["crepa"] else [])],
            "widget": [{"text": video.words, "output": {"url": video.place}} for video in self.videos],
        }
        if self.links_base:
            metadata |= {"base_model": self.base, "base_model_relation": "adapter" if self._lora else "finetune"}
        if self.recipe["train"]["trigger"]:
            metadata["instance_prompt"] = self.recipe["train"]["trigger"]
        return {key: value for key, value in metadata.items() if value}

    def _text(self) -> str:
        recipe, spec = self.recipe, self.family.spec
        what = f"A LoRA of rank {recipe['rank']}" if self._lora else "A whole transformer"
        base = f"[{self.base}](https://huggingface.co/{self.base})" if self.links_base else f"`{self.base}`"
        parts = [
            f"# {self.repo.rpartition('/')[2]}",
            f"{what} for {base} ({recipe['variant']}, from {_TASKS[self.family.task][1]}), after {recipe['step']} steps.",
        ]
        if recipe["expert"]:
            parts.append(
                f"It belongs to the {recipe['expert']}-noise transformer of two; the other one's adapter is a file of its own."
            )
        if self.videos:
            parts.append("<Gallery />")
        if recipe["train"]["trigger"]:
            parts.append(f"Trigger word: `{recipe['train']['trigger']}`")
        parts += ["## Use it", f"```python\n{self._snippet()}\n```"]
        if self._lora and spec.comfyui:
            parts.append(f"In ComfyUI put `{self.weights}` into `models/loras` and load it at strength 1{comfyui_hint(spec)}.")
        parts += ["## How it is sampled", _table(self._sampling()), "## How it was trained", _table(self._training())]
        if numbers := self._numbers():
            parts.append("Means over the first and the last tenth of these steps; of held-out clips the first and the last:")
            parts.append(_table(numbers, ("", "first", "last")))
        return "\n\n".join(parts)

    def _snippet(self) -> str:
        family, recipe = self.family, self.recipe
        kind = family.pipeline
        own = "" if self._lora else f", {family.spec.transformer_class}"
        lines = ["import torch", f"from diffusers import {kind}{own}", "from diffusers.utils import export_to_video"]
        image = family.task == "i2v"
        if image:
            lines[-1] += ", load_image"
        part = family.variant.transformer
        given = ""
        if not self._lora:
            lines.append(
                f'{part} = {family.spec.transformer_class}.from_pretrained("{self.repo}", subfolder="{part}", '
                "torch_dtype=torch.bfloat16)"
            )
            given = f"{part}={part}, "
        lines += ["", f'pipeline = {kind}.from_pretrained("{self.base}", {given}torch_dtype=torch.bfloat16).to("cuda")']
        if self._lora:
            lines.append(load_call(self.repo, self.weights, recipe["expert"]))
        asked = {"negative_prompt": recipe["sample"]["negative_prompt"]} | family.pipeline_arguments(recipe["sample"])
        prompt = self.videos[0].prompts[0] if self.videos else recipe["train"]["trigger"] or "..."
        arguments = [f"prompt={prompt!r}", *(['image=load_image("first-frame.png")'] if image else [])]
        arguments += [f"{name}={value!r}" for name, value in asked.items()]
        called = "".join(f"    {argument},\n" for argument in arguments)
        lines += [
            f"video = pipeline(\n{called}).frames[0]",
            f'export_to_video(video, "video.mp4", fps={recipe["sample"]["fps"]:g})',
        ]
        return "\n".join(lines)

    def _sampling(self) -> list[tuple[str, str]]:
        sample = self.recipe["sample"]
        guidance = f"{sample['guidance']:g}" + (
            f", low noise {sample['guidance_2']:g}" if sample["guidance_2"] is not None else ""
        )
        return [
            ("frames, size, rate", f"{sample['frames']} of {sample['width']} x {sample['height']} at {sample['fps']:g} fps"),
            ("scheduler", f"{sample['scheduler_class']}, shift {sample['shift']:.3g}"),
            ("steps, guidance", f"{sample['steps']}, {guidance}"),
        ]

    def _training(self) -> list[tuple[str, str]]:
        recipe, config, facts = self.recipe, self.run.config, self.run.dataset
        crepa, sizes = recipe["crepa"], recipe["train"]
        rows = [
            ("steps", f"{recipe['step']}, batch {facts['unit']}" if facts else str(recipe["step"])),
            ("clips", f"{facts['clips']}, {facts['windows']} windows" if facts else ""),
            (
                "frames, size",
                f"{sizes['frames']} of " + ", ".join(f"{width} x {height}" for height, width in _resolutions(sizes)),
            ),
            ("learning rate", f"{config['learning_rate']:g}, {config['lr_scheduler']}, {config['optimizer']}"),
            ("noise levels", f"{sizes['timestep_sampling']}, shift {sizes['shift']:g}"),
        ]
        if self._lora:
            scale = " (rsLoRA)" if recipe["rslora"] else ""
            rows.append(
                ("adapter", f"rank {recipe['rank']}, alpha {recipe['alpha_trained']:g}{scale}, on {', '.join(recipe['targets'])}")
            )
        if crepa:
            teacher = crepa["encoder"] or "a deeper block"
            rows.append(("CREPA", f"{crepa['lambda']:g} ({crepa['scheduler']}), block {crepa['block']}, toward {teacher}"))
        if recipe["ema"]["used"]:
            rows.append(("weights", f"an average over the steps, decay {recipe['ema']['decay']:g}"))
        rows.append(("made with", ", ".join(f"{name} {version}" for name, version in recipe["versions"].items())))
        return [(topic, words) for topic, words in rows if words]

    def _numbers(self) -> list[tuple[str, str, str]]:
        """Of the steps behind these weights."""
        found = []
        for key in _NUMBERS:
            first, last = map(mean, first_and_last(self._column(key)))
            if first is not None and last is not None:
                found.append((LABELS[key], f"{first:.4f}", f"{last:.4f}"))
        losses = self._column("eval_loss")
        if losses:
            found.append(("loss of held-out clips", f"{losses[0]:.4f}", f"{losses[-1]:.4f}"))
        return found

    def _column(self, key: str) -> list[float]:
        return [value for step, value in zip(*self.run.column(key), strict=True) if step <= self.recipe["step"]]


def _resolutions(sizes: Mapping[str, Any]) -> list[list[int]]:
    """Of a recipe's `train`; the first version's recipes have one."""
    return sizes["resolutions"] if "resolutions" in sizes else [sizes["resolution"]]


def _table(rows: Sequence[Sequence[str]], header: Sequence[str] = ("", "")) -> str:
    lines = [header, ["---"] * len(header), *([re.sub(r"\s+", " ", cell).replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
