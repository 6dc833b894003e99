"""What the benchmarks share: paired timing, models of a size, and where results go."""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import crepatrain
from crepatrain.families import get_family
from crepatrain.families.base import Family
from crepatrain.geometry import Geometry, TokenGrid
from crepatrain.memory.account import StorageAccount
from crepatrain.specs import WAN
from crepatrain.tensors import Batch, PatchFeatures
from crepatrain.training.lora import add_lora, target_modules

RESULTS = Path(__file__).parent / "results"

# Wide and deep enough that a CPU step takes half a second and more.
SMALL = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 4,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 512,
    "freq_dim": 256,
    "ffn_dim": 2048,
    "num_layers": 10,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
SIZES: Mapping[str, tuple[Mapping[str, Any], tuple[int, int, int]]] = {
    "small": (SMALL, (17, 192, 320)),
    "wan2.1-1.3b": (WAN.released["wan2.1-1.3b"].transformer, (81, 480, 832)),
    "wan2.1-14b": (WAN.released["wan2.1-14b"].transformer, (81, 480, 832)),
}
RELEASED = WAN.released["wan2.1-1.3b"]
FAMILY: Family = get_family("wan", RELEASED.checkpoint)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=11)
    return parser


def peak_bytes(work: Callable[[], object], beside: Sequence[Tensor]) -> int:
    """The most bytes of tensors that some work holds at once.

    Args:
        beside: tensors of the same device that exist already and don't count.
    """
    account = StorageAccount()
    with account:
        with account.of("beside"):
            for tensor in beside:
                tensor.detach()
        account.begin()
        work()
    held = account.on(beside[0].device)
    return held.peak - held.peak_of["beside"]


def geometry(config: Mapping[str, Any]) -> Geometry:
    return WAN.geometry(config, RELEASED.vae)


def build_transformer(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype, *, checkpointing: bool = True) -> Any:
    """A Wan transformer with random weights and a LoRA of rank 32 on its attention, ready to train."""
    transformer = get_family("wan", replace(RELEASED.checkpoint, transformer=config)).empty_transformer()
    if device.type != "meta":
        rope = type(transformer.rope)(
            transformer.config.attention_head_dim, transformer.config.patch_size, transformer.config.rope_max_seq_len
        )
        transformer = transformer.to_empty(device=device)
        transformer.rope = rope.to(device)
        for name, parameter in transformer.named_parameters():
            nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.constant_(parameter, float("norm" in name))
    transformer = transformer.to(dtype)
    add_lora(transformer, target_modules(transformer, WAN.lora_targets, WAN), rank=32, alpha=32, dropout=0.0)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def build_batch(
    shape: Geometry,
    size: tuple[int, int, int],
    device: torch.device,
    *,
    text_width: int,
    teacher: tuple[int, tuple[int, int]] | None = None,
) -> Batch:
    """One random clip.

    Args:
        size: (frames, height, width) in pixels.
        teacher: E and (rows, columns) of its cached features.
    """
    grid = shape.token_grid(*size)
    latents = torch.randn(1, shape.latent_channels, *shape.latent_shape(*size), device=device)
    return Batch(
        latents=latents,
        noise=torch.randn_like(latents),
        sigma=torch.full((1,), 0.5, device=device),
        text={"prompt_embeds": torch.randn(1, WAN.text_length, text_width, device=device)},
        grid=grid,
        fps=FAMILY.variant.fps,
        keys=("random",),
        teacher=teacher and features(grid, *teacher, device),
        pixels=torch.zeros(1, grid.t, 3, *size[1:], dtype=torch.uint8, device=device),
    )


def features(grid: TokenGrid, width: int, cells: tuple[int, int], device: torch.device) -> PatchFeatures:
    return PatchFeatures(torch.randn(1, grid.t, cells[0] * cells[1], width, device=device).to(torch.float16), cells)


def paired(work: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each, run in turn and in changing order, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    order = list(work)
    for round_number in range(repeats + 1):
        random.Random(round_number).shuffle(order)
        for name in order:
            _wait(device)
            began = time.perf_counter()
            work[name]()
            _wait(device)
            if round_number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ratio(seconds: list[float], base: list[float]) -> dict[str, float]:
    """The median of the paired ratios with a bootstrapped 95 % interval."""
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"median": statistics.median(ratios), "low": medians[50], "high": medians[-51]}


def write(name: str, command: str, rows: list[dict[str, Any]]) -> None:
    """The rows as a JSON file in results/ and as a table on the screen."""
    machine = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    result = {
        "command": command,
        "machine": machine,
        "torch": torch.__version__,
        "crepatrain": crepatrain.__version__,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    columns = list(rows[0])
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
