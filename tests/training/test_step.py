import pytest
import torch
from common import tiny_family

from crepatrain.alignment.crepa import Crepa
from crepatrain.alignment.teachers import BackboneTeacher, CachedTeacher
from crepatrain.families.wan import WanFamily
from crepatrain.geometry import TokenGrid
from crepatrain.specs import WAN
from crepatrain.tensors import Batch, PatchFeatures
from crepatrain.training.diffusion import FlowMatching
from crepatrain.training.lora import add_lora, target_modules, trainable_parameters
from crepatrain.training.step import CrepaTerm, LayerSyncTerm, training_loss

GRID = TokenGrid(3, 4, 6, ((0, 1), (1, 5), (5, 9)))
PROCESS = FlowMatching("uniform")
BLOCK, DEEPER = 2, 5


class CleanFirstFrame(WanFamily):
    """Wan, with the loss of one more latent frame left out in the second sample."""

    def loss_mask(self, batch):
        return torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]).view(2, 1, 3, 1, 1)


@pytest.fixture
def transformer(wan):
    made = tiny_family().load_transformer(str(wan), torch.float32)
    torch.manual_seed(1)
    add_lora(made, target_modules(made, WAN.lora_targets, WAN), rank=2, alpha=2, dropout=0.0)
    for parameter in trainable_parameters(made):
        parameter.data.normal_(std=0.2)
    return made.train()


@pytest.fixture
def crepa():
    torch.manual_seed(2)
    return Crepa(48, 20)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 16, 3, 8, 12, generator=generator)
    text = {"prompt_embeds": torch.randn(2, 9, 32, generator=generator)}
    teacher = PatchFeatures(torch.randn(2, 3, 30, 20, generator=generator), (5, 6))
    return Batch(latents, noise, torch.tensor([0.3, 0.8]), text, GRID, 16.0, ("a", "b"), teacher=teacher)


def run(transformer, batch, family=None, **terms):
    return training_loss(family or tiny_family(), PROCESS, transformer, transformer.blocks, batch, **terms)


def adapter_gradient(transformer, total):
    gradients = torch.autograd.grad(total, trainable_parameters(transformer), allow_unused=True, retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def states(transformer, batch, wanted):
    """The block outputs of a plain forward, without the package's capture."""
    seen = {}
    handles = [
        transformer.blocks[index].register_forward_hook(lambda _m, _a, output, index=index: seen.update({index: output}))
        for index in wanted
    ]
    noisy = PROCESS.add_noise(batch.latents, batch.noise, batch.sigma)
    prediction = tiny_family().denoise(transformer, noisy, batch.sigma, batch)
    for handle in handles:
        handle.remove()
    return prediction, seen


def test_diffusion_alone(transformer, batch):
    losses = run(transformer, batch)
    prediction, _ = states(transformer, batch, [])
    expected = (prediction - (batch.noise - batch.latents)).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(losses.diffusion, expected.detach())
    torch.testing.assert_close(losses.total, expected.mean())
    assert losses.total.requires_grad
    assert not losses.diffusion.requires_grad
    assert losses.crepa is None
    assert losses.layersync is None


@pytest.mark.parametrize("teacher", [CachedTeacher(), BackboneTeacher(DEEPER)], ids=["cached", "backbone"])
def test_total_is_diffusion_plus_weight_times_crepa(transformer, batch, crepa, teacher):
    if isinstance(teacher, BackboneTeacher):
        crepa = Crepa(48, 48)
    losses = run(transformer, batch, crepa=CrepaTerm(crepa, teacher, BLOCK, 0.3))
    prediction, seen = states(transformer, batch, [BLOCK, DEEPER])
    deeper = PatchFeatures(seen[DEEPER].detach().reshape(2, 3, 24, 48), (4, 6))
    aligned = crepa(seen[BLOCK], deeper if isinstance(teacher, BackboneTeacher) else batch.teacher, GRID)
    diffusion = PROCESS.loss(prediction, batch.latents, batch.noise, None)
    expected = diffusion.mean() + 0.3 * aligned.loss.mean()
    torch.testing.assert_close(losses.total, expected)
    torch.testing.assert_close(losses.crepa.loss, aligned.loss.detach())
    torch.testing.assert_close(losses.crepa.alignment, aligned.alignment)
    torch.testing.assert_close(losses.crepa.self_similarity, aligned.self_similarity)
    assert not losses.crepa.loss.requires_grad
    torch.testing.assert_close(adapter_gradient(transformer, losses.total), adapter_gradient(transformer, expected))
    losses.total.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in crepa.parameters())


def test_crepa_pulls_the_adapter_up_to_its_block_only(transformer, batch, crepa):
    without = run(transformer, batch)
    losses = run(transformer, batch, crepa=CrepaTerm(crepa, CachedTeacher(), BLOCK, 0.3))
    (losses.total - without.total).backward()
    moved = {
        int(name.split(".")[1]) for name, p in transformer.named_parameters() if p.requires_grad and p.grad.abs().max() > 1e-6
    }
    assert moved == set(range(BLOCK + 1))


def test_weight_0_measures_without_a_gradient(transformer, batch, crepa):
    measured = run(transformer, batch, crepa=CrepaTerm(crepa, CachedTeacher(), BLOCK, 0.0))
    weighed = run(transformer, batch, crepa=CrepaTerm(crepa, CachedTeacher(), BLOCK, 0.5))
    alone = run(transformer, batch)
    assert torch.equal(measured.total, alone.total)
    assert torch.equal(measured.crepa.alignment, weighed.crepa.alignment)
    assert not measured.crepa.loss.requires_grad
    measured.total.backward()
    assert all(parameter.grad is None for parameter in crepa.parameters())


@pytest.mark.parametrize(("weight", "graph"), [(0.0, False), (0.5, True)])
def test_weight_0_builds_no_graph_in_the_projector(transformer, batch, crepa, weight, graph):
    outputs = []
    crepa.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    run(transformer, batch, crepa=CrepaTerm(crepa, CachedTeacher(), BLOCK, weight))
    assert [output.loss.requires_grad for output in outputs] == [graph]
    assert torch.is_grad_enabled()


def test_a_term_under_no_grad_makes_no_graph(transformer, batch, crepa):
    with torch.no_grad():
        losses = run(transformer, batch, crepa=CrepaTerm(crepa, CachedTeacher(), BLOCK, 0.5))
    assert not losses.total.requires_grad


@pytest.mark.parametrize(
    ("terms", "hooked"),
    [
        ({}, set()),
        ({"crepa": CachedTeacher()}, {BLOCK}),
        ({"crepa": BackboneTeacher(DEEPER)}, {BLOCK, DEEPER}),
        ({"layersync": LayerSyncTerm(BLOCK, 7, 0.2)}, {BLOCK, 7}),
        ({"crepa": BackboneTeacher(DEEPER), "layersync": LayerSyncTerm(BLOCK, 7, 0.2)}, {BLOCK, DEEPER, 7}),
    ],
    ids=["nothing", "crepa", "backbone", "layersync", "both"],
)
def test_only_wanted_blocks_are_hooked_and_only_in_the_forward(transformer, batch, terms, hooked):
    if "crepa" in terms:
        terms = terms | {
            "crepa": CrepaTerm(Crepa(48, 20 if isinstance(terms["crepa"], CachedTeacher) else 48), terms["crepa"], BLOCK, 0.1)
        }
    found = []
    watch = transformer.register_forward_pre_hook(
        lambda *_: found.append({index for index, block in enumerate(transformer.blocks) if block._forward_hooks})
    )
    run(transformer, batch, **terms)
    watch.remove()
    assert found == [hooked]
    assert not any(block._forward_hooks for block in transformer.blocks)


def test_layersync_adds(transformer, batch, crepa):
    term = CrepaTerm(crepa, CachedTeacher(), BLOCK, 0.3)
    without = run(transformer, batch, crepa=term)
    losses = run(transformer, batch, crepa=term, layersync=LayerSyncTerm(BLOCK, 7, 0.2))
    _, seen = states(transformer, batch, [BLOCK, 7])
    literal = -torch.nn.functional.cosine_similarity(seen[BLOCK], seen[7].detach(), dim=-1).mean(dim=1)
    torch.testing.assert_close(losses.layersync, literal.detach())
    torch.testing.assert_close(losses.total, without.total + 0.2 * literal.mean())
    assert not losses.layersync.requires_grad
    expected = adapter_gradient(transformer, without.total + 0.2 * literal.mean())
    torch.testing.assert_close(adapter_gradient(transformer, losses.total), expected)


def test_layersync_without_crepa(transformer, batch):
    losses = run(transformer, batch, layersync=LayerSyncTerm(BLOCK, 7, 0.2))
    assert losses.crepa is None
    torch.testing.assert_close(losses.total, losses.diffusion.mean() + 0.2 * losses.layersync.mean())


def test_a_mask_is_normalised_per_sample(transformer, batch):
    of = tiny_family()
    losses = run(transformer, batch, family=CleanFirstFrame(of.checkpoint, of.variant, of.task))
    prediction, _ = states(transformer, batch, [])
    error = (prediction - (batch.noise - batch.latents)).square().detach()
    expected = torch.stack([error[0, :, 1:].mean(), error[1, :, 2:].mean()])
    torch.testing.assert_close(losses.diffusion, expected)
    torch.testing.assert_close(losses.total.detach(), expected.mean())


def test_gradient_checkpointing_changes_nothing(transformer, batch, crepa):
    term = CrepaTerm(crepa, CachedTeacher(), BLOCK, 0.5)
    plain = run(transformer, batch, crepa=term)
    plain.total.backward()
    expected = [parameter.grad for parameter in (*trainable_parameters(transformer), *crepa.parameters())]
    transformer.zero_grad(set_to_none=True)
    crepa.zero_grad(set_to_none=True)
    transformer.enable_gradient_checkpointing()
    again = run(transformer, batch, crepa=term)
    again.total.backward()
    found = [parameter.grad for parameter in (*trainable_parameters(transformer), *crepa.parameters())]
    assert torch.equal(plain.total, again.total)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
