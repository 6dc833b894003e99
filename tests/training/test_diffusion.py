import math

import pytest
import torch

from crepatrain.training.diffusion import FlowMatching

PROCESSES = {
    "logit_normal": FlowMatching("logit_normal"),
    "logit_normal, moved": FlowMatching("logit_normal", logit_mean=1.0, logit_std=0.5),
    "uniform": FlowMatching("uniform"),
    "shifted": FlowMatching("shifted", shift=3.0),
}


def draws(process, count=4000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([process.draw_sigma(generator) for _ in range(count)])


def share_below(name, sigma):
    """The cumulative distribution that each sampling promises."""
    if name.startswith("logit_normal"):
        mean, std = (1.0, 0.5) if "moved" in name else (0.0, 1.0)
        return 0.5 * (1 + math.erf((math.log(sigma / (1 - sigma)) - mean) / (std * math.sqrt(2))))
    if name == "uniform":
        return sigma
    return sigma / (3.0 - 2.0 * sigma)  # s' = 3 s / (1 + 2 s), solved for s


@pytest.mark.parametrize("name", PROCESSES)
def test_draws_follow_their_distribution(name):
    sigmas = draws(PROCESSES[name])
    assert sigmas.shape == (4000,)
    assert sigmas.dtype == torch.float32
    for level in (0.05, 0.2, 0.5, 0.8, 0.95):
        assert (sigmas < level).float().mean().item() == pytest.approx(share_below(name, level), abs=0.03)


@pytest.mark.parametrize(
    "process",
    [
        *PROCESSES.values(),
        FlowMatching("shifted", shift=100.0),
        FlowMatching("shifted", shift=0.01),
        FlowMatching("logit_normal", logit_mean=10.0, logit_std=10.0),
        FlowMatching("logit_normal", logit_mean=-10.0, logit_std=10.0),
    ],
    ids=repr,
)
def test_draws_lie_between_clean_and_noise(process):
    """The extremes are what config/sections.py lets through."""
    sigmas = draws(process, 1000)
    assert sigmas.min() > 0
    assert sigmas.max() < 1


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_a_draw_belongs_to_its_generator(process):
    torch.manual_seed(1)
    first = draws(process, 5, seed=7)
    torch.manual_seed(2)
    assert torch.equal(first, draws(process, 5, seed=7))
    assert not torch.equal(first, draws(process, 5, seed=8))
    assert len(set(first.tolist())) == 5


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0])
def test_shift_is_the_formula(shift):
    uniform, shifted = draws(FlowMatching("uniform"), 50), draws(FlowMatching("shifted", shift=shift), 50)
    for s, moved in zip(uniform.tolist(), shifted.tolist(), strict=True):
        assert moved == pytest.approx(shift * s / (1 + (shift - 1) * s), rel=1e-5)


def test_noise_and_target():
    latents, noise = torch.randn(2, 3, 4, 2, 3, 5)
    noisy = FlowMatching("uniform").add_noise(latents, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(noisy[0], latents[0])
    torch.testing.assert_close(noisy[1], 0.75 * latents[1] + 0.25 * noise[1])
    assert torch.equal(noisy[2], noise[2])
    assert torch.equal(FlowMatching("uniform").target(latents, noise), noise - latents)


def test_loss_is_the_mean_square_of_each_sample():
    prediction, latents, noise = torch.randn(3, 2, 4, 3, 2, 2)
    loss = FlowMatching("uniform").loss(prediction, latents, noise, None)
    assert loss.tolist() == pytest.approx([((prediction - noise + latents)[b] ** 2).mean().item() for b in range(2)], rel=1e-5)


def test_loss_is_fp32_for_a_bf16_prediction():
    prediction, latents, noise = torch.randn(3, 2, 4, 3, 2, 2)
    process = FlowMatching("uniform")
    loss = process.loss(prediction.bfloat16(), latents, noise, None)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, process.loss(prediction.bfloat16().float(), latents, noise, None))


def test_a_masked_loss_is_normalised_over_what_each_sample_keeps():
    prediction, latents, noise = torch.randn(3, 2, 4, 3, 2, 5)
    mask = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]).view(2, 1, 3, 1, 1)
    error = (prediction - (noise - latents)) ** 2
    loss = FlowMatching("uniform").loss(prediction, latents, noise, mask)
    assert loss.tolist() == pytest.approx([error[0, :, 1:].mean().item(), error[1, :, 2:].mean().item()], rel=1e-5)


def test_a_mask_that_keeps_all_changes_nothing():
    prediction, latents, noise = torch.randn(3, 2, 4, 3, 2, 5)
    process = FlowMatching("uniform")
    everything = process.loss(prediction, latents, noise, torch.ones(2, 1, 3, 1, 1))
    torch.testing.assert_close(everything, process.loss(prediction, latents, noise, None))
