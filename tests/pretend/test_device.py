"""The pretend device itself: what it refuses, reports and counts."""

import json

from building import compiled


def test_it_is_compiled_once(library):
    written = library.stat().st_mtime_ns
    assert compiled(library.parent) == library
    assert library.stat().st_mtime_ns == written


def test_it_refuses_what_cuda_refuses_and_reports_what_the_host_would_wait_for(inside):
    found = inside(
        """
import json
here, there = torch.ones(3), torch.arange(3.0, device="cuda")
refused = []
for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: torch.where(here > 0, there, 0),
              lambda: torch.rand(3, device="cuda", generator=torch.Generator())):
    try:
        mixed()
        refused.append(False)
    except RuntimeError:
        refused.append(True)
allowed = [(there + torch.tensor(1.0)).tolist(), there[torch.tensor([2, 0])].tolist()]

def seen(work):
    device.seen.clear()
    device.watching = True
    work()
    device.watching = False
    return sorted({f"{kind}: {what}" for kind, what, _ in device.seen})

pinned, back = here.pin_memory(), torch.empty(3, pin_memory=True)
views = (pinned[1:].is_pinned(), here.is_pinned())
reports = {
    "item": seen(lambda: there.sum().item()),
    "if": seen(lambda: bool(there[0] > 0)),
    "nonzero": seen(lambda: there.nonzero()),
    "mask": seen(lambda: there[there > 1]),
    "put": seen(lambda: there.clone().index_put_((there > 0,), there[:2])),
    "fill": seen(lambda: there.clone().index_put_((there > 0,), there[0])),
    "blocking": seen(lambda: here.to("cuda")),
    "pageable": seen(lambda: here.to("cuda", non_blocking=True)),
    "pinned": seen(lambda: pinned.to("cuda", non_blocking=True)),
    "cpu": seen(lambda: there.cpu()),
    "back": seen(lambda: back.copy_(there, non_blocking=True)),
    "synchronize": seen(torch.cuda.synchronize),
    "none": seen(lambda: torch.nn.functional.softmax(there * 2 + there.mean(), dim=0).clamp_(max=1)[1:]),
}
print(json.dumps([refused, allowed, views, reports]))
"""
    )
    refused, allowed, views, reports = json.loads(found)
    assert refused == [True] * 4
    assert allowed == [[1, 2, 3], [2, 0]]
    assert views == [True, False]
    assert reports == {
        "item": ["wait: item"],
        "if": ["wait: item"],
        "nonzero": ["wait: aten::nonzero"],
        "mask": ["wait: aten::nonzero", "wait: mask as index in aten::index.Tensor_out"],
        "put": ["wait: mask as index in aten::_index_put_impl_"],
        "fill": [],
        "blocking": ["wait: blocking copy to the device, 12 bytes"],
        "pageable": ["wait: copy of pageable memory to the device, 12 bytes"],
        "pinned": ["copy: to the device, 12 bytes"],
        "cpu": ["wait: blocking copy from the device, 12 bytes"],
        "back": ["copy: from the device, 12 bytes"],
        "synchronize": ["wait: synchronize"],
        "none": [],
    }


def test_it_computes_as_the_cpu_does_under_cudas_autocast(inside):
    found = inside(
        """
import json
import torch.nn.functional as F
torch.manual_seed(0)
import copy
from torch import nn
models = {"cpu": nn.Sequential(nn.Conv3d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(32, 3))}
models["cuda"] = copy.deepcopy(models["cpu"]).cuda()
clip, found = torch.randn(5, 2, 4, 4, 4), {}
for kind, model in models.items():
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(clip.to(kind)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found[kind] = [parameter.tolist() for parameter in model.parameters()]
same = all(torch.allclose(torch.tensor(one), torch.tensor(other)) for one, other in zip(*found.values()))

dtypes = {}
for kind in ("cpu", "cuda"):
    low = torch.ones(2, 4, device=kind, dtype=torch.bfloat16)
    with torch.autocast(kind, torch.bfloat16):
        dtypes[kind] = [str(made.dtype) for made in (
            F.linear(low.float(), low), F.layer_norm(low, (4,)), F.rms_norm(low, (4,)), low.softmax(-1), low.norm(), low.sum())]
print(json.dumps([same, dtypes]))
"""
    )
    same, dtypes = json.loads(found)
    low, full = "torch.bfloat16", "torch.float32"
    assert same
    assert dtypes["cuda"] == [low, full, full, full, full, full]
    assert dtypes["cpu"] != dtypes["cuda"]


def test_it_counts_memory_to_a_limit(inside):
    found = inside(
        """
import json
held = torch.empty(1000, device="cuda")
first = (device.live, torch.cuda.memory_allocated())
unwritten = bool(held.isnan().all())
device.limit(device.live + 2048)
torch.empty(2048, dtype=torch.uint8, device="cuda")
try:
    torch.empty(2049, dtype=torch.uint8, device="cuda")
    message = ""
except torch.OutOfMemoryError as error:
    message = str(error)
most = torch.cuda.max_memory_allocated()
del held
print(json.dumps([first, unwritten, message, most, device.live]))
"""
    )
    first, unwritten, message, most, last = json.loads(found)
    assert first == [4096, 4096]  # 4000 bytes, as CUDA's allocator rounds
    assert unwritten
    assert message.startswith("CUDA out of memory: 2560 bytes asked for, 2048 free")
    assert most == 4096 + 2048
    assert last == 0
