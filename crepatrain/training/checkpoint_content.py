"""What a checkpoint's files must hold for a run to continue, checked when they are read.

Every function raises a UserError that names the file where its content is not what the run needs. What they return is loaded
outside of any `except`: an error that comes up there is no fault of the checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from crepatrain.placement.states import State, states_of
from crepatrain.training.checkpoint import (
    FINGERPRINT_FILE,
    STATE_FILE,
    average_file,
    read_plain,
    read_tensors,
    read_tree,
    unusable,
    weights_file,
)
from crepatrain.training.lora import is_adapted, trained_state


class _Content(BaseModel):
    model_config = ConfigDict(strict=True)


class _Schedule(_Content):
    ema: FiniteFloat | None
    latched: bool


class _Window(_Content):
    sums: dict[str, FiniteFloat]
    counts: dict[str, Annotated[FiniteFloat, Field(gt=0)]]


class _State(_Content):
    step: NonNegativeInt
    samples_seen: NonNegativeInt
    schedule: _Schedule | None
    window: _Window


class _Fingerprint(_Content):
    models: dict[str, str]
    samples: str
    unit: PositiveInt
    windows: PositiveInt
    total: NonNegativeInt
    versions: dict[str, str]


def read_state(folder: Path, *, step: int, crepa: bool) -> dict[str, Any]:
    """The state of a run, as `TrainState.load_state_dict` takes it.

    Args:
        folder: the checkpoint's.
        step: which the folder's name says.
        crepa: whether the run has CREPA, and with it a schedule to restore.

    Raises:
        UserError: the file is missing or damaged, or does not hold such a state.
    """
    path, content = folder / f"{STATE_FILE}.json", read_plain(folder, STATE_FILE)
    _check(path, content, _State)
    if content["step"] != step:
        raise unusable(path, f"step: {content['step']}, and the folder's name says {step}")
    sums, counts = content["window"]["sums"], content["window"]["counts"]
    if sums.keys() != counts.keys():
        raise unusable(path, "window: sums and counts are not of the same numbers")
    if crepa and content["schedule"] is None:
        raise unusable(path, "schedule: null, and this run has CREPA")
    return content


def read_fingerprint(folder: Path) -> dict[str, Any]:
    """What the run of a checkpoint was made from.

    Raises:
        UserError: the file is missing or damaged, or holds something else.
    """
    content = read_plain(folder, FINGERPRINT_FILE)
    _check(folder / f"{FINGERPRINT_FILE}.json", content, _Fingerprint)
    return content


def _check(path: Path, content: Any, kind: type[_Content]) -> None:
    try:
        kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise unusable(path, f"{place}: {first['msg']}" if place else first["msg"]) from error


def read_trained(folder: Path, transformer: nn.Module, *, average: bool = False) -> dict[str, Tensor]:
    """What training moved, as `load_trained_state` takes it for this transformer.

    Args:
        folder: the checkpoint's.
        transformer: adapted, or trained as a whole; it is only compared with.
        average: the weights' average in place of the weights.

    Raises:
        UserError: the file is missing or damaged, or its tensors are not this transformer's by names and shapes.
    """
    name = average_file("transformer") if average else weights_file("transformer", adapted=is_adapted(transformer))
    return _read_matching(folder, name, trained_state(transformer))


def read_weights(folder: Path, name: str, module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module, as its `load_state_dict` takes them.

    Raises:
        UserError: the file is missing or damaged, or its tensors are not this module's by names and shapes.
    """
    return _read_matching(folder, name, module.state_dict())


def _read_matching(folder: Path, name: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    path, found = folder / f"{name}.safetensors", read_tensors(folder, name)
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise unusable(path, f"it lacks {len(missing)} of {len(expected)} tensors, such as {missing[0]}")
    if unexpected:
        raise unusable(path, f"{len(unexpected)} tensors such as {unexpected[0]} are none of this run")
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise unusable(path, f"{key} has the shape {list(tensor.shape)}, and this run's {list(expected[key].shape)}")
    return found


def read_optimizer(folder: Path, name: str, optimizer: Optimizer, lr_scheduler: LRScheduler) -> dict[str, Any]:
    """The states of an optimizer and of its learning-rate schedule, as their `load_state_dict` take them.

    Args:
        folder: the checkpoint's.
        name: of the two files, without their ends.
        optimizer: with the parameters that it will move; it is only compared with, as is its schedule.

    Returns:
        The states under "optimizer" and "lr_scheduler".

    Raises:
        UserError: a file is missing or damaged, or the states are not those of such an optimizer over such parameters.
    """
    path, content = folder / f"{name}.json", read_tree(folder, name)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("optimizer", "lr_scheduler")):
        raise unusable(path, "it does not hold an optimizer and an lr_scheduler")
    saved = content["optimizer"]
    groups, states = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or not isinstance(states, dict):
        raise unusable(path, "optimizer: it has no param_groups, or no state")
    _check_groups(path, groups, optimizer)
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    for index, state in states.items():
        if index not in parameters or not isinstance(state, dict):
            raise unusable(path, f"optimizer.state.{index}: it is the state of none of the {len(parameters)} parameters")
        _check_parameter_state(path, f"optimizer.state.{index}", state, _states(optimizer, parameters[index]))
    _check_lr_scheduler(path, content["lr_scheduler"], len(groups), lr_scheduler)
    return content


def _check_groups(path: Path, groups: list[Any], optimizer: Optimizer) -> None:
    expected = optimizer.state_dict()["param_groups"]
    if len(groups) != len(expected):
        raise unusable(path, f"optimizer.param_groups: {len(groups)} groups, and this run has {len(expected)}")
    for number, (group, own) in enumerate(zip(groups, expected, strict=True)):
        place = f"optimizer.param_groups.{number}"
        if not isinstance(group, dict) or not _is_number(group.get("lr")):
            raise unusable(path, f"{place}: it has no lr")
        if group.get("params") != own["params"]:
            raise unusable(path, f"{place}: it is not over the {len(own['params'])} parameters of this run")
        for key in own.keys() & group.keys():
            if _is_number(own[key]) and not _is_number(group[key]) and not isinstance(group[key], Tensor):
                raise unusable(path, f"{place}.{key}: {group[key]!r} is not a number")


def _states(optimizer: Optimizer, parameter: Tensor) -> Mapping[str, State]:
    """What an optimizer of torch keeps for a parameter; empty for the optimizers of other packages."""
    names = {torch.optim.AdamW: "adamw", torch.optim.Adafactor: "adafactor"}
    name = next((name for kind, name in names.items() if isinstance(optimizer, kind)), None)
    return states_of(name, parameter) if name else {}


def _check_parameter_state(path: Path, place: str, state: Mapping[Any, Any], expected: Mapping[str, State]) -> None:
    for key, own in expected.items():
        tensor = state.get(key)
        if not isinstance(tensor, Tensor):
            raise unusable(path, f"{place}: it has no {key}")
        if tuple(tensor.shape) != tuple(own.shape):
            raise unusable(path, f"{place}.{key} has the shape {list(tensor.shape)}, and this run's {list(own.shape)}")


def _check_lr_scheduler(path: Path, state: Mapping[str, Any], groups: int, lr_scheduler: LRScheduler) -> None:
    if not isinstance(state.get("last_epoch"), int) or state["last_epoch"] < 0:
        raise unusable(path, f"lr_scheduler.last_epoch: {state.get('last_epoch')!r} is not a number of steps")
    rates = state.get("base_lrs")
    if not isinstance(rates, list) or len(rates) != groups or not all(map(_is_number, rates)):
        raise unusable(path, f"lr_scheduler.base_lrs: {rates!r} is not {groups} learning rates")
    functions = lr_scheduler.state_dict().get("lr_lambdas")  # null for each, as our schedules' functions hold no state
    if state.get("lr_lambdas") != functions:
        raise unusable(path, f"lr_scheduler.lr_lambdas: {state.get('lr_lambdas')!r}, and this run has {functions!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
