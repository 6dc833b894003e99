"""The one store of everything that is computed once: latents, text, first frames, teacher features."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crepatrain.errors import UserError
from crepatrain.files import safetensors_header, written_aside
from crepatrain.integrity import Damaged, seal, sealed_metadata, unsealed

# Raised whenever what an entry holds is made in another way.
FORMAT = 1

_INT8_MAX = 127
_SMALLEST_SCALE = torch.finfo(torch.float16).tiny

Kind = Literal["latents", "text", "image", "teacher"]


def entry_key(**facts: Any) -> str:
    """The name of an entry: a digest of everything that its content depends on."""
    canonical = json.dumps({"format": FORMAT, **facts}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


# In the header of an entry: which one it is.
_ENTRY_KEY = "crepatrain.entry"


@dataclass(frozen=True)
class Form:
    """What a tensor of an entry has to be.

    Attributes:
        shape: its dimensions.
        dtypes: as safetensors names them.
        up_to: whether the first dimension may be smaller, as that of a caption's tokens.
    """

    shape: tuple[int, ...]
    dtypes: Collection[str]
    up_to: bool = False

    def mismatch(self, name: str, found: Mapping[str, Any]) -> str | None:
        """Why a tensor of a safetensors header is another one; None where it is not."""
        shape, dtype = tuple(found["shape"]), found["dtype"]
        same = shape == self.shape
        if self.up_to:
            same = shape[1:] == self.shape[1:] and len(shape) == len(self.shape) and shape[0] <= self.shape[0]
        if not same:
            return f"{name} has the shape {list(shape)}, and {'at most ' * self.up_to}{list(self.shape)} is needed"
        return None if dtype in self.dtypes else f"{name} is of {dtype}, and {' or '.join(sorted(self.dtypes))} is needed"


class CacheStore:
    """Entries of tensors, each a safetensors file that is whole or not there, with a digest in its header.

    Args:
        root: folder, created with the first entry.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._checked: set[tuple[Kind, str]] = set()

    def path(self, kind: Kind, key: str) -> Path:
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def mismatch(self, kind: Kind, key: str, forms: Mapping[str, Form]) -> str | None:
        """Why an entry, by its header, is not what is needed; None where it is.

        Args:
            forms: of its tensors.
        """
        header = safetensors_header(self.path(kind, key))
        if header is None:
            return "it is cut off, or no safetensors file"
        names = header.keys() - {"__metadata__"}
        if names != forms.keys():
            return f"it holds {', '.join(sorted(names)) or 'nothing'}, and {', '.join(sorted(forms))} is needed"
        try:
            return next(filter(None, (form.mismatch(name, header[name]) for name, form in forms.items())), None)
        except (KeyError, TypeError):
            return "its header is damaged"

    def expect_whole(self, kind: Kind, key: str) -> None:
        """Hold an entry against the digest in its header, which those of earlier versions don't have.

        Raises:
            Damaged: it is not what was written.
            OSError: it can't be read.
        """
        metadata = sealed_metadata(self.path(kind, key))
        entry = _name(kind, key) if metadata is None else metadata.get(_ENTRY_KEY)
        if entry != _name(kind, key):
            raise Damaged(f"it is a copy of another entry, {entry}")

    def write(self, kind: Kind, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Written aside, flushed to the disk and renamed, so that a kill leaves no half entry."""
        path = self.path(kind, key)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            with written_aside(path) as aside:
                save_file(plain, aside, metadata=unsealed({_ENTRY_KEY: _name(kind, key)}))
                seal(aside)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cache_dir={self.root}: {path.name} can't be written ({error})", "free disk space, or set cache_dir"
            ) from error

    def read(self, kind: Kind, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, memory-mapped. It is held against its digest when this process first reads it.

        Raises:
            UserError: it is gone, or damaged, and then removed so that the next run writes it.
        """
        path = self.path(kind, key)
        try:
            if (kind, key) not in self._checked:
                self.expect_whole(kind, key)
                self._checked.add((kind, key))
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (Damaged, SafetensorError) as error:
            raise UserError(f"cache entry {path} is damaged ({error})", _remove(path)) from error
        except OSError as error:
            fix = "run the same command again, which writes it again"
            raise UserError(f"cache entry {path} can't be read ({error.strerror or error})", fix) from error


def _name(kind: Kind, key: str) -> str:
    return f"{kind}/{key}"


def _remove(path: Path) -> str:
    """Make room for an entry, and say what is left to do."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return "delete it, and run the same command again, which writes it again"
    return "it was removed: run the same command again, which writes it again"


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
