"""Videos from an adapter, beside those of the model without it."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from crepatrain.adapters.adapter_file import read_adapter
from crepatrain.adapters.recipe import SCHEMA, public_name
from crepatrain.config.checks import wanted_size
from crepatrain.config.sections import RunConfig
from crepatrain.config.sources import BASE_KEY, fetch, read_checkpoint
from crepatrain.data.encode import grid_video, write_video
from crepatrain.data.index import choose_captions, list_clips
from crepatrain.errors import UserError
from crepatrain.families import get_family
from crepatrain.families.base import Family
from crepatrain.outputs import expect_writable
from crepatrain.records.layout import ADAPTER_FILE
from crepatrain.records.runfolder import adapter_name, config_of
from crepatrain.sampling.pipeline import call, first_frame
from crepatrain.screen import Screen
from crepatrain.specs import FAMILIES, Expert, Task
from crepatrain.training.checkpoint import checkpoints, step_of


@dataclass(frozen=True)
class Wish:
    """What a user asks for; None: what the recipe says.

    Attributes:
        at: optimizer steps of a run whose adapters are compared.
        strengths: of the adapter, beside 0.
        base: pipeline folder or hub id in the place of the recipe's.
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


@dataclass(frozen=True, eq=False)
class _Source:
    """What is sampled.

    Attributes:
        adapters: files by label; empty for a run that trained the whole transformer.
        transformer: folder of such a run's own.
        settings: a recipe's `sample`.
        prompt: where the user gives none.
        prompt_is_caption: whether that is one of a clip.
        folder: where videos go.
        step: optimizer steps behind what is sampled; None where several are compared.
    """

    family: Family
    base: str
    revision: str | None
    adapters: Mapping[str, Path]
    transformer: Path | None
    settings: dict[str, Any]
    prompt: str | None
    prompt_is_caption: bool
    folder: Path
    step: int | None


def sample(target: Path, wish: Wish, screen: Screen) -> None:
    """Write a video of an adapter at its strengths, beside the one without it, from the same seed.

    Args:
        target: a run's folder, or an adapter's file.

    Raises:
        UserError: no such run or adapter, or something that the model can't be asked for.
    """
    source = _open_run(target, wish) if target.is_dir() else _open_adapter(target, wish)
    settings = _settings(source, wish, screen)
    prompt = wish.prompt if wish.prompt is not None else source.prompt
    if prompt is None:
        raise UserError("--prompt is missing", "give it")
    said = {"prompt": prompt, "negative_prompt": settings["negative_prompt"]}
    arguments = source.family.pipeline_arguments(settings) | said | _image(source, wish, settings)
    path = _output(wish.output or _new_name(source.folder, f"sample-{wish.seed}"))
    pipeline = _pipeline(source, screen)
    shown = [_Shown("base", None, 0.0)]
    for label in source.adapters or {"trained": None}:
        shown += [_Shown(label, label if source.adapters else None, strength) for strength in wish.strengths]
    rows: list[list[tuple[str, np.ndarray]]] = []
    with screen.progress("denoising", settings["steps"] * len(shown)) as advance:
        for one in shown:
            frames = _run(pipeline, source, one, arguments, wish.seed, advance)
            rows.append([(str(one), frames)])
    base, made = rows[0][0], [row[0] for row in rows[1:]]
    per_row = len(wish.strengths)
    grid = [[base, *made[start : start + per_row]] for start in range(0, len(made), per_row)]
    facts = {
        "prompt": prompt,
        "caption": source.prompt_is_caption and wish.prompt is None,
        "seed": wish.seed,
        "step": source.step,
        "base": public_name(source.base),
    } | settings
    write_video(path, made[-1][1], fps=settings["fps"], facts=facts | {"shown": str(shown[-1])})
    beside = path.with_name(f"{path.stem}-beside-base.mp4")
    write_video(beside, grid_video(grid), fps=settings["fps"], facts=facts | {"shown": list(map(str, shown))})
    change = float(np.abs(made[-1][1].astype(np.int16) - base[1]).mean())
    screen.rows(
        "videos",
        [("sample", str(path)), ("beside the base", str(beside)), ("the adapter changes", f"{change:.1f} of 255 on average")],
    )
    if change == 0:
        screen.note("the adapter changes nothing; `crepatrain verify` says why")


def _new_name(folder: Path, stem: str) -> Path:
    """A video's name that none has yet."""
    names = (f"{stem}.mp4" if number == 1 else f"{stem}-{number}.mp4" for number in itertools.count(1))
    return next(folder / name for name in names if not (folder / name).exists())


def _output(path: Path) -> Path:
    """Where the video goes, tried before the model is loaded.

    Raises:
        UserError: it can't be written there.
    """
    if path.suffix != ".mp4" or path.is_dir():
        raise UserError(f"--output {path}: not the name of an .mp4", "end it in .mp4")
    expect_writable(path)
    return path


@dataclass(frozen=True)
class _Shown:
    """One video: of an adapter at a strength, of the base at 0."""

    label: str
    adapter: str | None
    strength: float

    def __str__(self) -> str:
        return self.label if self.strength in {0.0, 1.0} else f"{self.label} x {self.strength:g}"


def _family_on(base: str, revision: str | None, name: str, task: Task, expert: Expert | None, *, wished: bool) -> Family:
    """The family as the base is, which the adapter must be for.

    Args:
        wished: whether the user named the base for this sample.
    """
    key = "--base" if wished else BASE_KEY
    checkpoint, variant = read_checkpoint(base, revision, FAMILIES[name], expert, online=True, key=key)
    if task not in variant.tasks or expert != variant.expert:
        wanted = {"t2v": "text-to-video", "i2v": "image-to-video"}[task] + (
            f" with two experts, the {expert}-noise one" if expert else ""
        )
        raise UserError(
            f"{key} {base}: it is {variant.title}, and this was trained for {wanted}", "give the base it was trained on"
        )
    return get_family(name, checkpoint, task=task, expert=expert)


def _open_run(root: Path, wish: Wish) -> _Source:
    config = config_of(root)
    base, revision = wish.base or config.pretrained_model_name_or_path, None if wish.base else config.revision
    assert config.task is not None
    family = _family_on(base, revision, config.model_family, config.task, config.wan_expert, wished=wish.base is not None)
    adapters, transformer = {}, None
    if config.model_type == "full":
        transformer = root / family.variant.transformer
        if wish.at:
            raise UserError("--at: this run trained the whole transformer, and keeps the last alone", "leave it out")
        if wish.strengths != (1.0,):
            raise UserError("--strength: this run trained the whole transformer, which has none", "leave it out")
        found = transformer.is_dir()
    else:
        name = adapter_name(config, family)
        named = {f"step {step}": root / "adapters" / f"{name}-{step:06d}.safetensors" for step in wish.at}
        adapters = named or {"adapter": root / ADAPTER_FILE}
        found = all(path.is_file() for path in adapters.values())
    if not found:
        gone = next((path for path in adapters.values() if not path.is_file()), transformer)
        raise UserError(f"{gone}: there is no such file", f"see what is in {root / 'adapters'}")
    if transformer:
        saved = checkpoints(root / "checkpoints")
        assert config.fps is not None
        settings, step = family.sample_defaults(*wanted_size(config), config.fps), step_of(saved[-1]) if saved else None
    else:
        recipe = read_adapter(next(iter(adapters.values()))).recipe()
        settings, step = dict(recipe["sample"]), None if wish.at else recipe["step"]
    prompts = config.validation_prompts
    prompt = prompts[0] if prompts else _some_caption(config)
    return _Source(family, base, revision, adapters, transformer, settings, prompt, not prompts, root / "samples", step)


def _some_caption(config: RunConfig) -> str | None:
    """Of the clips that were trained on."""
    try:
        captioned, _ = choose_captions(list_clips(Path(config.train_data)), "skip")
    except UserError:  # the dataset is elsewhere by now
        return None
    return captioned[0][1] if captioned else None


def _open_adapter(path: Path, wish: Wish) -> _Source:
    if wish.at:
        raise UserError("--at: it compares the checkpoints of a run", "give the run's folder")
    if not path.is_file():
        raise UserError(f"{path}: no such file", "give a run's folder or an adapter's file")
    recipe = read_adapter(path).recipe()
    if recipe.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: its header holds no recipe of crepatrain, so how it is to be sampled is unknown",
            "sample it in your program; `crepatrain verify` says how it is loaded",
        )
    base = wish.base or recipe["base"]["repo"]
    if wish.base is None and "/" not in base:
        raise UserError(f"{path}: its base was a local folder called {base}", "say with --base where it is")
    revision = None if wish.base else recipe["base"]["revision"]
    family = _family_on(base, revision, recipe["family"], recipe["task"], recipe["expert"], wished=wish.base is not None)
    trigger = recipe["train"]["trigger"]
    settings = dict(recipe["sample"])
    return _Source(family, base, revision, {"adapter": path}, None, settings, trigger, False, path.parent, recipe["step"])


def _settings(source: _Source, wish: Wish, screen: Screen) -> dict[str, Any]:
    """The recipe's settings with what the user wants instead, each difference told.

    Raises:
        UserError: a size that the model can't take.
    """
    if wish.guidance is not None and not math.isfinite(wish.guidance):
        raise UserError(f"--guidance {wish.guidance:g}: not a finite number", "give a number")
    settings = dict(source.settings)
    for name, value in source.family.sampler_facts(settings["frames"], settings["height"], settings["width"]).items():
        if value != settings[name]:
            screen.note(f"{name}: {value}, as {source.base} has it, instead of the recipe's {settings[name]}")
            settings[name] = value
    for name in ("steps", "guidance", "frames", "height", "width", "negative_prompt"):
        wanted = getattr(wish, name)
        if wanted is not None and wanted != settings[name]:
            screen.note(f"{name}: {wanted} instead of the recipe's {settings[name]}")
            settings[name] = wanted
    source.family.geometry.latent_shape(settings["frames"], settings["height"], settings["width"])
    return settings


def _image(source: _Source, wish: Wish, settings: Mapping[str, Any]) -> dict[str, Image.Image]:
    if source.family.task == "t2v":
        if wish.image:
            raise UserError(f"--image {wish.image}: the run was trained from text alone", "leave it out")
        return {}
    if wish.image is None:
        raise UserError("--image is missing", "give an image, or a clip whose first frame is taken, as the run is image-to-video")
    return {"image": first_frame(wish.image, (settings["height"], settings["width"]))}


def _pipeline(source: _Source, screen: Screen) -> Any:
    """The family's pipeline with the adapters loaded, on the GPU part by part where there is one."""
    family, spec = source.family, source.family.spec
    folder = _base_folder(source)
    screen.say(f"loading {source.base}")
    cuda = torch.cuda.is_available()
    parts = {}
    if source.transformer:
        dtype = torch.bfloat16 if cuda else torch.float32
        parts[family.variant.transformer] = family.load_transformer(str(source.transformer.parent), dtype)
    pipeline = getattr(diffusers, spec.pipelines[family.task]).from_pretrained(
        folder, torch_dtype=torch.bfloat16 if cuda else torch.float32, **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    if family.geometry.tile > 1:
        pipeline.transformer.set_attention_backend("flex")
    second = {"load_into_transformer_2": True} if family.variant.expert == "low" else {}
    for label, path in source.adapters.items():
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=_name(label), **second)
    if cuda:
        pipeline.enable_model_cpu_offload()
    return pipeline


def _base_folder(source: _Source) -> Path:
    """The base's local folder, with all parts of its pipeline; some repositories hold much more beside them."""
    parts = [name for name, kind in source.family.checkpoint.model_index.items() if isinstance(kind, list) and any(kind)]
    patterns = ("model_index.json", *(f"{part}/*" for part in parts or source.family.variant.parts))
    return fetch(BASE_KEY, source.base, source.revision, patterns)


def _name(label: str) -> str:
    return label.replace(" ", "-")


def _run(
    pipeline: Any, source: _Source, shown: _Shown, arguments: Mapping[str, Any], seed: int, advance: Callable[[], None]
) -> np.ndarray:
    """One video [F, H, W, 3] uint8."""
    generator = torch.Generator().manual_seed(seed)
    with _strength(pipeline, source, shown):
        return call(pipeline, dict(arguments), generator, advance)


@contextmanager
def _strength(pipeline: Any, source: _Source, shown: _Shown) -> Iterator[None]:
    adapted = getattr(pipeline, source.family.variant.transformer)
    if not source.adapters:
        if shown.strength:
            yield
            return
        # The base's own transformer, for as long as it is asked for.
        own = source.family.load_transformer(str(_base_folder(source)), adapted.dtype)
        _exchange(pipeline, source, own)
        try:
            yield
        finally:
            _exchange(pipeline, source, adapted)
        return
    if shown.adapter is None:
        adapted.disable_adapters()
    else:
        adapted.enable_adapters()
        adapted.set_adapters([_name(shown.adapter)], [shown.strength])
    yield


def _exchange(pipeline: Any, source: _Source, transformer: Any) -> None:
    """Put another transformer into the pipeline, and under its offloading."""
    offloaded = torch.cuda.is_available()
    if offloaded:
        pipeline.remove_all_hooks()
    setattr(pipeline, source.family.variant.transformer, transformer)
    if offloaded:
        pipeline.enable_model_cpu_offload()
