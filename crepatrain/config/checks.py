"""What can be wrong with a config beyond each value's own range: its keys against each other, the disk, and the checkpoint."""

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from crepatrain.config.alignment_sections import CrepaConfig
from crepatrain.config.resolved import ResolvedConfig, ResolvedData
from crepatrain.config.run_config import ALLOWABLE, KEYS, RunConfig
from crepatrain.config.sections import LoopConfig, ModelConfig, ValidationConfig
from crepatrain.errors import Problem, closest
from crepatrain.files import safetensors_header
from crepatrain.geometry import Geometry
from crepatrain.neighbours import reachable_maximum
from crepatrain.specs import EncoderSpec, FamilySpec, Variant
from crepatrain.specs.attention import FLEX, TRAINABLE_BACKENDS, refused_backend

_OPTIMIZER_PACKAGES = {"adamw8bit": ("bitsandbytes", "8bit"), "prodigy": ("prodigyopt", "prodigy")}

# Where diffusers' polynomial schedule ends.
_POLYNOMIAL_END = 1e-7


def maximum_score(config: CrepaConfig, token_frames: int) -> float:
    """The largest value that the score of `crepa_threshold_metric` can reach on clips of this many token frames."""
    if config.crepa_threshold_metric == "self":
        return 1.0
    return reachable_maximum(
        token_frames,
        distance=config.crepa_adjacent_distance,
        tau=config.crepa_adjacent_tau,
        cumulative=config.crepa_cumulative_neighbors,
        normalize_neighbour_sum=config.crepa_normalize_neighbour_sum,
    )


def check_paths(config: ResolvedConfig) -> list[Problem]:
    """The folders of the run and of the cache can be written to."""
    problems = []
    for key in ("output_dir", "cache_dir"):
        path = Path(config.value(key))
        if path.exists() and not path.is_dir():
            problems.append(Problem(f"{key}={path}: it is a file", "give a folder", (key,)))
            continue
        broken = next((str(place) for place in (path, *path.parents) if place.is_symlink() and not place.exists()), None)
        if broken:
            which = "it" if broken == str(path) else broken
            what = f"{key}={path}: {which} is a link that leads nowhere (to {os.readlink(broken)})"  # noqa: PTH115 - the text itself
            problems.append(Problem(what, "remove the link, or make the folder that it leads to", (key,)))
            continue
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK)):
            what = f"{key}={path}: {existing} can't be written to"
            problems.append(Problem(what, "give another folder, or change its permissions", (key,)))
    return problems


def check_allowed(config: LoopConfig) -> list[Problem]:
    """A key that allow_changes names may change without harm to what a checkpoint holds."""
    problems, about = [], ("allow_changes",)
    for key in config.allow_changes:
        if key in ALLOWABLE or (key in KEYS and KEYS[key].may_change):
            continue
        use = f"leave it out; it takes {', '.join(ALLOWABLE)}"
        if key in KEYS:
            what = f"allow_changes: {key} can't change within a run, as its checkpoints depend on it"
            if key in {"train_batch_size", "gradient_accumulation_steps"}:
                what = f"allow_changes: {key} needs no allowance where the samples of a step stay the same, and else can't change"
        else:
            what, close = f"allow_changes: {key!r} is no key", closest(key, ALLOWABLE)
            use = f"did you mean {close}?" if close else use
        problems.append(Problem(what, use, about))
    return problems


def check_length(config: LoopConfig) -> list[Problem]:
    """A run's length is given in one way."""
    steps, epochs = config.max_train_steps, config.num_train_epochs
    if (steps is None) != (epochs is None):
        return []
    which = f"both are set, to {steps} and {epochs}" if steps else "neither is set"
    keys = ("max_train_steps", "num_train_epochs")
    return [Problem(f"{', '.join(keys)}: {which}", "set one of them", keys)]


def check_optimizer(config: ResolvedConfig) -> list[Problem]:
    """The optimizer's package is installed, and its schedule can be built."""
    problems = []
    package, extra = _OPTIMIZER_PACKAGES.get(config.optim.optimizer, ("", ""))
    if package and find_spec(package) is None:
        what = f"optimizer={config.optim.optimizer}: {package} is not installed"
        problems.append(Problem(what, f'run pip install "crepatrain[{extra}]"', ("optimizer",)))
    for key in ("learning_rate", "crepa_projector_lr"):
        rate: float | None = config.value(key)
        if config.optim.lr_scheduler == "polynomial" and rate is not None and rate <= _POLYNOMIAL_END:
            what = f"{key}={rate:g}: lr_scheduler=polynomial ends at {_POLYNOMIAL_END:g}"
            problems.append(Problem(what, "use more, or another lr_scheduler", (key, "lr_scheduler")))
    return problems


def check_attention(config: ResolvedConfig, spec: FamilySpec, geometry: Geometry | None) -> list[Problem]:
    """The attention backend has a backward, is installed, and has an attention of the model to compute.

    Args:
        geometry: None where the checkpoint can't be read.
    """
    backend, about = config.loop.attention_backend, ("attention_backend",)
    if backend is None:
        return []
    what, leave = f"attention_backend={backend}", "use native, or leave it out"
    known = TRAINABLE_BACKENDS.get(backend)
    if known is None:
        close = closest(backend, TRAINABLE_BACKENDS)
        fix = f"did you mean {close}?" if close else f"use one of {', '.join(TRAINABLE_BACKENDS)}"
        reason, fix = refused_backend(backend) or ("it is no backend that can train", fix)
        return [Problem(f"{what}: {reason}", fix, about)]
    if backend == "native":
        return []
    problems = []
    tiled = geometry is not None and geometry.tile > 1
    if backend == FLEX and geometry and not tiled:
        problems.append(Problem(f"{what}: it is for models with NABLA attention, and this model has none", leave, about))
    elif backend != FLEX and not spec.unmasked_attentions:
        reason = f"{spec.title} has no attention that it could compute, as they are linear or have a mask"
        problems.append(Problem(f"{what}: {reason}", leave, about))
    if known.half_only and config.loop.mixed_precision == "no":
        keys = ("attention_backend", "mixed_precision")
        problems.append(Problem(f"{what}: it takes bf16 alone, and mixed_precision is no", "set mixed_precision to bf16", keys))
    if known.package and find_spec(known.package[0]) is None:
        problems.append(Problem(f"{what}: {known.package[1]} is not installed", f"install it, or {leave}", about))
    return problems


def check_trackers(config: LoopConfig) -> list[Problem]:
    """The packages that logged lines go to are installed."""
    if "wandb" not in config.report_to or find_spec("wandb") is not None:
        return []
    fix = 'run pip install "crepatrain[wandb]", or leave it out'
    return [Problem("report_to=wandb: wandb is not installed", fix, ("report_to",))]


def check_variant(config: ModelConfig, variant: Variant) -> list[Problem]:
    """The checkpoint can do the task, and one of its experts is chosen where it has two."""
    problems = []
    if config.task not in variant.tasks:
        problems.append(
            Problem(
                f"task={config.task}: the checkpoint is {variant.title}, for {variant.tasks[0]} only",
                f"set task to {variant.tasks[0]}, or use another checkpoint",
                ("task",),
            )
        )
    if variant.expert and config.wan_expert is None:
        problems.append(
            Problem(
                "wan_expert is missing: the checkpoint has a transformer for high noise and one for low",
                "set it to high or low, and train the other one in a run of its own",
                ("wan_expert",),
            )
        )
    if config.wan_expert and not variant.expert:
        what = f"wan_expert={config.wan_expert}: the checkpoint is {variant.title}, which has one transformer"
        problems.append(Problem(what, "leave it out", ("wan_expert",)))
    return problems


def check_validation(config: ResolvedConfig, variant: Variant) -> list[Problem]:
    """The videos that are asked for during the run can be made."""
    prompts, images = config.validation.validation_prompts, config.validation.validation_images
    if prompts is None:
        return []
    if variant.expert:
        use = "leave it out; `crepatrain sample` makes videos with both transformers"
        what = "validation_prompts: a video needs both experts, and a run holds one of them"
        return [Problem(what, use, ("validation_prompts",))]
    if variant.sampling.impossible:
        use = "leave it out, or take a checkpoint that its own pipeline can sample"
        return [Problem(f"validation_prompts: {variant.sampling.impossible}", use, ("validation_prompts",))]
    about = ("validation_images",)
    if config.model.task == "i2v" and len(images or ()) != len(prompts):
        what = f"validation_images: {len(images or ())} for {len(prompts)} validation_prompts"
        return [Problem(what, "give one for each, as task is i2v", about)]
    missing = [image for image in images or () if not Path(image).is_file()]
    return [Problem(f"validation_images: {image} does not exist", "check the path", about) for image in missing]


def check_init_adapter(config: ResolvedConfig) -> list[Problem]:
    """The adapter to begin with exists, and its header is that of an adapter."""
    if config.lora.init_adapter is None or config.model.model_type != "lora":
        return []
    path, about = Path(config.lora.init_adapter), ("init_adapter",)
    if not path.is_file():
        return [Problem(f"init_adapter={path}: there is no such file", "give a .safetensors file", about)]
    header = safetensors_header(path)
    if header is None:
        what = f"init_adapter={path}: it is not a safetensors file, or not a complete one"
        return [Problem(what, "give a .safetensors file", about)]
    names = header.keys() - {"__metadata__"}
    if not any("lora" in name for name in names):
        what = f"init_adapter={path}: none of its {len(names)} tensors belongs to a LoRA"
        return [Problem(what, "give the file of an adapter", about)]
    return []


def check_eval(config: ValidationConfig) -> list[Problem]:
    """Held-out clips come from one place."""
    if config.eval_data and config.eval_share:
        what = f"eval_data={config.eval_data}, eval_share={config.eval_share:g}: both are set"
        return [Problem(what, "set one of them", ("eval_data", "eval_share"))]
    if config.eval_data and not Path(config.eval_data).exists():
        what = f"eval_data={config.eval_data}: it does not exist"
        return [Problem(what, "give a folder of clips, or a .jsonl or .csv list", ("eval_data",))]
    return []


def check_images(data: ResolvedData, variant: Variant, geometry: Geometry) -> list[Problem]:
    """A transformer that is always given a clip's first frame has frames after it to learn."""
    if data.num_frames != 1 or variant.images:
        return []
    what = f"num_frames=1: {variant.title} is trained on clips only, not on images"
    return [Problem(what, f"use {geometry.nearest_frames(1)[-1]} or more", ("num_frames",))]


def check_targets(config: ResolvedConfig, spec: FamilySpec, depth: int) -> list[Problem]:
    """Every target of the adapter names a layer that a block of the family may have."""
    if config.model.model_type != "lora" or config.lora.targets == "all-linear":
        return []
    targets = config.lora.targets
    names = [f"{spec.blocks}.{block}.{linear}" for block in range(depth) for linear in spec.linears]
    if isinstance(targets, str):
        matches = any(re.fullmatch(targets, name) for name in names)
        return [] if matches else [unknown_target(targets, names, regex=True)]
    return [
        unknown_target(target, names, regex=False)
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]


def unknown_target(target: str, names: Sequence[str], *, regex: bool) -> Problem:
    """A target of the adapter that matches none of the Linear layers of the blocks.

    Args:
        names: of these layers, in full.
        regex: whether the target is a regex rather than the end of a name.
    """
    about = ("lora_targets",)
    if regex:
        what = f"lora_targets={target}: a regex that matches the whole name of no Linear layer of the blocks"
        return Problem(what, f"the names are {names[0]} and the like; use a list to match their ends", about)
    ends = dict.fromkeys(name.split(".", maxsplit=2)[2] for name in names)
    return Problem(
        f"lora_targets: {target!r} is not a Linear layer of a block", f"use ends of {', '.join(ends)}, or all-linear", about
    )


def check_source(written: RunConfig) -> list[Problem]:
    """Of the config as it was written: the two ways to choose the backbone must not disagree."""
    keys = ("crepa_feature_source", "crepa_use_backbone_features")
    crepa = written.crepa
    backbone = crepa.crepa_feature_source == "backbone"
    both = written.explicitly_set.issuperset(keys)
    if not both or backbone == crepa.crepa_use_backbone_features:
        return []
    flag = str(crepa.crepa_use_backbone_features).lower()
    what = f"crepa_feature_source={crepa.crepa_feature_source}, crepa_use_backbone_features={flag}: they disagree"
    return [Problem(what, "keep only crepa_feature_source", keys)]


def check_encoder_size(config: CrepaConfig, encoder: EncoderSpec) -> list[Problem]:
    """The encoder's input is whole patches."""
    size = config.crepa_encoder_image_size
    if size == "grid" or size % encoder.patch == 0:
        return []
    below = size // encoder.patch * encoder.patch
    legal = [str(n) for n in (below, below + encoder.patch) if n]
    what = f"crepa_encoder_image_size={size}: {config.crepa_encoder} takes multiples of {encoder.patch}"
    return [Problem(what, f"use {' or '.join(legal)}, or grid", ("crepa_encoder_image_size",))]


def check_tiles(config: LoopConfig, geometry: Geometry) -> list[Problem]:
    """Attention over tiles is compiled: eager, it computes and holds every score, also those that its mask leaves out."""
    if geometry.tile == 1 or config.compile:
        return []
    what = "compile=false: the checkpoint's attention over tiles (NABLA) would hold the scores of all pairs of tokens in memory"
    return [Problem(what, "set compile to true", ("compile",))]


def check_blocks(config: ResolvedConfig, depth: int, *, source_known: bool = True) -> list[Problem]:
    """Blocks exist, and a teacher block is deeper than its student's.

    Args:
        source_known: false where the two ways to choose the teacher's source disagree: then it may need no block.
    """
    problems = []
    if config.crepa.crepa_enabled:
        if config.crepa.crepa_projector == "conv" and not config.crepa.crepa_spatial_align:
            what = "crepa_projector=conv, crepa_spatial_align=false: a convolution needs the patches"
            fix = "set crepa_spatial_align to true, or crepa_projector to linear"
            problems.append(Problem(what, fix, ("crepa_projector", "crepa_spatial_align")))
        problems += _check_block("crepa_block_index", config.crepa.block, depth)
        if config.crepa.crepa_feature_source == "backbone" and source_known:
            pair = ("crepa_block_index", "crepa_teacher_block_index")
            problems += _check_deeper(config, *pair, depth, needed_by="crepa_feature_source")
    if config.layersync.layersync_enabled:
        problems += _check_block("layersync_student_block", config.layersync.layersync_student_block, depth)
        pair = ("layersync_student_block", "layersync_teacher_block")
        problems += _check_deeper(config, *pair, depth, needed_by="layersync_enabled")
    return problems


def _check_block(key: str, block: int | None, depth: int) -> list[Problem]:
    use = f"use 0 to {depth - 1}"
    if block is None:
        return [Problem(f"{key} is missing", use, (key,))]
    if block >= depth:
        return [Problem(f"{key}={block}: the transformer has {depth} blocks, counted from 0", use, (key,))]
    return []


def _check_deeper(config: ResolvedConfig, student_key: str, teacher_key: str, depth: int, needed_by: str) -> list[Problem]:
    student: int | None = config.value(student_key)
    teacher: int | None = config.value(teacher_key)
    than, about = f"{student_key}={student}", (teacher_key, student_key)
    if student is None or student >= depth:  # reported already; the lowest block may still be it
        student, than, about = 0, "any other block", (teacher_key,)
    lowest, last = student + 1, depth - 1
    if lowest > last:
        use = f"lower {student_key}, it is the last block"
    else:
        use = f"use {last}" if lowest == last else f"use {lowest} to {last}"
    if teacher is None:
        setting = config.value(needed_by)
        what = f"{teacher_key} is missing, and {needed_by}={'true' if setting is True else setting} needs it"
        return [Problem(what, use, (teacher_key, needed_by))]
    if teacher > last:
        what = f"{teacher_key}={teacher}: the transformer has {depth} blocks, counted from 0"
        return [Problem(what, use, (teacher_key,))]
    if teacher < lowest:
        return [Problem(f"{teacher_key}={teacher} is not deeper than {than}", use, about)]
    return []


def check_threshold(config: ResolvedConfig, geometry: Geometry) -> list[Problem]:
    """The threshold can be reached."""
    crepa, frames = config.crepa, config.data.num_frames
    threshold = crepa.crepa_similarity_threshold
    if not crepa.crepa_enabled or threshold is None or not geometry.legal_frames(frames):
        return []
    token_frames = geometry.token_grid(frames, *geometry.size_multiple).t
    maximum = maximum_score(crepa, token_frames)
    if threshold <= maximum:
        return []
    where = (
        "self-similarity"
        if crepa.crepa_threshold_metric == "self"
        else f"distance {crepa.crepa_adjacent_distance}, tau {crepa.crepa_adjacent_tau:g}, {token_frames} token frames"
    )
    what = f"crepa_similarity_threshold={threshold:g}: the score can't exceed {maximum:.3f} ({where})"
    return [Problem(what, f"use {maximum:.3f} or less", ("crepa_similarity_threshold",))]
