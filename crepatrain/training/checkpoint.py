"""A run's checkpoints: written aside, renamed when whole, read back to the bit."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crepatrain.errors import UserError
from crepatrain.files import flush, written_aside

# Files of a checkpoint: what training moves, and the average of that.
TRAINED_FILE = {"lora": "adapter", "full": "transformer"}
EMA_FILE = "ema"

_TENSOR = "__tensor__"
_PAIRS = "__pairs__"


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], trees: Mapping[str, Any], plain: Mapping[str, Any]
) -> None:
    """Write a checkpoint folder; a kill at any moment leaves either all of it or none.

    Args:
        folder: `step-N`.
        tensors: file name -> its tensors.
        trees: file name -> nested state with tensors in it, such as an optimizer's.
        plain: file name -> what JSON can hold.

    Raises:
        UserError: the disk is full or can't be written to.
    """
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        for name, content in tensors.items():
            _save_tensors(aside / f"{name}.safetensors", content)
        for name, tree in trees.items():
            found: dict[str, Tensor] = {}
            _write_json(aside / f"{name}.json", _flatten(tree, found))
            _save_tensors(aside / f"{name}.safetensors", found)
        for name, content in plain.items():
            _write_json(aside / f"{name}.json", content)
        for file in aside.iterdir():
            flush(file)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise _cannot_write(folder, error) from error


def _cannot_write(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} can't be written ({error})", "free disk space, or mend its permissions; earlier checkpoints are untouched"
    )


def _cannot_read(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [""])[0]
    return UserError(
        f"{path} can't be read ({type(error).__name__}: {reason})", "remove this checkpoint folder to go on from the one before"
    )


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """What comes of a checkpoint whose files can be read but hold something else, as what the user can do about it.

    Raises:
        UserError: so it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, AssertionError) as error:
        raise _cannot_read(folder, error) from error


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """One tensor file of a checkpoint, on the CPU.

    Raises:
        UserError: it is gone or damaged.
    """
    path = folder / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _cannot_read(path, error) from error


def read_tree(folder: Path, name: str) -> Any:
    """One nested state of a checkpoint."""
    return _unflatten(read_plain(folder, name), read_tensors(folder, name))


def read_plain(folder: Path, name: str) -> Any:
    """One JSON file of a checkpoint.

    Raises:
        UserError: it is gone or damaged.
    """
    path = folder / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _cannot_read(path, error) from error


def replace_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], check: Callable[[Path], None] = lambda _: None
) -> None:
    """Write a safetensors file aside and rename it.

    Args:
        check: called with the file aside; what it raises leaves `path` as it was.

    Raises:
        UserError: the disk is full or can't be written to.
    """
    try:
        with written_aside(path) as aside:
            save_file(dict(tensors), aside, metadata=dict(metadata))
            check(aside)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error


def replace_json(path: Path, content: Any) -> None:
    """Write a JSON file aside and rename it.

    Raises:
        UserError: the disk is full or can't be written to.
    """
    try:
        with written_aside(path) as aside:
            _write_json(aside, content)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _flatten(tree: Any, found: dict[str, Tensor]) -> Any:
    """Nested dicts, lists and numbers with the tensors taken out into `found`."""
    if isinstance(tree, Tensor):
        name = f"t{len(found)}"
        found[name] = tree
        return {_TENSOR: name}
    if isinstance(tree, Mapping):
        if all(isinstance(key, str) for key in tree):
            return {key: _flatten(value, found) for key, value in tree.items()}
        return {_PAIRS: [[key, _flatten(value, found)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return [_flatten(value, found) for value in tree]
    assert tree is None or isinstance(tree, (bool, int, float, str)), type(tree)
    return tree


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unflatten(value, tensors) for value in tree]
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        if _PAIRS in tree:
            return {key: _unflatten(value, tensors) for key, value in tree[_PAIRS]}
        return {key: _unflatten(value, tensors) for key, value in tree.items()}
    return tree
