import pytest
import torch
from diffusers import WanTransformer3DModel

from crepatrain.alignment.capture import capture_blocks
from crepatrain.specs import WAN
from crepatrain.training.lora import add_lora, target_modules, trainable_parameters

KEPT = (1, 2)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 16, 3, 8, 12, generator=generator),
        "timestep": torch.tensor([300.0, 800.0]),
        "encoder_hidden_states": torch.randn(2, 9, 32, generator=generator),
        "return_dict": False,
    }


def build(wan, *, checkpointing=False):
    """The tiny transformer with an adapter that already does something."""
    transformer = WanTransformer3DModel.from_pretrained(wan / "transformer")
    torch.manual_seed(1)
    add_lora(transformer, target_modules(transformer, WAN.lora_targets, WAN), rank=2, alpha=4, dropout=0.0)
    for parameter in trainable_parameters(transformer):
        parameter.data.normal_(std=0.2)
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def run(transformer, inputs):
    """Gradients of a loss that is half the output's and half the captured states'."""
    with capture_blocks(transformer.blocks, KEPT) as captured:
        output = transformer(**inputs)[0]
    shapes = {index: state.shape for index, state in captured.items()}
    carries = all(state.grad_fn is not None for state in captured.values())
    loss = output.square().mean() + sum(state.square().mean() for state in captured.values())
    loss.backward()
    named = {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad and p.grad is not None}
    return shapes, carries, output.detach(), named


def test_gradients_do_not_depend_on_checkpointing(wan, inputs):
    shapes, carries, output, plain = run(build(wan), inputs)
    shapes_too, carries_too, output_too, again = run(build(wan, checkpointing=True), inputs)
    assert shapes == shapes_too == dict.fromkeys(KEPT, (2, 3 * 4 * 6, 48))
    assert carries
    assert carries_too
    assert torch.equal(output, output_too)
    assert plain.keys() == again.keys()
    assert len(plain) == 2 * 8 * 10  # A and B of eight projections in each of ten blocks
    assert max((plain[name] - again[name]).abs().max() for name in plain) == 0
    assert min(gradient.abs().max() for gradient in plain.values()) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_captured_state_alone_moves_the_blocks_before_it(wan, inputs, checkpointing):
    transformer = build(wan, checkpointing=checkpointing)
    with capture_blocks(transformer.blocks, [1]) as captured:
        transformer(**inputs)
    captured[1].square().mean().backward()
    moved = {name.split(".")[1] for name, p in transformer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"0", "1"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_output_is_unaffected_and_the_hooks_are_gone(wan, inputs, checkpointing):
    transformer = build(wan, checkpointing=checkpointing)
    before = transformer(**inputs)[0]
    with capture_blocks(transformer.blocks, KEPT) as captured:
        assert [index for index, block in enumerate(transformer.blocks) if block._forward_hooks] == list(KEPT)
        during = transformer(**inputs)[0]
    assert not any(block._forward_hooks for block in transformer.blocks)
    assert torch.equal(before, during)
    assert torch.equal(before, transformer(**inputs)[0])
    kept = dict(captured)
    during.square().mean().backward()
    assert captured == kept


def test_the_hooks_are_gone_after_an_error(wan):
    transformer = build(wan)
    with pytest.raises(ZeroDivisionError), capture_blocks(transformer.blocks, KEPT):
        raise ZeroDivisionError
    assert not any(block._forward_hooks for block in transformer.blocks)


def test_the_first_output_is_kept(wan, inputs):
    transformer = build(wan)
    with capture_blocks(transformer.blocks, [3]) as captured:
        transformer(**inputs)
        first = captured[3]
        transformer(**inputs | {"timestep": torch.tensor([100.0, 100.0])})
        assert captured[3] is first


def test_a_block_wanted_twice_is_hooked_once(wan):
    transformer = build(wan)
    with capture_blocks(transformer.blocks, [3, 3, 1]):
        assert [len(block._forward_hooks) for block in transformer.blocks[:4]] == [0, 1, 0, 1]


def test_nothing_wanted_hooks_nothing(wan, inputs):
    transformer = build(wan)
    with capture_blocks(transformer.blocks, []) as captured:
        assert not any(block._forward_hooks for block in transformer.blocks)
        transformer(**inputs)
    assert captured == {}
