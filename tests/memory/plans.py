"""Plans of tiny checkpoints of every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from crepatrain.config.plan import Plan, read_plan
from crepatrain.data.buckets import Bucket

SIZES = {"wan": (9, 64, 96), "ltxvideo": (17, 128, 192), "sanavideo": (9, 64, 96), "kandinsky5_video": (9, 64, 96)}


def plans(tiny_checkpoint: Callable[..., Path], config_file: Callable[..., Path]) -> Callable[..., Plan]:
    """What makes the plan of a family's tiny checkpoint and changes to the config, out of two fixtures of those names."""

    def plan(family: str = "wan", name: str = "tiny", **changes: Any) -> Plan:
        frames, height, width = SIZES[family]
        folder = tiny_checkpoint(family, name)
        size = {"num_frames": frames, "height": height, "width": width}
        models = {"pretrained_model_name_or_path": str(folder), "crepa_encoder": str(folder / "encoder")}
        return read_plan(config_file(model_family=family, **models, **size | changes))

    return plan


def bucket_of(plan: Plan) -> Bucket:
    frames, height, width = plan.size
    return Bucket(frames, height, width)
