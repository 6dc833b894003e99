"""The memory estimate of a training step beside what a GPU really allocates, over families and sizes."""

import sys
from typing import Any

import torch
from common import arguments, write

from crepatrain.config.plan import Plan, make_plan
from crepatrain.config.run_config import RunConfig
from crepatrain.data.buckets import Bucket
from crepatrain.memory import stages
from crepatrain.memory.account import StorageAccount
from crepatrain.specs import FAMILIES

SIZES = ("wan2.1-1.3b", "wan2.1-14b", "wan2.2-5b", "ltx-2b", "ltx-13b", "sana-2b", "kandinsky5-lite")


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--sizes", nargs="*", default=SIZES)
    chosen = parser.parse_args()
    rows = [row(name, chosen.device) for name in chosen.sizes]
    write(f"vram-{chosen.device}", " ".join(["python", *sys.argv]), rows)
    if chosen.device == "cpu":
        print("not calibrated on CUDA: kernels' workspaces and the allocator may add some per cent")


def row(name: str, device: str) -> dict[str, Any]:
    spec = next(spec for spec in FAMILIES.values() if name in spec.released)
    config = RunConfig.model_validate(
        {
            "model_family": spec.name,
            "pretrained_model_name_or_path": spec.released[name].repo,
            "train_data": "benchmarks",
            "output_dir": "outputs/none",
            "max_train_steps": 100,
            "crepa_enabled": True,
            "crepa_encoder_image_size": "grid",
        }
    )
    plan = make_plan(config, online=False)
    frames, height, width = plan.size
    bucket = Bucket(frames, height, width)
    estimated = stages.training_stage(plan, bucket).allocated / stages.GIB
    found = {"model": name, "clip": str(bucket), "estimated GiB": estimated, "measured GiB": None, "ratio": None}
    if device == "cuda":
        measured = measured_step(plan, bucket, torch.device("cuda")) / stages.GIB
        torch.cuda.empty_cache()
        found |= {"measured GiB": measured, "ratio": estimated / measured}
    return found


def measured_step(plan: Plan, bucket: Bucket, device: torch.device) -> int:
    """Bytes that a CUDA device really allocates in the step that is estimated, with arbitrary weights."""
    step, account = stages.TrainingStep(plan, bucket), StorageAccount()
    with account:
        step.place(account, device)
    torch.cuda.reset_peak_memory_stats(device)
    step.run(account)
    return torch.cuda.max_memory_allocated(device)


if __name__ == "__main__":
    main()
