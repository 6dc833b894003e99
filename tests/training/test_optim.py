"""Optimizers, learning-rate schedules and clipping."""

import itertools
import math
from typing import Any, get_args

import pytest
import torch
from torch import nn

from crepatrain.config.sections import OptimConfig
from crepatrain.training.adafactor import Adafactor
from crepatrain.training.optim import build_lr_scheduler, build_optimizer, clip_gradients

SCHEDULES = get_args(OptimConfig.model_fields["lr_scheduler"].annotation)


def parameters(count: int = 2) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4)) for _ in range(count)]


def rates(steps: int, **values: Any) -> list[float]:
    config = OptimConfig(learning_rate=1e-2, **values)
    optimizer = build_optimizer(config, parameters(), config.learning_rate)
    schedule = build_lr_scheduler(config, optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_builds_and_stays_in_range(name: str):
    found = rates(20, lr_scheduler=name, lr_warmup_steps=4)
    assert all(0 <= rate <= 1e-2 for rate in found)
    assert max(found) == pytest.approx(1e-2)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "constant"])
def test_the_warm_up_rises_from_zero(name: str):
    found = rates(20, lr_scheduler=name, lr_warmup_steps=4)
    assert found[:5] == pytest.approx([0, 0.25e-2, 0.5e-2, 0.75e-2, 1e-2])


def test_the_shapes_of_the_schedules():
    assert rates(10, lr_scheduler="constant") == [1e-2] * 10
    assert rates(10, lr_scheduler="constant_with_warmup") == [1e-2] * 10
    assert rates(10, lr_scheduler="linear") == pytest.approx([1e-2 * (1 - step / 10) for step in range(10)])
    cosine = [1e-2 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    assert rates(10, lr_scheduler="cosine") == pytest.approx(cosine)
    polynomial = rates(10, lr_scheduler="polynomial")
    assert all(later < earlier for earlier, later in itertools.pairwise(polynomial))


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adafactor", Adafactor)])
def test_optimizers_build_and_move_the_weights(name: str, kind: type[torch.optim.Optimizer]):
    trained = parameters()
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = build_optimizer(OptimConfig(optimizer=name), trained, 1e-2)
    assert type(optimizer) is kind
    sum(parameter.square().sum() for parameter in trained).backward()
    optimizer.step()
    assert all(not torch.equal(parameter, old) for parameter, old in zip(trained, before, strict=True))
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_adamw_takes_every_number_of_the_config():
    config = OptimConfig(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, adam_weight_decay=0.2)
    group = build_optimizer(config, parameters(), 3e-4).param_groups[0]
    assert group["betas"] == (0.8, 0.95)
    assert (group["eps"], group["weight_decay"], group["lr"]) == (1e-6, 0.2, 3e-4)


def with_gradients(*norms: float | None) -> list[nn.Parameter]:
    found = parameters(len(norms))
    for parameter, norm in zip(found, norms, strict=True):
        if norm is not None:
            parameter.grad = torch.full((3, 4), norm / math.sqrt(12))
    return found


def norm_of(trained: list[nn.Parameter]) -> float:
    return math.sqrt(sum(parameter.grad.square().sum().item() for parameter in trained if parameter.grad is not None))


def test_gradients_are_clipped_and_the_norm_from_before_is_reported():
    trained = with_gradients(3.0, 4.0)
    assert clip_gradients(trained, 1.0).item() == pytest.approx(5)
    assert norm_of(trained) == pytest.approx(1, rel=1e-4)


def test_small_gradients_are_left_alone():
    trained = with_gradients(0.3, 0.4)
    assert clip_gradients(trained, 1.0).item() == pytest.approx(0.5)
    assert norm_of(trained) == pytest.approx(0.5)


def test_zero_measures_and_never_clips():
    trained = with_gradients(3.0, 4.0)
    assert clip_gradients(trained, 0).item() == pytest.approx(5)
    assert norm_of(trained) == pytest.approx(5)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_missing_gradients_are_fine(max_norm: float):
    assert clip_gradients(with_gradients(None, 4.0), max_norm).item() == pytest.approx(4)
    assert clip_gradients(with_gradients(None, None), max_norm).item() == 0


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(max_norm: float, bad: float):
    trained = with_gradients(3.0, 4.0)
    assert trained[0].grad is not None
    trained[0].grad[1, 2] = bad
    assert not math.isfinite(clip_gradients(trained, max_norm).item())


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_the_norm_is_on_the_device_of_the_weights(max_norm: float):
    """Without gradients too: the norms of both optimizers are stacked."""
    weights = [nn.Parameter(torch.empty(3, 4, device="meta"))]
    assert clip_gradients(weights, max_norm).device.type == "meta"


def of_all_shapes() -> list[nn.Parameter]:
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(shape)) for shape in ((8, 16), (5,), (2, 3, 4), (1, 7), ())]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_follows_torchs_own(decay: float):
    ours, theirs = of_all_shapes(), of_all_shapes()
    optimizers = [Adafactor(ours, lr=0.01, weight_decay=decay), torch.optim.Adafactor(theirs, lr=0.01, weight_decay=decay)]
    optimizers[0].found_inf = torch.zeros(())  # type: ignore[attr-defined]
    for step in range(30):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one) * 10.0 ** (step % 3 - 1)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        states = [optimizer.state[p] for optimizer, p in zip(optimizers, (one, other), strict=True)]
        assert states[0].keys() == states[1].keys()
        for name, state in states[0].items():
            torch.testing.assert_close(state, states[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "reads"), [(Adafactor, False), (torch.optim.Adafactor, True)])
def test_adafactor_reads_nothing_of_the_device(kind: type[torch.optim.Optimizer], reads: bool):
    """What is on the meta device can't be read."""
    trained = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((8, 16), (5,))]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer = kind(trained, lr=0.01)  # type: ignore[call-arg]
    if reads:
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            optimizer.step()
    else:
        optimizer.found_inf = torch.zeros((), device="meta")  # type: ignore[attr-defined]
        optimizer.step()


def test_adafactor_leaves_weights_and_states_alone_where_a_number_is_not_finite():
    trained = of_all_shapes()
    optimizer = Adafactor(trained, lr=0.01, weight_decay=0.1)
    for bad in (0.0, 1.0):
        for parameter in trained:
            parameter.grad = torch.full_like(parameter, math.nan if bad else 1.0)
        before = [parameter.detach().clone() for parameter in trained]
        states = [{name: tensor.clone() for name, tensor in optimizer.state[parameter].items()} for parameter in trained]
        optimizer.found_inf = torch.tensor(bad)  # type: ignore[attr-defined]
        optimizer.step()
        same = [torch.equal(parameter, old) for parameter, old in zip(trained, before, strict=True)]
        assert all(same) if bad else not any(same)
    for parameter, old in zip(trained, states, strict=True):
        assert all(torch.equal(optimizer.state[parameter][name], tensor) for name, tensor in old.items() if name != "step")
