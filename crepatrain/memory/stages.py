"""The stages of a run that hold GPU memory: each one's own work on fake tensors. No weights, no GPU, no network."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from transformers import AutoConfig

from crepatrain.alignment.encoders import VisionEncoder, empty_encoder
from crepatrain.alignment.teachers import Teacher
from crepatrain.config.plan import Plan
from crepatrain.config.sections import OptimConfig
from crepatrain.data.buckets import Bucket
from crepatrain.data.frames import as_video
from crepatrain.errors import UserError
from crepatrain.families.autoencoders import tile_vae
from crepatrain.families.base import Family
from crepatrain.memory.account import DeviceAccount, StorageAccount
from crepatrain.memory.cuda_autocast import cuda_autocast_lists
from crepatrain.placement.inference import block_lists, weights_bytes
from crepatrain.placement.placing import materialise, place
from crepatrain.placement.precision import autocast
from crepatrain.placement.quantizing import quantize_text_model
from crepatrain.placement.ring import BUFFERS
from crepatrain.placement.states import empty_states, empty_temporaries
from crepatrain.tensors import Batch, PatchFeatures
from crepatrain.training import build
from crepatrain.training.ema import WeightAverage
from crepatrain.training.lora import is_adapted, trainable_parameters
from crepatrain.training.optim import ScheduledOptimizer, build_scheduled_optimizer, clip_gradients
from crepatrain.training.step import training_loss

GIB = 1 << 30
_CPU = torch.device("cpu")

# Of a CUDA context with its libraries' workspaces, and the share that the allocator loses to rounding. Not calibrated.
_CONTEXT_BYTES = int(0.6 * GIB)
_FRAGMENTED = 0.02

# Bytes of a number in a text encoder's blocks, with the scales: of every row for int8, of every 64 numbers for nf4.
_TEXT_BYTES = {"none": 2.0, "int8": 1.001, "nf4": 0.5 + 4 / 64}

# What torch raises where an operation needs the values that fake tensors do not have, or is not known for them.
_NOT_WITHOUT_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    NotImplementedError,
)


@dataclass(frozen=True)
class Stage:
    """One part of a run at its fullest moment.

    Attributes:
        by_owner: bytes, the largest first.
        op: the operator after which that was; empty where nothing was run.
    """

    by_owner: Mapping[str, int]
    op: str

    @property
    def allocated(self) -> int:
        """Bytes, as torch.cuda.max_memory_allocated counts them."""
        return sum(self.by_owner.values())

    @property
    def margin(self) -> int:
        """Bytes that are in no tensor: the CUDA context, and what the allocator loses to rounding."""
        return _CONTEXT_BYTES + int(_FRAGMENTED * self.allocated)

    @property
    def peak(self) -> int:
        """Bytes that the GPU must have."""
        return self.allocated + self.margin


def text_stage(plan: Plan) -> Stage:
    """What of the text encoders is on the device; the margin covers what a few captions add to it.

    With text_encoder_offload auto that is the least: the weights are there as a whole only where there is room for them.
    """
    how, bits = plan.config.loop, torch.bfloat16.itemsize
    if plan.checkpoint.origin == "folder":
        folder = Path(plan.config.model.pretrained_model_name_or_path)
        models = [_text_model(folder / part) for part in plan.variant.folders("text_encoder")]
        for model in models:
            quantize_text_model(model, how.text_encoder_quantization, torch.device("meta"))
        lists = [blocks for model in models for blocks in block_lists(model)]
        whole = weights_bytes(models)
        outside = whole - sum(weights_bytes(list(blocks)) for blocks in lists)
        largest = sum(max(weights_bytes([block]) for block in blocks) for blocks in lists)
    else:
        known, share = plan.spec.text_parameters, _TEXT_BYTES[how.text_encoder_quantization]
        outside, largest = known.outside * bits, int(known.largest * share)
        whole = outside + int((known.total - known.outside) * share)
    held = outside + BUFFERS * largest if how.text_encoder_offload else whole
    return Stage({"text encoder": min(held, whole)}, "")


def _text_model(folder: Path) -> nn.Module:
    """A text encoder on the meta device in bf16, by its config.json."""
    config = AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    with torch.device("meta"):
        return kind(config).to(torch.bfloat16)


def caching_stage(plan: Plan, bucket: Bucket) -> Stage:
    """Encoding a clip with the VAE and the vision encoder, which are loaded together.

    Raises:
        UserError: one of them can't run on fake tensors.
    """
    family = build.build_family(plan)
    vae = _vae(plan, family)
    caches_features = plan.config.crepa.crepa_enabled and plan.config.crepa.crepa_feature_source == "cached"
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
        return _stage(account.on(_CPU))


def sampling_stage(plan: Plan, bucket: Bucket, *, fake: bool = True) -> Stage:
    """A validation video: the transformer without a gradient, prompt and negative prompt in one batch, then the VAE's decoder.

    What training holds stays where it is.

    Raises:
        UserError: the model can't run on fake tensors.
    """
    twice = replace(plan, config=plan.config.changed(train_batch_size=2))
    step, family = TrainingStep(twice, bucket), build.build_family(plan)
    vae = _vae(plan, family)
    with _accounted(plan, fake=fake) as account, torch.no_grad():
        step.place(account)
        with account.of("VAE"):
            materialise(vae)
        account.begin()
        step.sample(account, vae)
        return _stage(account.on(_CPU))


def training_stage(plan: Plan, bucket: Bucket, *, fake: bool = True) -> Stage:
    """An optimizer step on clips of one size, with the optimizer's state in place.

    Args:
        fake: False to run it on real CPU tensors, which a test does with a tiny model.

    Raises:
        UserError: the model's step can't run on fake tensors.
    """
    step = TrainingStep(plan, bucket)
    with _accounted(plan, fake=fake) as account:
        step.place(account)
        account.begin()
        step.run(account)
        return _stage(account.on(_CPU))


@contextlib.contextmanager
def _accounted(plan: Plan, *, fake: bool) -> Iterator[StorageAccount]:
    """An active account under the casts of CUDA, over fake tensors; a step that can't run on these is reported as such.

    Raises:
        UserError: it can't run on fake tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    account = StorageAccount()
    try:
        with cuda_autocast_lists(), mode, account:
            yield account
    except _NOT_WITHOUT_VALUES as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"no estimate for {plan.config.model.pretrained_model_name_or_path}: its step does not run on tensors without values "
            f"({reason})",
            "measure it: fit logs peak_memory_gib",
        ) from error


def _stage(account: DeviceAccount) -> Stage:
    held = {owner: size for owner, size in account.peak_of.most_common() if size > 0}
    return Stage(held, account.peak_op)


class _KnownStates:
    """The place of an optimizer whose own step needs values, or runs on a GPU alone: its states, as the table has them."""

    def __init__(self, optimizer: str, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self._optimizer = optimizer
        self._states: list[Tensor] = []

    def step(self, _found_inf: Tensor) -> None:
        self._states = self._states or empty_states(self._optimizer, self.parameters)
        _held_in_step = empty_temporaries(self._optimizer, self.parameters)
        for parameter in self.parameters:
            parameter.grad = None


def _optimizer(config: OptimConfig, module: nn.Module) -> ScheduledOptimizer | _KnownStates:
    if config.optimizer != "adamw":
        return _KnownStates(config.optimizer, trainable_parameters(module))
    return build_scheduled_optimizer(config, module, config.learning_rate, 100)


class TrainingStep:
    """All that `fit` holds on the device, and its optimizer step. Built on the meta device."""

    def __init__(self, plan: Plan, bucket: Bucket) -> None:
        self._plan, self._bucket = plan, bucket
        self._family = build.build_family(plan)
        self._trained = empty_trained(plan)
        self._teacher, self._of_teacher = _teacher(plan, self._family) if plan.config.crepa.crepa_enabled else (None, {})

    def place(self, account: StorageAccount, device: torch.device = _CPU) -> None:
        """Give everything memory, the optimizers' states too, which the first step of a run leaves behind."""
        self._device = device
        config, transformer = self._plan.config, self._trained["transformer"]
        # Compiled graphs have no place for tensors without values; a run's attention backend is set apart from `place`.
        plain = config.loop.model_copy(update={"compile": False})
        with account.of("transformer"):
            place(plain, self._family, transformer, device)
        for owner, module in {**self._trained, **self._of_teacher}.items():
            if owner != "transformer":
                with account.of(owner):
                    materialise(module, device)
        if is_adapted(transformer):
            for parameter in trainable_parameters(transformer):
                account.give(parameter, "adapter")
        with account.of("batch"):
            self._batch = _batch(self._plan, self._family, self._bucket).to(device)

        def count_gradient(parameter: Tensor) -> None:
            assert parameter.grad is not None
            account.give(parameter.grad, "gradients")

        self._average = None
        if config.optim.use_ema:
            with account.of("EMA"):
                self._average = WeightAverage(trainable_parameters(transformer), config.optim.ema_decay)
        self._optimizers = [_optimizer(config.optim, module) for module in self._trained.values()]
        for optimizer in self._optimizers:
            for parameter in optimizer.parameters:
                parameter.register_post_accumulate_grad_hook(count_gradient)
                parameter.grad = torch.zeros_like(parameter)
            with account.of("optimizer"):
                optimizer.step(torch.zeros((), device=device))

    def run(self, account: StorageAccount) -> None:
        """One optimizer step."""
        config, transformer = self._plan.config, self._trained["transformer"]
        blocks, process = self._family.blocks(transformer), build.build_process(self._plan)
        layersync, crepa = build.build_layersync(config.layersync), None
        if self._teacher is not None:
            crepa = build.crepa_term(config.crepa, self._trained["projector"], self._teacher, config.crepa.crepa_lambda)
        # A second micro-batch finds the gradients of the first; a third finds no more.
        for _ in range(min(config.loop.gradient_accumulation_steps, 2)):
            with account.of("activations"), autocast(config.loop, self._device):
                losses = training_loss(self._family, process, transformer, blocks, self._batch, crepa, layersync)
            with account.of("temporaries"):
                (losses.total / config.loop.gradient_accumulation_steps).backward()
            del losses
        for optimizer in self._optimizers:
            with account.of("optimizer"):
                clip_gradients(optimizer.parameters, config.optim.max_grad_norm)
                optimizer.step(torch.zeros((), device=self._device))
        if self._average is not None:
            with account.of("EMA"):
                self._average.update()
        with account.of("save"), torch.no_grad():  # which takes the weights to the host one by one
            for parameter in trainable_parameters(transformer):
                parameter.float().clone()

    def sample(self, account: StorageAccount, vae: nn.Module) -> None:
        """One denoising step, and the video of its first sample."""
        batch = self._batch
        with account.of("activations"), autocast(self._plan.config.loop, self._device):
            self._family.denoise(self._trained["transformer"], batch.noise, batch.sigma, batch)
            latents = batch.latents[:1]
            self._family.decode_latents(vae, latents)


def empty_trained(plan: Plan) -> dict[str, Any]:
    """What a run trains, on the meta device: `transformer`, adapted where an adapter is trained, and CREPA's `projector`."""
    family = build.build_family(plan)
    trained = {"transformer": build.empty_transformer(plan, family)}
    build.adapt(plan, family, trained["transformer"])
    if plan.config.crepa.crepa_enabled:
        with torch.device("meta"):
            trained["projector"] = build.build_crepa(plan)
    return trained


def _teacher(plan: Plan, family: Family) -> tuple[Teacher, dict[str, nn.Module]]:
    """The teacher, and the modules that it needs, by owner."""
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
        frames_per_forward=plan.config.crepa.crepa_encoder_frames_batch_size,
        dtype=torch.bfloat16,
    )


def _vae(plan: Plan, family: Family) -> nn.Module:
    vae = family.empty_vae().to(getattr(torch, plan.config.diffusion.vae_dtype)).eval()
    if plan.config.diffusion.vae_tiling:
        tile_vae(vae)
    return vae


def _batch(plan: Plan, family: Family, bucket: Bucket) -> Batch:
    """A batch as the loader makes it, without values."""
    config, size = plan.config, plan.config.loop.train_batch_size
    grid = plan.geometry.token_grid(bucket.frames, bucket.height, bucket.width)
    latent = (plan.geometry.latent_channels, *plan.geometry.latent_shape(bucket.frames, bucket.height, bucket.width))
    text = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in family.text_shapes().items()}
    conditioning = {}
    if plan.task == "i2v" and bucket.frames > 1:
        conditioning = {name: torch.empty(size, *shape) for name, shape in family.image_shapes(latent).items()}
        conditioning["given"] = torch.ones(size)
    teacher = pixels = None
    if config.crepa.crepa_enabled and config.crepa.crepa_feature_source == "cached":
        assert plan.encoder is not None
        rows, columns = plan.teacher_grid(grid)
        values = torch.empty(size, grid.t, rows * columns, plan.encoder.width, dtype=torch.float16)
        teacher = PatchFeatures(values, (rows, columns))
    if config.crepa.crepa_enabled and config.crepa.crepa_feature_source == "pixels":
        pixels = torch.empty(size, grid.t, 3, bucket.height, bucket.width, dtype=torch.uint8)
    return Batch(
        latents=torch.empty(size, *latent),
        noise=torch.empty(size, *latent),
        sigma=torch.full((size,), 0.5),
        text=family.collate_text([text] * size),
        grid=grid,
        fps=plan.fps,
        keys=("",) * size,
        conditioning=conditioning,
        teacher=teacher,
        pixels=pixels,
    )
