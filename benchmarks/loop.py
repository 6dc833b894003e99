"""What fit costs over a bare loop of the same model: forward, backward, clip, optimizer. Without CREPA, to see the trainer."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import FAMILY, RELEASED, SMALL, arguments, build_batch, build_transformer, geometry, ratio, write

from crepatrain.commands.demo_clips import make_clips
from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.families.random import write_random_pipeline
from crepatrain.specs import ModelShapes
from crepatrain.training.diffusion import FlowMatching
from crepatrain.training.lora import trainable_parameters
from crepatrain.training.step import training_loss

SIZE = (17, 128, 192)
STEPS = 6


def bare(device: torch.device, dtype: torch.dtype) -> list[float]:
    """Seconds of each step after the first."""
    transformer = build_transformer(SMALL, device, dtype)
    parameters = trainable_parameters(transformer)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    batch = build_batch(geometry(SMALL), SIZE, device, text_width=SMALL["text_dim"])
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = training_loss(FAMILY, FlowMatching("logit_normal"), transformer, transformer.blocks, batch)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def trainer(folder: Path, number: int, values: dict[str, Any]) -> list[float]:
    """Seconds of each step after the first, as fit itself logs them."""
    config = folder / "config.json"
    config.write_text(json.dumps(values | {"output_dir": str(folder / f"run-{number}")}), encoding="utf-8")
    fit(read_plan(config), Screen(quiet=True))
    lines = (folder / f"run-{number}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step_seconds"] for line in lines][1:]


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    seconds: dict[str, list[float]] = {"bare": [], "fit": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        screen = Screen(quiet=True)
        shapes = ModelShapes("", SMALL, {**RELEASED.vae, "base_dim": 24}, RELEASED.scheduler)
        write_random_pipeline(type(FAMILY), folder / "model", shapes)
        make_clips(folder / "clips", screen)
        values = {
            "model_family": "wan",
            "pretrained_model_name_or_path": str(folder / "model"),
            "train_data": str(folder / "clips"),
            "cache_dir": str(folder / "cache"),
            "num_frames": SIZE[0],
            "height": SIZE[1],
            "width": SIZE[2],
            "max_train_steps": STEPS,
            "mixed_precision": "bf16" if dtype == torch.bfloat16 else "no",
        }
        for number in range(options.repeats):
            seconds["bare"] += bare(device, dtype)
            seconds["fit"] += trainer(folder, number, values)
    rows = []
    for name, measured in seconds.items():
        against = ratio(measured, seconds["bare"])
        median = sorted(measured)[len(measured) // 2]
        rows.append(
            {"loop": name, "seconds": median, "time ratio": against["median"], "low": against["low"], "high": against["high"]}
        )
    write(f"loop-{options.device}", " ".join(["python", *sys.argv]), rows)


if __name__ == "__main__":
    main()
