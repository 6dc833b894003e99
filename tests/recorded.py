"""A run's folder as training leaves it, written without training."""

import json
from pathlib import Path
from typing import Any

DATASET = {
    "train_data": "clips",
    "clips": 3,
    "windows": 6,
    "left_out": 0,
    "unit": 1,
    "steps_per_epoch": 6,
    "steps": 60,
    "buckets": [{"bucket": "9x64x96", "windows": 6, "grid": "3 x 4 x 6", "tokens": 72, "teacher_grid": None}],
    "captions": [{"file": "clip-0.mp4", "windows": 6, "caption": "a square moves"}],
}


def write_run(root: Path, *, steps: int = 40, state: str = "running", reason: str = "", **config: Any) -> Path:
    root.mkdir()
    (root / "config.json").write_text(json.dumps({"max_train_steps": 100, "logging_steps": 1} | config), encoding="utf-8")
    (root / "status.json").write_text(json.dumps({"status": state, "step": steps // 20 * 20, "reason": reason}), encoding="utf-8")
    lines = [
        {
            "step": step,
            "loss": 0.25,
            "diffusion_loss": 0.5,
            "crepa_alignment_score": 0.75,
            "crepa_similarity_self": 0.5,
            "crepa_weight": 0.3,
            "crepa_cutoff": False,
            "step_seconds": 2.0,
        }
        for step in range(1, steps + 1)
    ]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for folder in ("checkpoints/step-000020", "checkpoints/step-000040.tmp", "adapters", "samples"):
        (root / folder).mkdir(parents=True)
    for step in (20, 100):
        (root / "adapters" / f"cat-{step:06d}.safetensors").touch()
    (root / "samples" / "step-000020-0.mp4").touch()
    return root
