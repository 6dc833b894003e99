"""What an optimizer step asks of a device: FLOPs, bytes moved, operators launched; ours beside a bare loop of diffusers and peft.

Counted on fake tensors at released shapes, so the same everywhere, without a GPU; in bf16 under the CPU's autocast.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import FAMILY, SIZES, arguments, build_batch, build_transformer, geometry, write
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from crepatrain.config.sections import LoopConfig, OptimConfig
from crepatrain.placement.checkpointing import checkpoint_blocks
from crepatrain.placement.placing import materialise
from crepatrain.tensors import Batch
from crepatrain.training.diffusion import FlowMatching
from crepatrain.training.lora import trainable_parameters
from crepatrain.training.optim import build_scheduled_optimizer, clip_gradients
from crepatrain.training.step import training_loss

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# torch has the formula for the attention kernels of CUDA alone.
_FORMULAS: dict[Any, Any] = {
    _ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}


class Launches(TorchDispatchMode):
    """Counts operators that compute or copy, and the bytes that they read and write; views and allocations launch nothing."""

    # A tensor without values is asked for its device by an operator of its own.
    _NOTHING = ("prim::device",)
    _ALLOCATE = ("empty", "new_empty", "detach", "_to_copy_meta", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if func._schema.name in self._NOTHING:
            return made
        is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
        if not is_view and not func._schema.name.removeprefix("aten::").startswith(self._ALLOCATE):
            self.count += 1
            self.bytes += sum(tensor.nbytes for tensor in _tensors((args, kwargs, made)))
        return made


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def ours(transformer: Any, batch: Batch) -> Callable[[], None]:
    optimizer = build_scheduled_optimizer(OptimConfig(), transformer, 1e-4, 100)
    diverged = torch.zeros(())

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = training_loss(FAMILY, FlowMatching("logit_normal"), transformer, transformer.blocks, batch)
        losses.total.backward()
        norm = clip_gradients(optimizer.parameters, 1.0)
        found = torch.maximum(diverged, 1 - torch.isfinite(norm).float())
        optimizer.step(found)

    return step


def selective(transformer: Any, batch: Batch) -> Callable[[], None]:
    """Ours with `gradient_checkpointing: selective`."""
    checkpoint_blocks(LoopConfig(output_dir="unused", gradient_checkpointing="selective"), FAMILY, transformer)
    return ours(transformer, batch)


def bare(transformer: Any, batch: Batch) -> Callable[[], None]:
    """As a script of one page does it."""
    parameters = trainable_parameters(transformer)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        sigma = batch.sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - sigma) * batch.latents + sigma * batch.noise
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = transformer(
                hidden_states=noisy.to(torch.bfloat16),
                timestep=batch.sigma * 1000,
                encoder_hidden_states=batch.text["prompt_embeds"].to(torch.bfloat16),
                return_dict=False,
            )[0]
        torch.nn.functional.mse_loss(predicted.float(), batch.noise - batch.latents).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def count(size: str, frames: int) -> list[dict[str, Any]]:
    config, (_, height, width) = SIZES[size]
    rows: list[dict[str, Any]] = []
    for name, make in (("bare", bare), ("crepatrain", ours), ("crepatrain, selective", selective)):
        transformer = build_transformer(config, torch.device("meta"), torch.bfloat16)
        with FakeTensorMode(allow_non_fake_inputs=True):
            materialise(transformer, "cpu")
            batch = build_batch(geometry(config), (frames, height, width), torch.device("cpu"), text_width=config["text_dim"])
            step = make(transformer, batch)
            step()  # which makes the optimizer's states
            launches = Launches()
            with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as flops:
                step()
            with launches:
                step()
        moved, floating = launches.bytes / 1e9, flops.get_total_flops() / 1e12
        row = {"model": size, "frames": frames, "loop": name, "TFLOP": floating, "GB moved": moved, "launches": launches.count}
        rows.append(row)
    return [row | {f"{key} ratio": row[key] / rows[0][key] for key in ("TFLOP", "GB moved", "launches")} for row in rows]


def main() -> None:
    arguments(__doc__ or "").parse_args()
    cases = (("wan2.1-1.3b", 81), ("wan2.1-1.3b", 17), ("wan2.1-14b", 81))
    write("step", "python benchmarks/step.py", [row for case in cases for row in count(*case)])


if __name__ == "__main__":
    main()
