"""Plans of tiny checkpoints of every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import tiny_family

from crepatrain.config.plan import Plan, read_plan
from crepatrain.data.buckets import Bucket


def size_of(family: str) -> dict[str, int]:
    """A clip of three latent frames, a few tokens high and wide."""
    geometry = tiny_family(family).geometry
    height, width = geometry.size_multiple
    return {"num_frames": 2 * geometry.temporal_stride + 1, "height": 4 * height, "width": 6 * width}


def plans(tiny_checkpoint: Callable[..., Path], config_file: Callable[..., Path]) -> Callable[..., Plan]:
    """What makes the plan of a family's tiny checkpoint and changes to the config, out of two fixtures of those names."""

    def plan(family: str = "wan", name: str = "tiny", **changes: Any) -> Plan:
        folder = tiny_checkpoint(family, name)
        models = {"pretrained_model_name_or_path": str(folder), "crepa_encoder": str(folder / "encoder")}
        return read_plan(config_file(model_family=family, **models, **size_of(family) | changes))

    return plan


def bucket_of(plan: Plan) -> Bucket:
    frames, height, width = plan.size
    return Bucket(frames, height, width)
