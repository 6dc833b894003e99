"""What a checkpoint holds is checked when it is read; what comes up while it is loaded is a bug, and comes out as itself."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import tiny_family
from diffusers.optimization import get_scheduler
from torch import nn

from crepatrain.errors import UserError
from crepatrain.training.checkpoint import read_tree, write_checkpoint
from crepatrain.training.checkpoint_content import read_fingerprint, read_optimizer, read_state, read_trained, read_weights
from crepatrain.training.lora import add_lora, load_trained_state, target_modules, trained_state

STATE = {
    "step": 3,
    "samples_seen": 6,
    "schedule": {"ema": 0.25, "latched": False},
    "window": {"sums": {"loss": 1.5}, "counts": {"loss": 2}},
}
FINGERPRINT = {
    "models": {"transformer": "digest"},
    "samples": "digest",
    "unit": 2,
    "windows": 3,
    "total": 9,
    "versions": {"torch": "2"},
}
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-3),
}


def changed(tree: Any, place: str, value: Any) -> Any:
    """A copy with another value at a place such as window.sums; without it where the value is `...`."""
    tree = copy.deepcopy(tree)
    *path, last = place.split(".")
    inner = tree
    for key in path:
        inner = inner[int(key)] if isinstance(inner, list) or key not in inner else inner[key]
    last = last if isinstance(inner, dict) and last in inner else int(last) if last.isdigit() else last
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return tree


def refused(read: Callable[[], Any], *words: str) -> None:
    with pytest.raises(UserError) as error:
        read()
    what, fix = str(error.value).split("\n")
    assert "can't be read (" in what
    for word in words:
        assert word in what
    assert fix == "  -> remove this checkpoint folder to continue from the one before"


def test_a_state_and_a_fingerprint_come_back_as_they_are(tmp_path: Path):
    write_checkpoint(tmp_path / "step-000003", {}, {}, {"state": STATE, "fingerprint": FINGERPRINT})
    assert json.dumps(read_state(tmp_path / "step-000003", step=STATE["step"], crepa=True)) == json.dumps(STATE)
    assert json.dumps(read_fingerprint(tmp_path / "step-000003")) == json.dumps(FINGERPRINT)


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ([], "dictionary"),
        ({}, "step: Field required"),
        (changed(STATE, "step", "3"), "step: Input should be a valid integer"),
        (changed(STATE, "step", -1), "step: "),
        (changed(STATE, "step", True), "step: "),
        (changed(STATE, "step", 3.0), "step: "),
        (changed(STATE, "step", 2), "step: 2, and the folder's name says 3"),
        (changed(STATE, "samples_seen", None), "samples_seen: "),
        (changed(STATE, "schedule", {}), "schedule.ema: Field required"),
        (changed(STATE, "schedule.latched", "no"), "schedule.latched: "),
        (changed(STATE, "schedule", None), "schedule: null, and this run has CREPA"),
        (changed(STATE, "window", {}), "window.sums: Field required"),
        (changed(STATE, "window.sums.loss", "high"), "window.sums.loss: "),
        (changed(STATE, "window.counts.loss", 0), "window.counts.loss: "),
        (changed(STATE, "window.counts", {}), "window: sums and counts are not of the same numbers"),
    ],
)
def test_a_state_that_is_something_else_is_refused(tmp_path: Path, state: Any, word: str):
    write_checkpoint(tmp_path / "step-000003", {}, {}, {"state": state})
    refused(lambda: read_state(tmp_path / "step-000003", step=STATE["step"], crepa=True), "step-000003/state.json", word)


def test_a_run_without_crepa_needs_no_schedule(tmp_path: Path):
    write_checkpoint(tmp_path / "step-000003", {}, {}, {"state": changed(STATE, "schedule", None)})
    assert read_state(tmp_path / "step-000003", step=STATE["step"], crepa=False)["schedule"] is None


@pytest.mark.parametrize(
    ("fingerprint", "word"),
    [
        ({}, "models: Field required"),
        (None, "dictionary"),
        (changed(FINGERPRINT, "models.transformer", 5), "models.transformer: "),
        (changed(FINGERPRINT, "unit", 0), "unit: "),
        (changed(FINGERPRINT, "total", "9"), "total: "),
        (changed(FINGERPRINT, "versions", ...), "versions: Field required"),
    ],
)
def test_a_fingerprint_that_is_something_else_is_refused(tmp_path: Path, fingerprint: Any, word: str):
    write_checkpoint(tmp_path / "step-000003", {}, {}, {"fingerprint": fingerprint})
    refused(lambda: read_fingerprint(tmp_path / "step-000003"), "step-000003/fingerprint.json", word)


def adapted(rank: int = 4) -> Any:
    family = tiny_family()
    transformer = family.transformer_class.from_config(dict(family.checkpoint.transformer))
    modules = target_modules(transformer, family.spec.lora_targets, family.spec)
    add_lora(transformer, modules, rank=rank, alpha=4.0, dropout=0.0)
    return transformer


def test_trained_weights_come_back_for_the_transformer_that_they_are_of(tmp_path: Path):
    transformer, folder = adapted(), tmp_path / "step-000001"
    state = {name: torch.randn_like(tensor) for name, tensor in trained_state(transformer).items()}
    write_checkpoint(folder, {"adapter": state, "ema": {name: 2 * tensor for name, tensor in state.items()}}, {}, {})
    found, average = read_trained(folder, transformer), read_trained(folder, transformer, average=True)
    assert found.keys() == average.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) and torch.equal(average[name], 2 * tensor) for name, tensor in state.items())
    refused(lambda: read_trained(folder, adapted(rank=2)), "adapter.safetensors", "has the shape [4, 48], and this run's [2, 48]")
    name = min(state)
    write_checkpoint(folder, {"adapter": {key: tensor for key, tensor in state.items() if key != name}}, {}, {})
    refused(lambda: read_trained(folder, transformer), f"it lacks 1 of {len(state)} tensors, such as {name}")
    write_checkpoint(folder, {"adapter": state | {"other": torch.ones(2)}}, {}, {})
    refused(lambda: read_trained(folder, transformer), "1 tensors such as other are none of this run")
    refused(lambda: read_trained(folder, transformer, average=True), "ema.safetensors", "FileNotFoundError")


def test_weights_of_a_module_are_compared_with_it(tmp_path: Path):
    module, folder = nn.Linear(3, 2), tmp_path / "step-000001"
    write_checkpoint(folder, {"projector": module.state_dict(), "transformer": module.state_dict()}, {}, {})
    assert read_weights(folder, "projector", module).keys() == module.state_dict().keys()
    assert read_trained(folder, module).keys() == module.state_dict().keys()
    refused(lambda: read_weights(folder, "projector", nn.Linear(4, 2)), "projector.safetensors", "weight has the shape [2, 3]")
    refused(lambda: read_weights(folder, "projector", nn.Linear(3, 2, bias=False)), "such as bias are none of this run")


def learner(kind: str, steps: int = 2) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    optimizer = OPTIMIZERS[kind](model.parameters())
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=10)
    for _ in range(steps):
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return optimizer, schedule


def saved(kind: str) -> dict[str, Any]:
    optimizer, schedule = learner(kind)
    return {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_an_optimizer_comes_back(tmp_path: Path, kind: str, steps: int):
    optimizer, schedule = learner(kind, steps)
    tree = {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict()}
    write_checkpoint(tmp_path / "step-000001", {}, {"learner": tree}, {})
    fresh, fresh_schedule = learner(kind, 0)
    found = read_optimizer(tmp_path / "step-000001", "learner", fresh, fresh_schedule)
    fresh.load_state_dict(found["optimizer"])
    fresh_schedule.load_state_dict(found["lr_scheduler"])
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(fresh.state_dict()["state"][index][key], value) for key, value in state.items())
    assert fresh_schedule.state_dict() == schedule.state_dict()


@pytest.mark.parametrize(
    ("kind", "place", "value", "word"),
    [
        ("adamw", "optimizer", ..., "does not hold an optimizer and an lr_scheduler"),
        ("adamw", "lr_scheduler", [], "does not hold an optimizer and an lr_scheduler"),
        ("adamw", "optimizer.param_groups", ..., "optimizer: it has no param_groups, or no state"),
        ("adamw", "optimizer.param_groups", [], "optimizer.param_groups: 0 groups, and this run has 1"),
        ("adamw", "optimizer.param_groups.0", 7, "optimizer.param_groups.0: it has no lr"),
        ("adamw", "optimizer.param_groups.0.lr", ..., "optimizer.param_groups.0: it has no lr"),
        ("adamw", "optimizer.param_groups.0.params", [0, 1], "it is not over the 4 parameters of this run"),
        ("adamw", "optimizer.param_groups.0.eps", "small", "optimizer.param_groups.0.eps: 'small' is not a number"),
        ("adamw", "optimizer.state.9", {}, "optimizer.state.9: it is the state of none of the 4 parameters"),
        ("adamw", "optimizer.state.1", 5, "optimizer.state.1: "),
        ("adamw", "optimizer.state.0.exp_avg", ..., "optimizer.state.0: it has no exp_avg"),
        ("adamw", "optimizer.state.0.exp_avg", torch.ones(5, 7), "exp_avg has the shape [5, 7], and this run's [7, 5]"),
        ("adafactor", "optimizer.state.0.row_var", torch.ones(1, 5), "row_var has the shape [1, 5], and this run's [7, 1]"),
        ("adafactor", "optimizer.state.1.variance", ..., "optimizer.state.1: it has no variance"),
        ("adamw", "lr_scheduler.last_epoch", "2", "lr_scheduler.last_epoch: '2' is not a number of steps"),
        ("adamw", "lr_scheduler.base_lrs", [], "lr_scheduler.base_lrs: [] is not 1 learning rates"),
        ("adamw", "lr_scheduler.lr_lambdas", ..., "lr_scheduler.lr_lambdas: None, and this run has [None]"),
    ],
)
def test_an_optimizer_of_something_else_is_refused(tmp_path: Path, kind: str, place: str, value: Any, word: str):
    write_checkpoint(tmp_path / "step-000001", {}, {"learner": changed(saved(kind), place, value)}, {})
    refused(lambda: read_optimizer(tmp_path / "step-000001", "learner", *learner(kind, 0)), "step-000001/learner.json", word)


def test_a_tree_whose_tensors_are_those_of_another_is_refused(tmp_path: Path):
    folder = tmp_path / "step-000001"
    write_checkpoint(folder, {}, {"learner": saved("adamw")}, {})
    write_checkpoint(tmp_path / "other", {}, {"learner": {}}, {})
    (tmp_path / "other" / "learner.safetensors").replace(folder / "learner.safetensors")
    refused(lambda: read_tree(folder, "learner"), "learner.json", "is not in learner.safetensors")
    (folder / "learner.json").write_text('{"state": {"__pairs__": [[1, 2, 3]]}}', encoding="utf-8")
    refused(lambda: read_tree(folder, "learner"), "learner.json", "__pairs__ holds something else than pairs")


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), TypeError("a bug"), KeyError("a bug")])
def test_what_comes_up_while_a_checkpoint_is_loaded_comes_out_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    module, folder = nn.Linear(3, 2), tmp_path / "step-000001"
    write_checkpoint(folder, {"transformer": module.state_dict()}, {}, {})

    def fail(_self: nn.Module, _state: Any) -> None:
        raise error

    monkeypatch.setattr(nn.Linear, "load_state_dict", fail)
    with pytest.raises(type(error)) as found:
        load_trained_state(module, read_trained(folder, module))
    assert found.value is error
