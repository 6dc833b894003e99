"""Reading models of diffusers and transformers from local folders: the host holds their weights, and two files of them at most.

Where weights keep their data type, the libraries map the files into memory, and nothing is read twice. Where they are cast, a map
of every file would stay beside what was cast until the last one is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from crepatrain.files import safetensors_header

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class StoredTensors:
    """The tensors of a model of diffusers, which stay in their files until they are read, one by one.

    Attributes:
        folder: of the files, in one or in several.
    """

    def __init__(self, path: str, part: str) -> None:
        self.folder = Path(path) / part
        whole = self.folder / "diffusion_pytorch_model.safetensors"
        self._places = _shards(self.folder) or dict.fromkeys(safetensors_header(whole) or {}, whole)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU; nothing of its file stays mapped."""
        with safe_open(self._places[name], framework="pt") as file:
            return file.get_tensor(name).to(dtype, copy=True)


class _Stored:
    """A tensor that stays in its file until transformers takes it, by the index `...`; nothing of the file stays mapped."""

    def __init__(self, file: Path, name: str) -> None:
        self._file, self._name = file, name

    def __getitem__(self, index: Any) -> Tensor:
        with safe_open(self._file, framework="pt") as file:
            return file.get_slice(self._name)[index]


def read_diffusers(kind: Any, path: str, part: str, dtype: torch.dtype) -> Any:
    """A model of diffusers from a pipeline's folder, on the CPU."""
    read_whole = bool(_cast_shards(Path(path) / part, dtype))  # file by file, each given up before the next but one
    return kind.from_pretrained(path, subfolder=part, torch_dtype=dtype, use_safetensors=True, disable_mmap=read_whole)


def read_transformers(kind: Any, path: str, part: str, dtype: torch.dtype) -> Any:
    """A model of transformers from a pipeline's folder, on the CPU, frozen."""
    stored = _cast_shards(Path(path) / part, dtype)
    if stored:
        config = kind.config_class.from_pretrained(path, subfolder=part)
        model = kind.from_pretrained(None, config=config, state_dict=dict(stored), dtype=dtype)
    else:
        model = kind.from_pretrained(path, subfolder=part, dtype=dtype, use_safetensors=True)
    return model.requires_grad_(False)


def _cast_shards(folder: Path, dtype: torch.dtype) -> Mapping[str, _Stored]:
    """The tensors of weights in several files that have another data type; empty where there is one file, or nothing to cast."""
    places = _shards(folder)
    headers = [safetensors_header(file) or {} for file in sorted(set(places.values()))]
    stored = {tensor["dtype"] for header in headers for name, tensor in header.items() if name != "__metadata__"}
    if stored <= {_DTYPES.get(dtype)}:
        return {}
    return {name: _Stored(file, name) for name, file in places.items()}


def _shards(folder: Path) -> dict[str, Path]:
    """The file of each tensor, where there are several files."""
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is None:
        return {}
    return {name: folder / file for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
