"""Loading the parts of a checkpoint. Their files are checked first, so that our own error is never taken for a damaged file."""

import contextlib
import json
import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from crepatrain.errors import UserError
from crepatrain.files import safetensors_header

# The names under which diffusers and transformers look for weights, whole or with an index of several files.
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")

# What diffusers, transformers and torch say of weights of other shapes.
_INCOMPLETE = re.compile(r"expected shape torch\.Size|ignore_mismatched_sizes|size mismatch for")


@contextlib.contextmanager
def loading(folder: Path, parts: Sequence[str]) -> Iterator[None]:
    """Around the loading of some parts of a pipeline folder.

    Raises:
        UserError: a file of theirs is missing, damaged, or of another model.
    """
    for part in parts:
        _expect_whole(folder, part)
    try:
        yield
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise _damaged(", ".join(str(folder / part) for part in parts), error) from error
    except (ValueError, RuntimeError) as error:
        if not _INCOMPLETE.search(str(error)):
            raise
        raise _damaged(", ".join(str(folder / part) for part in parts), error) from error


def _damaged(where: str | Path, reason: Exception | str) -> UserError:
    first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
    return UserError(f"{where} can't be loaded: {first}", "download this part again")


def _expect_whole(folder: Path, part: str) -> None:
    """Read the small files of a part, and the headers of its weights.

    Raises:
        UserError: one of them is missing, damaged, or of another model than model_index.json names.
    """
    files = {path.name: _read_json(path) for path in (folder / part).glob("*.json")}
    weights = {folder / part / name for name in _WEIGHTS if (folder / part / name).is_file()}
    for name in _WEIGHTS:
        index = files.get(f"{name}.index.json")
        if index is not None:
            shards = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(shards, dict):
                raise _damaged(folder / part / f"{name}.index.json", "it has no weight_map")
            weights |= {folder / part / shard for shard in shards.values()}
    for path in sorted(weights):
        if safetensors_header(path) is None:
            raise _damaged(path, "it is damaged or cut off" if path.is_file() else "it is missing")
    library, name = _class_of(folder, part)
    if weights:
        _expect_config(folder / part / "config.json", library, name, files.get("config.json"))
    if "Tokenizer" in name:
        _expect_tokenizer(folder / part)


def _class_of(folder: Path, part: str) -> tuple[str, str]:
    """The library and the class that a pipeline names for a part; both empty where it names none."""
    index = _read_json(folder / "model_index.json")
    library, name = (index.get(part) if isinstance(index, dict) else None) or ("", "")
    return library or "", name or ""


def _expect_config(path: Path, library: str, name: str, config: Any) -> None:
    """A model's config.json is there, is of the class that the pipeline names, and such a model can be built from it.

    Raises:
        UserError: it is not.
    """
    if not isinstance(config, dict):
        raise _damaged(path, "it is missing" if config is None else f"it holds a {type(config).__name__}")
    if library == "diffusers" and config.get("_class_name", name) != name:
        raise _damaged(path, f"it is that of a {config['_class_name']}, and model_index.json names a {name}")
    if library == "transformers":
        kind = getattr(getattr(transformers, name, None), "config_class", None)
        found = config.get("model_type", getattr(kind, "model_type", None))
        # A model of pictures or text alone may be loaded from the config of a model of both.
        within = getattr(kind, "base_config_key", "") or ""
        if kind is not None and found != kind.model_type and within not in config:
            raise _damaged(path, f"it is that of a {found} model, and model_index.json names a {name}")
    _expect_buildable(path, library, name, config)


def _expect_buildable(path: Path, library: str, name: str, config: dict[str, Any]) -> None:
    """The model can be built from its config, which costs nothing on the meta device.

    Raises:
        UserError: a key is missing, or has a value that fits no model of the class.
    """
    package = {"diffusers": diffusers, "transformers": transformers}.get(library)
    if not hasattr(package, name):
        return
    kind: Any = getattr(package, name)
    with _fault_of(path, f"no {name} can be built from it: "), torch.device("meta"):
        if library == "diffusers":
            kind.from_config(config)
        elif library == "transformers" and hasattr(kind, "config_class"):
            kind(kind.config_class.from_pretrained(path.parent))


def _expect_tokenizer(folder: Path) -> None:
    """The tokenizer can be loaded.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    with _fault_of(folder):
        transformers.AutoTokenizer.from_pretrained(folder)


@contextlib.contextmanager
def _fault_of(path: Path, what: str = "") -> Iterator[None]:
    """Within it a library alone reads a file: what it raises is the file's fault, unless a package is missing."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # the libraries raise classes without a common base, and some a bare Exception
        raise _damaged(path, what + "".join(traceback.format_exception_only(error))) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _damaged(path, "it is missing") from None
    except ValueError as error:
        raise _damaged(path, f"it is not JSON ({error})") from error
    except OSError as error:
        raise _damaged(path, error) from error
