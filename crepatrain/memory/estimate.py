"""What a run holds in GPU memory: its own step on fake tensors, every storage accounted for. No weights, no GPU, no network."""

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import AutoConfig

from crepatrain.alignment.encoders import VisionEncoder, empty_encoder
from crepatrain.alignment.teachers import Teacher
from crepatrain.config.plan import Plan, make_plan
from crepatrain.config.sections import RunConfig
from crepatrain.data.buckets import Bucket
from crepatrain.data.decode import as_video
from crepatrain.errors import UserError
from crepatrain.families.base import Family
from crepatrain.memory.account import StorageAccount, materialise
from crepatrain.quiet import quiet_libraries
from crepatrain.tensors import Batch, PatchFeatures
from crepatrain.training import build
from crepatrain.training.ema import WeightAverage
from crepatrain.training.lora import is_adapted, trainable_parameters
from crepatrain.training.optim import clip_gradients
from crepatrain.training.step import training_loss

GIB = 1 << 30
_CPU = torch.device("cpu")

# Of a CUDA context with its libraries' workspaces, and the share that the allocator loses to rounding. Not calibrated.
_CONTEXT_BYTES = int(0.6 * GIB)
_FRAGMENTED = 0.02

# From then on the other estimates are worth processes of their own.
_SLOW_SECONDS = 2.0


@dataclass(frozen=True)
class Stage:
    """One part of a run at its fullest moment.

    Attributes:
        by_owner: bytes, the largest first.
        op: the operator after which that was; empty where the part was not run.
    """

    by_owner: Mapping[str, int]
    op: str

    @property
    def allocated(self) -> int:
        """Bytes, as torch.cuda.max_memory_allocated counts them."""
        return sum(self.by_owner.values())

    @property
    def margin(self) -> int:
        """Bytes that no account of tensors sees: the CUDA context and what the allocator loses."""
        return _CONTEXT_BYTES + int(_FRAGMENTED * self.allocated)

    @property
    def peak(self) -> int:
        """Bytes that the GPU must have."""
        return self.allocated + self.margin


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Attributes:
        stages: caching text, caching clips, training; None where a stage can't be estimated.
        crepa: bytes that CREPA adds to the training step with each teacher source, beginning with the config's own.
        remedies: what would change the training step's peak, in the config's words, with the bytes it would come to.
    """

    stages: Mapping[str, Stage]
    crepa: Mapping[str, int]
    remedies: Sequence[tuple[str, int]]

    @property
    def peak(self) -> int:
        """Bytes of the largest stage."""
        return self.stages[self.largest].peak

    @property
    def largest(self) -> str:
        """The stage that decides."""
        return max(self.stages, key=lambda name: self.stages[name].peak)

    def as_json(self) -> dict[str, Any]:
        """For programs; in GiB. Caching is the larger of its two parts, which stand in it too."""
        told = {name: _plain(stage) for name, stage in self.stages.items()}
        parts = {name: told.pop(f"caching {name}") for name in ("text", "clips")}
        caching = max(parts.values(), key=lambda part: part["peak_gib"]) | {"parts": parts}
        return {
            "stages": {"training": told.pop("training"), "caching": caching, "sampling": told.get("sampling")},
            "peak_gib": self.peak / GIB,
            "calibrated": False,
            "crepa": {source: size / GIB for source, size in self.crepa.items()},
            "remedies": [{"change": change, "peak_gib": peak / GIB} for change, peak in self.remedies],
        }


def _plain(stage: Stage) -> dict[str, Any]:
    return {
        "peak_gib": stage.peak / GIB,
        "allocated_gib": stage.allocated / GIB,
        "by_owner": {owner: size / GIB for owner, size in stage.by_owner.items()} | {"margin": stage.margin / GIB},
        "peak_op": stage.op,
    }


def largest_bucket(plan: Plan, buckets: Sequence[Bucket]) -> Bucket:
    """The one whose clips have the most tokens: it decides."""
    return max(buckets, key=lambda bucket: plan.geometry.token_grid(bucket.frames, bucket.height, bucket.width).tokens)


def estimate(plan: Plan, buckets: Sequence[Bucket]) -> Estimate:
    """Every stage of a run, CREPA's share of it, and what would make it smaller; each number out of a step of its own.

    Args:
        buckets: of the dataset; the one of the most tokens decides.

    Raises:
        UserError: the model's step can't run on fake tensors.
    """
    largest = largest_bucket(plan, buckets)
    config = plan.config
    began = time.perf_counter()
    training = training_stage(plan, largest)
    slow = time.perf_counter() - began > _SLOW_SECONDS
    jobs = {("caching", "caching"): (config, largest)}
    if config.validation_prompts:
        jobs["sampling", "sampling"] = (config, Bucket(plan.size[0], plan.size[1], plan.size[2]))
    jobs |= {("crepa", name): (changed, largest) for name, changed in _crepa_variants(plan).items()}
    jobs |= {("remedy", name): job for name, job in _smaller(plan, largest).items()}
    with _workers(2 if slow else 0) as run_all:
        found = dict(zip(jobs, run_all(_job, [(name[0], *job) for name, job in jobs.items()]), strict=True))
    stages = {"caching text": _text_stage(plan), "caching clips": found["caching", "caching"], "training": training}
    stages |= {"sampling": found["sampling", "sampling"]} if config.validation_prompts else {}
    peaks = {name: stage.peak for name, stage in found.items() if stage is not None}
    crepa = {}
    if config.crepa_enabled:
        without = peaks["crepa", "off"]
        crepa = {config.crepa_feature_source: training.peak - without}
        crepa |= {name: peak - without for (kind, name), peak in peaks.items() if kind == "crepa" and name != "off"}
    remedies = [(name, peak) for (kind, name), peak in peaks.items() if kind == "remedy"]
    remedies += [
        (f"crepa_feature_source: {name}" if name != "off" else "crepa_enabled: false", peak)
        for (kind, name), peak in peaks.items()
        if kind == "crepa"
    ]
    remedies.append(("optimizer: adamw8bit", _with_8bit_states(plan, training).peak))
    smaller = sorted(((name, peak) for name, peak in remedies if peak < training.peak), key=lambda item: item[1])
    return Estimate(stages, crepa, smaller)


def _crepa_variants(plan: Plan) -> dict[str, RunConfig]:
    """The config without CREPA, and with each other teacher source."""
    config = plan.config
    if not config.crepa_enabled:
        return {}
    assert config.crepa_block_index is not None
    variants = {"off": config.model_copy(update={"crepa_enabled": False})}
    deeper = config.crepa_teacher_block_index or min(config.crepa_block_index + 8, plan.geometry.depth - 1)
    for source in ("cached", "pixels", "latents", "backbone"):
        possible = source != "backbone" or deeper > config.crepa_block_index
        if source != config.crepa_feature_source and possible and (plan.encoder or source == "backbone"):
            update = {"crepa_feature_source": source, "crepa_use_backbone_features": source == "backbone"}
            update |= {"crepa_teacher_block_index": deeper} if source == "backbone" else {}
            variants[source] = config.model_copy(update=update)
    return variants


def _smaller(plan: Plan, bucket: Bucket) -> dict[str, tuple[RunConfig, Bucket]]:
    """Configs that hold less."""
    config, found = plan.config, {}
    if not config.gradient_checkpointing:
        found["gradient_checkpointing: true"] = (config.model_copy(update={"gradient_checkpointing": True}), bucket)
    if config.train_batch_size > 1:
        half = config.train_batch_size // 2
        found[f"train_batch_size: {half}"] = (config.model_copy(update={"train_batch_size": half}), bucket)
    frames = next((n for n in range(bucket.frames // 2 + 1, 0, -1) if plan.geometry.legal_frames(n)), bucket.frames)
    if frames < bucket.frames:
        found[f"num_frames: {frames}"] = (config, replace(bucket, frames=frames))
    return found


def _job(job: tuple[str, RunConfig, Bucket]) -> Stage | None:
    """One estimate, in this process or another; None where it can't be made."""
    kind, config, bucket = job
    quiet_libraries()
    try:
        plan = make_plan(config, online=False)
        return _STAGES.get(kind, training_stage)(plan, bucket)
    except UserError:
        if kind in _STAGES:
            raise
        return None


@contextlib.contextmanager
def _workers(count: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map`, over that many processes where there are any."""
    if count == 0:
        yield map
        return
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def _with_8bit_states(plan: Plan, stage: Stage) -> Stage:
    """The optimizer's two fp32 states as one byte each and a scale per 256, which is all that an 8-bit AdamW changes."""
    if plan.config.optimizer != "adamw":
        return stage
    smaller = int(stage.by_owner["optimizer"] * (1 + 4 / 256) / 4)
    return replace(stage, by_owner={**stage.by_owner, "optimizer": smaller})


def _text_stage(plan: Plan) -> Stage:
    """The text encoders' weights; what a few captions add to them is in the margin."""
    folder = Path(plan.config.pretrained_model_name_or_path)
    if plan.checkpoint.origin == "folder":
        parameters = sum(_parameters(folder / part) for part in plan.variant.folders("text_encoder"))
    else:
        parameters = plan.spec.text_parameters
    return Stage({"text encoder": parameters * torch.bfloat16.itemsize}, "")


def _parameters(folder: Path) -> int:
    """Of a model in transformers' format, from its config.json."""
    config = AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in kind(config).parameters())


def caching_stage(plan: Plan, bucket: Bucket) -> Stage:
    """A clip through the VAE and the vision encoder, which stay loaded together.

    Raises:
        UserError: one of them can't run on fake tensors.
    """
    family = build.build_family(plan)
    vae = _vae(plan, family)
    caches_features = plan.config.crepa_enabled and plan.config.crepa_feature_source == "cached"
    encoder = _vision_encoder(plan) if caches_features else None
    grid = plan.geometry.token_grid(bucket.frames, bucket.height, bucket.width)
    with _accounted(plan, fake=True) as account, torch.no_grad():
        for owner, module in (("VAE", vae), ("teacher", encoder)):
            if module is not None:
                with account.of(owner):
                    materialise(module)
        account.begin()
        frames = torch.empty(bucket.frames, 3, bucket.height, bucket.width, dtype=torch.uint8)
        with account.of("activations"):
            family.encode_video(vae, as_video(frames))
            if encoder is not None:
                encoder(frames[list(grid.teacher_frames)].unsqueeze(0), plan.encoder_size(grid))
        return _stage(account)


def sampling_stage(plan: Plan, bucket: Bucket, *, fake: bool = True) -> Stage:
    """A validation video: the transformer without a gradient, prompt and negative prompt in one batch, then the VAE's decoder.

    What training holds stays where it is.

    Raises:
        UserError: the model can't run on fake tensors.
    """
    twice = replace(plan, config=plan.config.model_copy(update={"train_batch_size": 2}))
    step, family = _Step(twice, bucket), build.build_family(plan)
    vae = _vae(plan, family)
    with _accounted(plan, fake=fake) as account, torch.no_grad():
        step.place(account)
        with account.of("VAE"):
            materialise(vae)
        account.begin()
        step.sample(account, vae)
        return _stage(account)


def training_stage(plan: Plan, bucket: Bucket, *, fake: bool = True) -> Stage:
    """An optimizer step on clips of one size, with the optimizer's state in place.

    Args:
        fake: False to run it on real CPU tensors, which a test does with a tiny model.

    Raises:
        UserError: the model's step can't run on fake tensors.
    """
    step = _Step(plan, bucket)
    with _accounted(plan, fake=fake) as account:
        step.place(account)
        account.begin()
        step.run(account)
        return _stage(account)


_STAGES: Mapping[str, Callable[[Plan, Bucket], Stage]] = {"caching": caching_stage, "sampling": sampling_stage}


def measured_step(plan: Plan, bucket: Bucket, device: torch.device) -> int:
    """Bytes that a CUDA device really allocates in the same step, with weights of no meaning."""
    step, account = _Step(plan, bucket), StorageAccount()
    with account:
        step.place(account, device)
    torch.cuda.reset_peak_memory_stats(device)
    step.run(account)
    return torch.cuda.max_memory_allocated(device)


@contextlib.contextmanager
def _accounted(plan: Plan, *, fake: bool) -> Iterator[StorageAccount]:
    """An active account, over fake tensors; what can't run on these is told as what it is."""
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    account = StorageAccount()
    try:
        with mode, account:
            yield account
    except (NotImplementedError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"no estimate for {plan.config.pretrained_model_name_or_path}: its step does not run on tensors without values "
            f"({reason})",
            "measure it: fit logs peak_memory_gib",
        ) from error


def _stage(account: StorageAccount) -> Stage:
    held = {owner: size for owner, size in account.peak_of.most_common() if size > 0}
    return Stage(held, account.peak_op)


def _adafactor_state(parameter: Tensor) -> list[Tensor]:
    """A row and a column of second moments for a matrix."""
    if parameter.ndim < 2:
        return [torch.empty_like(parameter)]
    shapes = (parameter.shape[:-1], (*parameter.shape[:-2], parameter.shape[-1]))
    return [torch.empty(shape, device=parameter.device) for shape in shapes]


def _adamw8bit_state(parameter: Tensor) -> list[Tensor]:
    """Two bytes for each parameter, and two scales for each 256 of them."""
    sizes = ((parameter.numel() * 2, torch.uint8), (parameter.numel() // 256 * 2 + 2, torch.float32))
    return [torch.empty(size, dtype=dtype, device=parameter.device) for size, dtype in sizes]


# Of optimizers whose own step looks at values, or runs on a GPU alone.
_STATES = {"adafactor": _adafactor_state, "adamw8bit": _adamw8bit_state}


class _StandIn:
    """A learner of which only the state is known."""

    def __init__(self, parameters: Sequence[nn.Parameter], state: Callable[[Tensor], list[Tensor]]) -> None:
        self.parameters = parameters
        self._new_state, self._state = state, []

    def step(self, _found_inf: Tensor) -> None:
        self._state = self._state or [self._new_state(parameter) for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None


def _learner(config: RunConfig, module: nn.Module) -> build.Learner | _StandIn:
    if config.optimizer in _STATES:
        return _StandIn(trainable_parameters(module), _STATES[config.optimizer])
    return build.build_learner(config, module, config.learning_rate, 100)


class _Step:
    """What `fit` holds on the device, and what it does with it in a step. Built on the meta device."""

    def __init__(self, plan: Plan, bucket: Bucket) -> None:
        self._plan, self._bucket = plan, bucket
        self._family = build.build_family(plan)
        self._transformer = _transformer(plan, self._family)
        self._crepa, self._teacher, self._of_teacher = None, None, {}
        if plan.config.crepa_enabled:
            with torch.device("meta"):
                self._crepa = build.build_crepa(plan)
            self._teacher, self._of_teacher = _teacher(plan, self._family)

    def place(self, account: StorageAccount, device: torch.device = _CPU) -> None:
        """Give everything memory, the optimizers' state too, which the first step of a run leaves behind."""
        self._device = device
        owned = {"transformer": self._transformer, "projector": self._crepa, **self._of_teacher}
        for owner, module in owned.items():
            if module is not None:
                with account.of(owner):
                    materialise(module, device)
        if is_adapted(self._transformer):
            for parameter in trainable_parameters(self._transformer):
                account.give(parameter, "adapter")
        with account.of("batch"):
            self._batch = _batch(self._plan, self._family, self._bucket).to(device)

        def count_gradient(parameter: Tensor) -> None:
            assert parameter.grad is not None
            account.give(parameter.grad, "gradients")

        config = self._plan.config
        modules = [module for module in (self._transformer, self._crepa) if module is not None]
        if config.use_ema:
            with account.of("EMA"):
                self._average = WeightAverage(trainable_parameters(self._transformer), config.ema_decay)
        self._learners = [_learner(config, module) for module in modules]
        for learner in self._learners:
            for parameter in learner.parameters:
                parameter.register_post_accumulate_grad_hook(count_gradient)
                parameter.grad = torch.zeros_like(parameter)
            with account.of("optimizer"):
                learner.step(torch.zeros((), device=device))

    def run(self, account: StorageAccount) -> None:
        """One optimizer step."""
        config = self._plan.config
        blocks = self._family.blocks(self._transformer)
        process = build.build_process(self._plan)
        crepa = None
        if self._crepa is not None and self._teacher is not None:
            crepa = build.crepa_term(config, self._crepa, self._teacher, config.crepa_lambda)
        # A second micro-batch finds the gradients of the first; a third finds no more.
        for _ in range(min(config.gradient_accumulation_steps, 2)):
            with account.of("activations"), build.autocast(config, self._device):
                losses = training_loss(
                    self._family, process, self._transformer, blocks, self._batch, crepa, build.build_layersync(config)
                )
            with account.of("temporaries"):
                (losses.total / config.gradient_accumulation_steps).backward()
            del losses
        for learner in self._learners:
            with account.of("optimizer"):
                clip_gradients(learner.parameters, config.max_grad_norm)
                learner.step(torch.zeros((), device=self._device))

    def sample(self, account: StorageAccount, vae: nn.Module) -> None:
        """One denoising step, and the video of its first sample."""
        batch = self._batch
        with account.of("activations"), build.autocast(self._plan.config, self._device):
            self._family.denoise(self._transformer, batch.noise, batch.sigma, batch)
            latents = batch.latents[:1]
            self._family.decode_latents(vae, latents)


def _transformer(plan: Plan, family: Family) -> Any:
    transformer = family.empty_transformer()
    keep = tuple(transformer._keep_in_fp32_modules or ())
    dtype = build.weights_dtype(plan.config)
    for name, parameter in transformer.named_parameters():
        stays = any(part in keep for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if stays else dtype)
    build.adapt(plan, family, transformer)
    if plan.config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def _teacher(plan: Plan, family: Family) -> tuple[Teacher, dict[str, nn.Module]]:
    """The teacher, and what it holds by owner."""
    owned: dict[str, nn.Module] = {}

    def encoder() -> VisionEncoder:
        owned["teacher"] = made = _vision_encoder(plan)
        return made

    def vae() -> nn.Module:
        owned["VAE"] = made = _vae(plan, family)
        return made

    return build.choose_teacher(plan, family, encoder, vae), owned


def _vision_encoder(plan: Plan) -> VisionEncoder:
    assert plan.encoder is not None
    return empty_encoder(
        plan.encoder.shapes,
        plan.encoder.patch,
        frames_per_forward=plan.config.crepa_encoder_frames_batch_size,
        dtype=torch.bfloat16,
    )


def _vae(plan: Plan, family: Family) -> nn.Module:
    return family.empty_vae().to(getattr(torch, plan.config.vae_dtype)).eval()


def _batch(plan: Plan, family: Family, bucket: Bucket) -> Batch:
    """What the loader hands over, without values."""
    config, size = plan.config, plan.config.train_batch_size
    grid = plan.geometry.token_grid(bucket.frames, bucket.height, bucket.width)
    latent = (plan.geometry.latent_channels, *plan.geometry.latent_shape(bucket.frames, bucket.height, bucket.width))
    text = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in family.text_shapes().items()}
    conditioning = {}
    if plan.task == "i2v" and bucket.frames > 1:
        conditioning = {name: torch.empty(size, *shape) for name, shape in family.image_shapes(latent).items()}
        conditioning["given"] = torch.ones(size)
    teacher = pixels = None
    if config.crepa_enabled and config.crepa_feature_source == "cached":
        assert plan.encoder is not None
        rows, columns = plan.teacher_grid(grid)
        values = torch.empty(size, grid.t, rows * columns, plan.encoder.width, dtype=torch.float16)
        teacher = PatchFeatures(values, (rows, columns))
    if config.crepa_enabled and config.crepa_feature_source == "pixels":
        pixels = torch.empty(size, grid.t, 3, bucket.height, bucket.width, dtype=torch.uint8)
    assert config.fps is not None
    return Batch(
        latents=torch.empty(size, *latent),
        noise=torch.empty(size, *latent),
        sigma=torch.full((size,), 0.5),
        text=family.collate_text([text] * size),
        grid=grid,
        fps=config.fps,
        keys=("",) * size,
        conditioning=conditioning,
        teacher=teacher,
        pixels=pixels,
    )
