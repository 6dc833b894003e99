"""Does the model learn with these settings? One block, forward and backward, beside the same one without them, before a run."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crepatrain.config.plan import Plan
from crepatrain.errors import UserError
from crepatrain.families.base import Family
from crepatrain.placement.placing import free_memory, set_attention
from crepatrain.placement.precision import autocast
from crepatrain.placement.quantizing import quantize_blocks
from crepatrain.tensors import Batch
from crepatrain.training import build

# How far a gradient may be from the one of torch's own attention, by the data type that is computed in.
_ALLOWED = {torch.bfloat16: 0.05, torch.float32: 0.01}
# How far the gradients of a block's inputs may be from those of a base that is not quantised: at random weights about twice
# what they are at the text's, and a tenth of what torchao's dynamic quantisation of activations leaves.
_ALLOWED_OF_BASE: Mapping[str, float] = {"int8": 0.03, "fp8": 0.12, "nf4": 0.4}
_PADDING = 7  # tokens that a caption lacks, so that a mask hides something
_TOKEN_FRAMES = 3
_TILES, _TOKENS = 2, 8  # along the height and the width: of a model with tiles, and of any other


def expect_gradients(plan: Plan, family: Family, device: torch.device) -> None:
    """Try a config's attention backend, compiler and quantised base on one block with random weights; nothing where none is set.

    No random number of the process is touched.

    Raises:
        UserError: with one of them the block fails, or q, k, v or the block's input get no gradient or a wrong one.
    """
    loop = plan.config.loop
    backend = loop.attention_backend if loop.attention_backend != "native" else None
    how = loop.base_quantization
    if not (backend or loop.compile or how != "none"):
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        transformer = _shallow(plan, family, device)
        family.set_attention(transformer)
        block = family.blocks(transformer)[0]
        trial = _Trial(plan, family, transformer, block, device)
        expected = trial.gradients()
        try:
            if backend:
                set_attention(loop, family, transformer)
                about = ("attention_backend", f"attention_backend={backend}", "use native, or leave it out")
                _compare(*about, trial, expected)
            if loop.compile:
                block.compile()
                _compare("compile", "compile=true", "set compile to false", trial, expected)
            if how != "none":
                quantize_blocks(family, transformer, how)
                of_inputs = {name: value for name, value in expected.items() if name.startswith("its ")}
                allowed = _ALLOWED_OF_BASE[how] + (trial.allowed if backend or loop.compile else 0)
                about = ("base_quantization", f"base_quantization={how}", "use none, or int8")
                _compare(*about, trial, of_inputs, allowed=allowed)
        finally:
            if loop.compile:
                torch.compiler.reset()  # the run's own shapes are compiled as if these had never been
    del transformer, block, trial, expected
    free_memory()


def _shallow(plan: Plan, family: Family, device: torch.device) -> Any:
    transformer = build.in_weights_dtype(plan, family.shallow_transformer(device))
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():  # a gate of 0 would let no gradient through
                parameter.normal_(std=0.02)
    return transformer.requires_grad_(True).train()


class _Trial:
    """One block on one input, as the model's own forward gives it."""

    def __init__(self, plan: Plan, family: Family, transformer: Any, block: nn.Module, device: torch.device) -> None:
        self._loop, self._device, self._block = plan.config.loop, device, block
        self.allowed = _ALLOWED[torch.bfloat16 if self._loop.mixed_precision == "bf16" else torch.float32]
        self._width = plan.geometry.width
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def see(_block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.append((inputs, named))

        batch = random_batch(plan, family).to(device)
        hook = block.register_forward_pre_hook(see, with_kwargs=True)
        with torch.no_grad(), autocast(self._loop, device):
            family.denoise(transformer, batch.noise, batch.sigma, batch)
        hook.remove()
        [(self._inputs, self._named)] = seen
        self._towards: Tensor | None = None

    def gradients(self) -> dict[str, Tensor]:
        """The block's output, and the gradients of its input and of its layers' weights, in fp32; those that there are."""
        self._block.zero_grad(set_to_none=True)
        leaves: dict[str, Tensor] = {}
        inputs = [self._leaf(f"its input {number}", value, leaves) for number, value in enumerate(self._inputs)]
        named = {name: self._leaf(f"its input {name}", value, leaves) for name, value in self._named.items()}
        with autocast(self._loop, self._device):
            output = self._block(*inputs, **named).float()
        if self._towards is None:
            self._towards = torch.randn_like(output)
        (output * self._towards).sum().backward()
        found = {"its output": output.detach()}
        found |= {name: leaf.grad.float() for name, leaf in leaves.items() if leaf.grad is not None}
        for name, layer in self._block.named_modules():
            if isinstance(layer, nn.Linear) and layer.weight.grad is not None:
                found[name] = layer.weight.grad.float()
        return found

    def _leaf(self, name: str, value: Any, leaves: dict[str, Tensor]) -> Any:
        """A tensor of tokens [B, tokens, D] as one that gets a gradient; anything else as it is."""
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3 and value.shape[-1] == self._width):
            return value
        leaves[name] = leaf = value.detach().requires_grad_()
        return leaf


def _compare(
    key: str, setting: str, fix: str, trial: _Trial, expected: Mapping[str, Tensor], allowed: float | None = None
) -> None:
    allowed = trial.allowed if allowed is None else allowed
    try:
        found = trial.gradients()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a kernel or a compiler raises, the setting is what the user has to know
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{setting}: a trial of one block fails ({type(error).__name__}: {reason})", fix, (key,)) from error
    learns = {name: value for name, value in expected.items() if value.any()}
    lost = [name for name in learns if name not in found or not found[name].any()]
    if lost:
        what = f"{setting}: in a trial of one block no gradient reaches {', '.join(lost)}; it would train, and not learn"
        raise UserError(what, fix, (key,))
    errors = {name: float((found[name] - value).norm() / value.norm()) for name, value in learns.items()}
    wrong = {name: error for name, error in errors.items() if not error <= allowed}
    if wrong:
        worst = max(wrong, key=lambda name: math.inf if math.isnan(wrong[name]) else wrong[name])
        raise UserError(
            f"{setting}: in a trial of one block the gradients of {', '.join(wrong)} are not those without it; "
            f"{worst} is off by {wrong[worst]:.0%} ({allowed:.0%} is allowed)",
            fix,
            (key,),
        )


def random_batch(plan: Plan, family: Family) -> Batch:
    """One random clip, a few token frames of a few tokens."""
    geometry = plan.geometry
    height, width = (size * (_TILES if geometry.tile > 1 else _TOKENS) for size in geometry.size_multiple)
    frames = next(
        frames
        for frames in range(1, 1000)
        if geometry.legal_frames(frames) and geometry.token_grid(frames, height, width).t >= _TOKEN_FRAMES
    )
    latent = (geometry.latent_channels, *geometry.latent_shape(frames, height, width))
    texts = {
        name: torch.randn(shape[0] - _PADDING, *shape[1:]) if len(shape) > 1 else torch.randn(shape)
        for name, shape in family.text_shapes().items()
    }
    conditioning = {}
    if plan.task == "i2v":
        conditioning = {name: torch.randn(1, *shape) for name, shape in family.image_shapes(latent).items()}
        conditioning["given"] = torch.ones(1)
    return Batch(
        latents=torch.randn(1, *latent),
        noise=torch.randn(1, *latent),
        sigma=torch.full((1,), 0.5),
        text=family.collate_text([texts]),
        grid=geometry.token_grid(frames, height, width),
        fps=plan.fps,
        keys=("",),
        conditioning=conditioning,
    )
