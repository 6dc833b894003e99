"""Making videos with an adapter, beside those of the model without it."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crepatrain.adapters.adapter_file import read_adapter
from crepatrain.adapters.recipe import SCHEMA, public_name
from crepatrain.config.data_section import DataConfig
from crepatrain.config.datasets import read_datasets
from crepatrain.config.fields import Quantization, TextQuantization
from crepatrain.config.memory_checks import check_package
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.config.sources import BASE_KEY, read_checkpoint
from crepatrain.data.encode import grid_video, write_video
from crepatrain.data.listing import choose_captions, list_clips
from crepatrain.errors import UserError
from crepatrain.families import get_family
from crepatrain.families.base import Family
from crepatrain.outputs import expect_writable, is_run
from crepatrain.placement.devices import open_device
from crepatrain.records.layout import BESIDE_BASE, RunLayout, checkpoints, step_of
from crepatrain.records.opening import adapter_name, config_of
from crepatrain.records.whole import expect_whole_transformer
from crepatrain.sampling.comparison import Held, TrainedModel, candidates, encode_texts, open_pipeline, sample_candidate
from crepatrain.sampling.pipeline import first_frame
from crepatrain.screen import Screen
from crepatrain.specs import FAMILIES, Expert, Task
from crepatrain.training.text_encoders import TextEncoding


@dataclass(frozen=True)
class SampleOptions:
    """What a user asks for; None: what the recipe says.

    Attributes:
        at: optimizer steps of a run whose adapters are compared.
        strengths: of the adapter, beside 0.
        base: pipeline folder or hub id in place of the recipe's.
        base_quantization: how the blocks of the transformers are held; the recipe names that of the training, which is not taken.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    image: Path | None = None
    steps: int | None = None
    guidance: float | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 42
    at: tuple[int, ...] = ()
    strengths: tuple[float, ...] = (1.0,)
    base: str | None = None
    output: Path | None = None
    base_quantization: Quantization = "none"
    text_encoder_quantization: TextQuantization | None = None
    vae_tiling: bool | None = None


@dataclass(frozen=True, eq=False)
class _Source:
    """What is sampled, and how its recipe says it is.

    Attributes:
        settings: a recipe's `sample`.
        prompt: where the user gives none.
        prompt_is_caption: whether that is the caption of a clip.
        folder: where videos are written.
        step: optimizer steps behind what is sampled; None where several steps are compared.
    """

    model: TrainedModel
    settings: dict[str, Any]
    prompt: str | None
    prompt_is_caption: bool
    folder: Path
    step: int | None


def sample(target: Path, options: SampleOptions, screen: Screen) -> None:
    """Write a video of an adapter at its strengths, beside the one without it, from the same seed.

    Args:
        target: a run's folder, or an adapter's file.

    Raises:
        UserError: no such run or adapter, or something that the model can't make.
    """
    device = open_device(screen)
    source = _open_run(target, options, screen) if target.is_dir() else _open_adapter(target, options)
    model, family = source.model, source.model.family
    settings = _settings(source, options, screen)
    prompt = options.prompt if options.prompt is not None else source.prompt
    if prompt is None:
        raise UserError("--prompt is missing", "give it")
    arguments = family.pipeline_arguments(settings) | _image(family, options, settings)
    path = _output(options.output or _new_name(source.folder, f"sample-{options.seed}"))
    screen.say(f"loading {model.base}")
    arguments |= encode_texts(model, prompt, settings["negative_prompt"], device, screen)
    pipeline = open_pipeline(model, device, screen)
    compared = candidates(model, options.strengths)
    with screen.progress("denoising", settings["steps"] * len(compared)) as advance:
        videos = [(str(one), sample_candidate(pipeline, model, one, arguments, options.seed, advance)) for one in compared]
    facts = {
        "prompt": prompt,
        "caption": source.prompt_is_caption and options.prompt is None,
        "seed": options.seed,
        "step": source.step,
        "base": public_name(model.base),
    } | settings
    _write(path, videos, len(options.strengths), facts, screen)


def _write(path: Path, videos: list[tuple[str, np.ndarray]], per_row: int, facts: dict[str, Any], screen: Screen) -> None:
    """The last video, a grid of all of them beside the base, and a table that says where they are."""
    base, made = videos[0], videos[1:]
    label, last = made[-1]
    grid = [[base, *made[start : start + per_row]] for start in range(0, len(made), per_row)]
    write_video(path, last, fps=facts["fps"], facts=facts | {"shown": label})
    beside = path.with_name(f"{path.stem}{BESIDE_BASE}")
    write_video(beside, grid_video(grid), fps=facts["fps"], facts=facts | {"shown": [label for label, _ in videos]})
    change = float(np.abs(last.astype(np.int16) - base[1]).mean())
    screen.rows(
        "videos",
        [("sample", str(path)), ("beside the base", str(beside)), ("the adapter changes", f"{change:.1f} of 255 on average")],
    )
    if change == 0:
        screen.note("the adapter changes nothing; `crepatrain verify` shows why")


def _new_name(folder: Path, stem: str) -> Path:
    """A name that no video has yet."""
    names = (f"{stem}.mp4" if number == 1 else f"{stem}-{number}.mp4" for number in itertools.count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def _output(path: Path) -> Path:
    """Where the video is written, tried before the model is loaded.

    Raises:
        UserError: it can't be written there.
    """
    if path.suffix != ".mp4" or path.is_dir():
        raise UserError(f"--output {path}: not the name of an .mp4 file", "end it in .mp4")
    expect_writable(path)
    return path


def _family_on(base: str, revision: str | None, name: str, task: Task, expert: Expert | None, *, given: bool) -> Family:
    """The family as the base is, which must be what the adapter was trained for.

    Args:
        given: whether the user named the base with --base.
    """
    key = "--base" if given else BASE_KEY
    checkpoint, variant = read_checkpoint(base, revision, FAMILIES[name], expert, online=True, key=key)
    if task not in variant.tasks or expert != variant.expert:
        kind = {"t2v": "text-to-video", "i2v": "image-to-video"}[task]
        kind += f" with two experts, the {expert}-noise one" if expert else ""
        raise UserError(
            f"{key} {base}: it is {variant.title}, and this was trained for {kind}", "give the base it was trained on"
        )
    return get_family(name, checkpoint, task=task, expert=expert)


def _open_run(root: Path, options: SampleOptions, screen: Screen) -> _Source:
    config, layout = config_of(root, screen), RunLayout(root)
    base = options.base or config.model.pretrained_model_name_or_path
    revision = None if options.base else config.model.revision
    family = _family_on(
        base, revision, config.model.model_family, config.model.task, config.model.wan_expert, given=options.base is not None
    )
    adapters, transformer = _trained_files(layout, config, family, options)
    if transformer:
        expect_whole_transformer(transformer, f"write it again with `crepatrain export {root}`, and put that in its place")
        saved = checkpoints(layout.checkpoints)
        settings = family.sample_defaults(*config.data.size, config.data.rate(family.variant.fps))
        step = step_of(saved[-1]) if saved else None
    else:
        recipe, *_ = [read_adapter(path).recipe() for path in adapters.values()]  # all are read: a damaged one is refused
        settings, step = dict(recipe["sample"]), None if options.at else recipe["step"]
    prompts = config.validation.validation_prompts
    prompt = prompts[0] if prompts else _some_caption(config.data)
    held = _held(options, config.loop.text_encoder_quantization, tiled=config.diffusion.vae_tiling)
    model = TrainedModel(family, base, revision, adapters, transformer, held)
    return _Source(model, settings, prompt, not prompts, layout.samples, step)


def _held(options: SampleOptions, text_quantization: TextQuantization, *, tiled: bool) -> Held:
    """How the model's parts are held: as in training, and as the user asks.

    Raises:
        UserError: a package for it is not installed.
    """
    text = options.text_encoder_quantization or text_quantization
    for option, how in (("--base-quantization", options.base_quantization), ("--text-encoder-quantization", text)):
        if problems := check_package(f"{option} {how}", how):
            raise UserError.of(problems)
    return Held(
        TextEncoding(quantization=text),
        tiled if options.vae_tiling is None else options.vae_tiling,
        options.base_quantization,
    )


def _trained_files(
    layout: RunLayout, config: ResolvedConfig, family: Family, options: SampleOptions
) -> tuple[dict[str, Path], Path | None]:
    """The adapters of a run by label, or the folder of the whole transformer that it trained."""
    if config.model.model_type == "full":
        transformer = layout.result_transformer(family.variant.transformer)
        if options.at:
            raise UserError("--at: this run trained the whole transformer, and keeps only the last one", "leave it out")
        if options.strengths != (1.0,):
            raise UserError("--strength: this run trained the whole transformer, which has none", "leave it out")
        missing, adapters = None if transformer.is_dir() else transformer, {}
    else:
        name, transformer = adapter_name(config.loop, family), None
        named = {f"step {step}": layout.adapter(name, step) for step in options.at}
        adapters = named or {"adapter": layout.result_adapter}
        missing = next((path for path in adapters.values() if not path.is_file()), None)
    if missing:
        raise UserError(f"{missing}: there is no such file", f"look for other steps in {layout.adapters}")
    return adapters, transformer


def _some_caption(config: DataConfig) -> str | None:
    """The first caption of the clips that were trained on."""
    try:
        datasets = read_datasets(config.train_data)
    except UserError:  # the dataset may have been moved since
        return None
    listed = list_clips(datasets[0].path, apart=is_run)
    chosen = choose_captions(listed, "skip", prefix=config.caption_prefix, suffix=config.caption_suffix)
    return chosen.clips[0].caption if chosen.clips else None


def _open_adapter(path: Path, options: SampleOptions) -> _Source:
    if options.at:
        raise UserError("--at: it compares the checkpoints of a run", "give the run's folder")
    if not path.is_file():
        raise UserError(f"{path}: no such file", "give a run's folder or an adapter's file")
    recipe = read_adapter(path).recipe()
    if recipe.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: its header holds no recipe of crepatrain, so how to sample it is unknown",
            "sample it in your program; `crepatrain verify` shows how to load it",
        )
    base = options.base or recipe["base"]["repo"]
    if options.base is None and "/" not in base:
        raise UserError(f"{path}: its base was a local folder called {base}", "give that folder with --base")
    revision = None if options.base else recipe["base"]["revision"]
    family = _family_on(base, revision, recipe["family"], recipe["task"], recipe["expert"], given=options.base is not None)
    trained = recipe["train"]  # an earlier version's lacks both keys
    held = _held(options, trained.get("text_quant") or "none", tiled=trained.get("vae_tiling", False))
    model = TrainedModel(family, base, revision, {"adapter": path}, None, held)
    return _Source(model, dict(recipe["sample"]), recipe["train"]["trigger"], False, path.parent, recipe["step"])


def _settings(source: _Source, options: SampleOptions, screen: Screen) -> dict[str, Any]:
    """The recipe's settings with the user's options in their place; a note names each difference.

    Raises:
        UserError: a size that the model can't make.
    """
    if options.guidance is not None and not math.isfinite(options.guidance):
        raise UserError(f"--guidance {options.guidance:g}: not a finite number", "give a number")
    family, settings = source.model.family, dict(source.settings)
    for name, value in family.sampler_facts(settings["frames"], settings["height"], settings["width"]).items():
        if value != settings[name]:
            screen.note(f"{name}: {value}, as {source.model.base} has it, instead of the recipe's {settings[name]}")
            settings[name] = value
    for name in ("steps", "guidance", "frames", "height", "width", "negative_prompt"):
        value = getattr(options, name)
        if value is not None and value != settings[name]:
            screen.note(f"{name}: {value} instead of the recipe's {settings[name]}")
            settings[name] = value
    family.geometry.latent_shape(settings["frames"], settings["height"], settings["width"])
    return settings


def _image(family: Family, options: SampleOptions, settings: Mapping[str, Any]) -> dict[str, Image.Image]:
    if family.task == "t2v":
        if options.image:
            raise UserError(f"--image {options.image}: the run was trained from text alone", "leave it out")
        return {}
    if options.image is None:
        raise UserError("--image is missing", "give an image, or a clip whose first frame is used: the run is image-to-video")
    return {"image": first_frame(options.image, (settings["height"], settings["width"]))}
