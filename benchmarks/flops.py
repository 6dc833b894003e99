"""How many FLOPs CREPA from the cache adds to a step at released shapes: counted on the meta device, so the same everywhere."""

import sys

import torch
from common import FAMILY, SIZES, build_batch, build_transformer, geometry, write
from torch.utils.flop_counter import FlopCounterMode

from crepatrain.alignment.crepa import Crepa
from crepatrain.alignment.teachers import CachedTeacher
from crepatrain.specs import WAN
from crepatrain.training.diffusion import FlowMatching
from crepatrain.training.step import CrepaTerm, training_loss

GIANT = 1536  # E of DINOv2-g


def count(size: str, frames: int) -> dict[str, object]:
    config, (_, height, width) = SIZES[size]
    device = torch.device("meta")
    transformer = build_transformer(config, device, torch.float32)
    shape = geometry(config)
    grid = shape.token_grid(frames, height, width)
    batch = build_batch(shape, (frames, height, width), device, text_width=config["text_dim"], teacher=(GIANT, (grid.h, grid.w)))
    crepa = Crepa(shape.width, GIANT).to(device)
    flops = []
    for term in (None, CrepaTerm(crepa, CachedTeacher(), WAN.default_block, weight=0.5)):
        with FlopCounterMode(display=False) as counter:
            training_loss(FAMILY, FlowMatching("uniform"), transformer, transformer.blocks, batch, term).total.backward()
        flops.append(counter.get_total_flops())
    plain, cached = flops
    return {"model": size, "frames": frames, "plain TFLOP": plain / 1e12, "CREPA adds %": 100 * (cached / plain - 1)}


def main() -> None:
    cases = (("wan2.1-1.3b", 81), ("wan2.1-1.3b", 17), ("wan2.1-14b", 81))
    write("flops", " ".join(["python", *sys.argv]), [count(*case) for case in cases])


if __name__ == "__main__":
    main()
