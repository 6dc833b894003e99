"""The table of state sizes against the optimizers themselves."""

import pytest
import torch
from torch import nn

from crepatrain.config.sections import OptimConfig
from crepatrain.placement.states import empty_states, states_of
from crepatrain.training.optim import build_optimizer

SHAPES = [(64, 128), (128,), (96, 3, 2, 2)]


def held_by(optimizer: str) -> tuple[list[torch.Tensor], list[nn.Parameter]]:
    """What an optimizer itself holds after a step."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    built = build_optimizer(OptimConfig(optimizer=optimizer), parameters, 1e-3)  # type: ignore[arg-type]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    built.step()
    held = {
        name: [state[name] for state in built.state.values() if isinstance(state.get(name), torch.Tensor)]
        for name in {name for state in built.state.values() for name in state}
    }
    if optimizer == "adafactor":
        del held["step"]  # which torch keeps on the host
    shared = ("qmap1", "qmap2")  # one of 256 numbers for all parameters
    return [tensor for name, tensors in held.items() if name not in shared for tensor in tensors], parameters


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy"])
def test_the_table_has_what_the_optimizer_makes(optimizer: str):
    if optimizer == "prodigy":
        pytest.importorskip("prodigyopt")
    held, parameters = held_by(optimizer)
    known = empty_states(optimizer, parameters)
    assert sorted((tensor.numel(), str(tensor.dtype)) for tensor in known) == sorted(
        (tensor.numel(), str(tensor.dtype)) for tensor in held
    )


def test_an_8bit_adamw_holds_about_two_bytes_for_each_number():
    parameters = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    known = empty_states("adamw8bit", parameters)
    numbers = sum(parameter.numel() for parameter in parameters)
    assert 2 * numbers <= sum(tensor.nbytes for tensor in known) <= 2.1 * numbers
    assert {tensor.device.type for tensor in known} == {"meta"}
    pytest.importorskip("bitsandbytes")
    large = [nn.Parameter(torch.randn(64, 128))]  # it keeps those of less than 4096 numbers in fp32
    built = build_optimizer(OptimConfig(optimizer="adamw8bit"), large, 1e-3)
    large[0].grad = torch.randn_like(large[0])
    built.step()
    held = [value for value in built.state[large[0]].values() if isinstance(value, torch.Tensor)]
    expected = sum(tensor.nbytes for tensor in empty_states("adamw8bit", large))
    assert sum(tensor.nbytes for tensor in held if tensor.dtype == torch.uint8) == 2 * 64 * 128
    assert expected - 2 * 64 * 128 == pytest.approx(2 * 4 * (64 * 128 // 256), rel=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_table_has_the_names_and_shapes_of_torch(optimizer: str, shape: tuple[int, ...]):
    parameter = nn.Parameter(torch.randn(shape))
    built = build_optimizer(OptimConfig(optimizer=optimizer), [parameter], 1e-3)  # type: ignore[arg-type]
    parameter.grad = torch.randn_like(parameter)
    built.step()
    held = {name: tuple(tensor.shape) for name, tensor in built.state[parameter].items()}
    assert {name: tuple(state.shape) for name, state in states_of(optimizer, parameter).items()} == held
