import math
from dataclasses import replace

import pytest
import torch

from crepatrain.config.plan import read_plan
from crepatrain.training.build import build_process
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


def literal(process, generator):
    """A draw over all noise levels, as it was before there were experts."""
    smallest = torch.finfo(torch.float32).eps
    if process.sampling == "logit_normal":
        sigma = torch.sigmoid(process.logit_mean + process.logit_std * torch.randn((), generator=generator))
    else:
        sigma = torch.rand((), generator=generator)
        if process.sampling == "shifted":
            sigma = process.shift * sigma / (1 + (process.shift - 1) * sigma)
    return sigma.clamp(smallest, 1 - smallest)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_draws_over_all_noise_levels_are_what_they_were(process):
    """To the bit, and what the generator gives after them too."""
    ours, theirs = torch.Generator().manual_seed(11), torch.Generator().manual_seed(11)
    for _ in range(300):
        assert torch.equal(process.draw_sigma(ours), literal(process, theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())


RANGES = [(0.0, 0.875), (0.875, 1.0), (0.0, 0.9), (0.9, 1.0), (0.3, 0.6)]


@pytest.mark.parametrize("between", RANGES, ids=str)
@pytest.mark.parametrize(
    "process",
    [
        *PROCESSES.values(),
        FlowMatching("shifted", shift=100.0),
        FlowMatching("shifted", shift=0.01),
        FlowMatching("logit_normal", logit_mean=10.0, logit_std=10.0),
        FlowMatching("logit_normal", logit_mean=-10.0, logit_std=10.0),
        FlowMatching("logit_normal", logit_mean=10.0, logit_std=0.1),
        FlowMatching("logit_normal", logit_mean=-10.0, logit_std=0.1),
    ],
    ids=repr,
)
def test_an_experts_draws_lie_inside_its_noise_levels(process, between):
    low, high = map(torch.tensor, between)
    sigmas = draws(replace(process, between=between), 500)
    assert sigmas.dtype == torch.float32
    assert sigmas.min() >= low
    assert sigmas.min() > 0
    assert sigmas.max() < high, "a pipeline asks the other expert there"


@pytest.mark.parametrize("between", RANGES, ids=str)
@pytest.mark.parametrize("name", PROCESSES)
def test_an_experts_distribution_is_the_whole_one_of_its_noise_levels(name, between):
    """Against rejection: what of the uncut distribution lies inside, quantile by quantile."""
    process, generator = PROCESSES[name], torch.Generator().manual_seed(1)
    if process.sampling == "logit_normal":
        uncut = torch.sigmoid(process.logit_mean + process.logit_std * torch.randn(400_000, generator=generator))
    else:
        uncut = torch.rand(400_000, generator=generator)
        if process.sampling == "shifted":
            uncut = process.shift * uncut / (1 + (process.shift - 1) * uncut)
    inside = uncut[(uncut >= between[0]) & (uncut < between[1])]
    assert len(inside) > 1000
    sigmas = draws(replace(process, between=between), 2500)
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert (sigmas < inside.quantile(share)).float().mean().item() == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize(
    ("mean", "std", "between"),
    [
        (0.0, 0.5, (0.875, 1.0)),
        (0.0, 0.3, (0.875, 1.0)),
        (-3.0, 1.0, (0.9, 1.0)),
        (0.0, 0.3, (0.0, 0.125)),
        (3.0, 1.0, (0.0, 0.1)),
    ],
)
def test_an_expert_in_the_tail_of_the_distribution_has_draws_of_its_own(mean, std, between):
    """Where the whole distribution hardly ever draws, an expert's is still the whole one, conditioned on its range."""

    def beyond(sigma):
        """The share of the distribution in its tail from sigma on, away from its middle."""
        z = abs(math.log(sigma / (1 - sigma)) - mean) / std
        return 0.5 * math.erfc(z / math.sqrt(2))

    upper = between[1] == 1
    edge = between[0] if upper else between[1]
    sigmas = draws(FlowMatching("logit_normal", mean, std, between=between), 1000).double()
    assert len(set(sigmas.tolist())) > 500
    for share in (0.25, 0.5, 0.75):
        inner, outer = (edge, 1 - 1e-9) if upper else (1e-9, edge)
        for _ in range(60):  # bisect for the level beyond which that share of the tail lies
            middle = (inner + outer) / 2
            if (beyond(middle) > share * beyond(edge)) == upper:
                inner = middle
            else:
                outer = middle
        above = (sigmas > middle).double().mean().item()
        assert above == pytest.approx(share if upper else 1 - share, abs=0.06)


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


def test_a_checkpoints_own_shift_is_that_of_each_size(tiny_checkpoint, config_file):
    """LTX's scheduler shifts long clips further; a shift that the user has set is the same for all."""
    folder = str(tiny_checkpoint("ltxvideo", "tiny"))
    values = {"model_family": "ltxvideo", "pretrained_model_name_or_path": folder, "crepa_encoder": f"{folder}/encoder"}
    values |= {"height": 64, "width": 96, "num_frames": 9, "timestep_sampling": "shifted"}
    plan = read_plan(config_file(**values))
    own = plan.checkpoint.flow_shift
    assert own(plan.grid.tokens) != own(4 * plan.grid.tokens)
    for tokens in (plan.grid.tokens, 4 * plan.grid.tokens):
        assert build_process(plan, tokens).shift == own(tokens)
    assert build_process(plan) == build_process(plan, plan.grid.tokens)
    again = read_plan(config_file(**values, flow_shift=plan.config.diffusion.flow_shift))
    assert build_process(again, 4 * plan.grid.tokens).shift == own(4 * plan.grid.tokens), "as a run's config.json has it"
    assert build_process(read_plan(config_file(**values, flow_shift=3.0)), 4 * plan.grid.tokens).shift == 3.0
