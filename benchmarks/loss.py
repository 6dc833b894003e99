"""The alignment loss at a real shape: a literal reading of the formula against ours. T=21, P=30x52, D=E=1536, bf16 tokens."""

import math
import sys

import torch
import torch.nn.functional as F
from common import arguments, paired, peak_bytes, ratio, write
from torch import Tensor

from crepatrain.alignment.crepa import Crepa
from crepatrain.geometry import TokenGrid
from crepatrain.tensors import PatchFeatures


def literal(crepa: Crepa, tokens: Tensor, teacher: PatchFeatures, grid: TokenGrid) -> Tensor:
    """Everything at once, neighbour by neighbour."""
    student = F.normalize(crepa.projector(tokens.float().unflatten(1, (grid.t, grid.patches))), dim=-1)
    features = F.normalize(teacher.values.float(), dim=-1)
    total = tokens.new_zeros((), dtype=torch.float32)
    for f in range(grid.t):
        total = total + (student[:, f] * features[:, f]).sum(-1).mean()
        for k in (f - 1, f + 1):
            if 0 <= k < grid.t:
                total = total + math.exp(-1) * (student[:, f] * features[:, k]).sum(-1).mean()
    return -total / grid.t


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    device = torch.device(options.device)
    t, h, w, width = 21, 30, 52, 1536
    grid = TokenGrid(t, h, w, tuple((i, i + 1) for i in range(t)))
    crepa = Crepa(width, width).to(device)
    hidden = torch.randn(1, grid.tokens, width, device=device).to(torch.bfloat16).requires_grad_()
    teacher = PatchFeatures(torch.randn(1, t, h * w, width, device=device).to(torch.float16), (h, w))
    work = {
        "literal": lambda: torch.autograd.grad(literal(crepa, hidden, teacher, grid), hidden),
        "ours": lambda: torch.autograd.grad(crepa(hidden, teacher, grid).loss.mean(), hidden),
    }
    seconds = paired(work, options.repeats, device)
    rows = []
    for name, run in work.items():
        against = ratio(seconds[name], seconds["literal"])
        rows.append(
            {
                "form": name,
                "seconds": sorted(seconds[name])[options.repeats // 2],
                "time ratio": against["median"],
                "low": against["low"],
                "high": against["high"],
                "peak MiB": peak_bytes(run, [hidden, teacher.values, *crepa.parameters()]) / 2**20,
            }
        )
    write(f"loss-{options.device}", " ".join(["python", *sys.argv]), rows)


if __name__ == "__main__":
    main()
