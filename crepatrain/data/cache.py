"""The one store of everything that is computed once: latents, text, first frames, teacher features."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crepatrain.errors import UserError
from crepatrain.files import safetensors_header, written_aside

# Raised whenever what an entry holds is made in another way.
FORMAT = 1

_INT8_MAX = 127
_SMALLEST_SCALE = torch.finfo(torch.float16).tiny

Kind = Literal["latents", "text", "image", "teacher"]


def entry_key(**facts: Any) -> str:
    """The name of an entry: a digest of everything that its content depends on."""
    canonical = json.dumps({"format": FORMAT, **facts}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


class CacheStore:
    """Entries of tensors, each a safetensors file that is whole or not there.

    Args:
        root: folder, created with the first entry.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: Kind, key: str) -> Path:
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: Kind, key: str) -> bool:
        """Whether an entry is there and as long as it says; a disk that lost its end has lost the entry."""
        return safetensors_header(self.path(kind, key)) is not None

    def write(self, kind: Kind, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Written aside, flushed to the disk and renamed, so that a kill leaves no half entry."""
        path = self.path(kind, key)
        try:
            with written_aside(path) as aside:
                save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, aside)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cache_dir={self.root}: {path.name} can't be written ({error})", "free disk space, or set cache_dir"
            ) from error

    def read(self, kind: Kind, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, memory-mapped.

        Raises:
            UserError: it is gone or damaged.
        """
        path = self.path(kind, key)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise UserError(f"cache entry {path} can't be read ({error})", "delete it; the next run writes it again") from error


def pack_features(values: Tensor, dtype: Literal["float16", "int8"]) -> dict[str, Tensor]:
    """Teacher features [N, P, E] as an entry holds them: fp16, or int8 with one fp16 scale per patch."""
    if dtype == "float16":
        return {"values": values.to(torch.float16)}
    scale = values.float().abs().amax(dim=-1, keepdim=True).clamp(min=_SMALLEST_SCALE * _INT8_MAX) / _INT8_MAX
    scale = scale.to(torch.float16)
    return {"values": (values.float() / scale.float()).round().clamp(-_INT8_MAX, _INT8_MAX).to(torch.int8), "scale": scale}


def unpack_features(entry: Mapping[str, Tensor]) -> Tensor:
    """Teacher features [N, P, E] in fp16, from either form."""
    values = entry["values"]
    return values if "scale" not in entry else (values.float() * entry["scale"].float()).to(torch.float16)
