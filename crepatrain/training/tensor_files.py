"""Safetensors files, written tensor by tensor: nothing is copied on the GPU, and one tensor at a time to the host."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

# The names of data types in a safetensors file.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNED = 8


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Write tensors of any device. Each is copied to the host, changed, cast and written before the next one is looked at.

    Args:
        dtype: of all tensors on the disk; None: each keeps its own.
        change: a tensor's name and its copy on the host -> what is written of it, in the same shape.

    Raises:
        OSError: the disk is full or can't be written to.
    """
    kept = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
    # The widest first, so that every tensor begins at a multiple of its own width; so that equal content makes equal files.
    order = sorted(tensors, key=lambda name: (-kept[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * kept[name].itemsize
        header[name] = {"dtype": _NAMES[kept[name]], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _ALIGNED) * _ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            value = tensors[name].detach().to("cpu")
            if change:
                value = change(name, value)
            assert value.shape == tensors[name].shape, name
            value = value.to(kept[name]).contiguous()
            if value.numel():  # of none there are no bytes to look at
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)
