"""A run's checkpoints: written aside, renamed when complete, read back bit by bit."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crepatrain.errors import UserError
from crepatrain.files import flush, unfinished_name, written_aside
from crepatrain.integrity import LISTED_KEY, MANIFEST_FORMAT, Damaged, expect_listed, seal, unsealed, write_manifest
from crepatrain.training.tensor_files import write_tensors

# The files of a checkpoint, without the ends of their names.
STATE_FILE = "state"
FINGERPRINT_FILE = "fingerprint"
# What training moves of the transformer, and the average of that.
_TRAINED_FILE = {"lora": "adapter", "full": "transformer"}
_EMA_FILE = "ema"

_TENSOR = "__tensor__"
_PAIRS = "__pairs__"


def weights_file(model: str, *, adapted: bool = False) -> str:
    """The file with the weights of a trained model: "transformer" or "projector".

    Args:
        adapted: whether the model has an adapter, which is then all that is trained of it.
    """
    return _TRAINED_FILE["lora" if adapted else "full"] if model == "transformer" else model


def average_file(model: str) -> str:
    """The file with the average of a trained model's weights, which only the transformer has."""
    assert model == "transformer", model
    return _EMA_FILE


def optimizer_file(model: str) -> str:
    """The two files with the states of a trained model's optimizer and of its learning-rate schedule."""
    return f"{model}_learner"


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], trees: Mapping[str, Any], plain: Mapping[str, Any]
) -> None:
    """Write a checkpoint folder, with a manifest of its files; a kill at any moment leaves either all of it or none.

    Args:
        folder: `step-N`.
        tensors: file name -> its tensors.
        trees: file name -> nested state with tensors in it, such as an optimizer's.
        plain: file name -> what JSON can hold.

    Raises:
        UserError: the disk is full or can't be written to.
    """
    aside = unfinished_name(folder)
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
        write_manifest(aside)
        for file in aside.iterdir():
            flush(file)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise _cannot_write(folder, error) from error


def _cannot_write(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} can't be written ({error})", "free disk space, or fix its permissions; earlier checkpoints are untouched"
    )


def unusable(path: Path, reason: str) -> UserError:
    """A file of a checkpoint that is damaged, or holds something else than this run needs, as what the user can do about it."""
    return UserError(f"{path} can't be read ({reason})", "remove this checkpoint folder to continue from the one before")


def _cannot_read(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [""])[0]
    return unusable(path, f"{type(error).__name__}: {reason}")


def damage_of(folder: Path) -> str | None:
    """Why a checkpoint is not what was written, by its manifest; None where it is, or where an earlier version wrote none."""
    try:
        expect_listed(folder)
    except Damaged as damage:
        return str(damage)
    return None


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """One tensor file of a checkpoint, on the CPU.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _cannot_read(path, error) from error


def read_tree(folder: Path, name: str) -> Any:
    """One nested state of a checkpoint, as `write_checkpoint` was given it.

    Raises:
        UserError: a file of it is missing or damaged, or the two files don't belong together.
    """
    return _unflatten(read_plain(folder, name), read_tensors(folder, name), folder / f"{name}.json")


def read_plain(folder: Path, name: str) -> Any:
    """One JSON file of a checkpoint.

    Raises:
        UserError: it is missing or damaged.
    """
    path = folder / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _cannot_read(path, error) from error


def replace_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    check: Callable[[Path], None] = lambda _: None,
    *,
    dtype: torch.dtype | None = None,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Write a safetensors file aside, with its digest in its header, and rename it.

    Args:
        dtype, change: as `write_tensors` takes them.
        check: called with the file aside; what it raises leaves `path` as it was.

    Raises:
        UserError: the disk is full or can't be written to.
    """
    try:
        with written_aside(path) as aside:
            write_tensors(aside, tensors, unsealed(metadata), dtype=dtype, change=change)
            seal(aside)
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
    write_tensors(path, tensors, {LISTED_KEY: str(MANIFEST_FORMAT)})


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


def _unflatten(tree: Any, tensors: Mapping[str, Tensor], path: Path) -> Any:
    """What `_flatten` was given.

    Args:
        path: of the JSON file, for messages.
    """
    if isinstance(tree, list):
        return [_unflatten(value, tensors, path) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        name = tree[_TENSOR]
        if not isinstance(name, str) or name not in tensors:
            raise unusable(path, f"the tensor {name!r} is not in {path.with_suffix('.safetensors').name}")
        return tensors[name]
    if _PAIRS in tree:
        pairs = tree[_PAIRS]
        if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
            raise unusable(path, f"{_PAIRS} holds something else than pairs of a key and a value")
        return {key: _unflatten(value, tensors, path) for key, value in pairs}
    return {key: _unflatten(value, tensors, path) for key, value in tree.items()}


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], (bool, int, float, str))
