"""What is logged of a step beside its losses: by noise level, and where the time went."""

import time

import pytest
import torch

from crepatrain.training.clock import StepClock
from crepatrain.training.metrics import SIGMA_RANGES, HostCopy, StepNumbers, StepSums, Window
from crepatrain.training.step import StepLosses


def losses_of(*diffusion: float) -> StepLosses:
    values = torch.tensor(diffusion)
    return StepLosses(values.mean(), values, None, None)


def numbers_of(sums: StepSums) -> StepNumbers:
    return StepNumbers.of(HostCopy(sums.names, sums.packed()).read(), crepa=False, layersync=False)


def test_losses_by_noise_level_are_those_of_a_literal_loop():
    generator = torch.Generator().manual_seed(0)
    micros = [(torch.rand(3, generator=generator), torch.rand(3, generator=generator)) for _ in range(4)]
    sums = StepSums()
    for diffusion, sigma in micros:
        sums.add(StepLosses(diffusion.mean(), diffusion, None, None), sigma)
    numbers = numbers_of(sums)
    expected: dict[str, list[float]] = {name: [] for name in SIGMA_RANGES}
    for diffusion, sigma in micros:
        for loss, level in zip(diffusion.tolist(), sigma.tolist(), strict=True):
            name = next(one for one in SIGMA_RANGES if float(one[:3]) <= level < float(one[4:]))
            expected[name].append(loss)
    for name, (total, count) in numbers.by_sigma.items():
        assert count * len(micros) == pytest.approx(len(expected[name]))
        if expected[name]:
            assert total / count == pytest.approx(sum(expected[name]) / len(expected[name]))
    assert numbers.diffusion_loss == pytest.approx(torch.stack([diffusion for diffusion, _ in micros]).mean().item())


@pytest.mark.parametrize(
    ("sigma", "place"), [(1e-6, 0), (0.1999, 0), (0.2001, 1), (0.5, 2), (0.7999, 3), (0.8001, 4), (1 - 1e-7, 4), (1.0, 4)]
)
def test_every_noise_level_has_its_range(sigma: float, place: int):
    sums = StepSums()
    sums.add(losses_of(3.0), torch.tensor([sigma]))
    by_sigma = numbers_of(sums).by_sigma
    assert [count for _, count in by_sigma.values()] == [float(index == place) for index in range(5)]
    assert by_sigma[SIGMA_RANGES[place]][0] == 3.0


def test_a_window_weighs_samples_alike():
    window = Window()
    window.add_mean("sigma_loss", 6.0, 3)
    window.add_mean("sigma_loss", 2.0, 1)
    window.add_mean("nothing", 0.0, 0)
    kept = Window()
    kept.load_state_dict(window.state_dict())
    assert kept.take() == window.take() == {"sigma_loss": 2.0}
    assert window.take() == {}


def test_parts_are_summed_and_may_lie_in_each_other():
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock.part("forward"):
            time.sleep(0.01)
            with clock.part("crepa"):
                time.sleep(0.01)
    with clock.waiting("data"):
        pass
    seconds = clock.seconds()
    assert set(seconds) == {"forward", "crepa", "data"}
    assert 0.02 <= seconds["crepa"] < seconds["forward"] - 0.01
    assert seconds["data"] < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_part_is_what_the_device_does_and_nobody_waits():
    clock = StepClock(torch.device("cuda"))
    values = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    with clock.part("forward"):
        for _ in range(50):
            values = torch.tanh(values @ values)
    queued = time.perf_counter() - began
    seconds = clock.seconds()["forward"]
    assert queued < seconds / 2
