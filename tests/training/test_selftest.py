"""The trial of one block before a run: what does not learn is refused by its setting's name."""

import pytest
import stand_in_kernels as attention
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from crepatrain.config.plan import read_plan
from crepatrain.errors import UserError
from crepatrain.specs import FAMILIES
from crepatrain.training import build, selftest
from crepatrain.training.selftest import expect_gradients

CPU = torch.device("cpu")
KERNELS = ("flash", "_flash_3")


@pytest.fixture(autouse=True)
def _kernels_as_they_were(monkeypatch):
    for kept in ("_backends", "_constraints", "_supported_arg_names"):
        monkeypatch.setattr(_AttentionBackendRegistry, kept, dict(getattr(_AttentionBackendRegistry, kept)))


@pytest.fixture
def make_plan(tiny_checkpoint, config_file):
    def make(name="wan", size="tiny", **changes):
        folder = str(tiny_checkpoint(name, size))
        sizes = {"height": 128, "width": 192, "num_frames": 17} if name == "ltxvideo" else {}
        return read_plan(
            config_file(
                model_family=name,
                pretrained_model_name_or_path=folder,
                crepa_enabled=False,
                **{"mixed_precision": "bf16", **sizes, **changes},
            )
        )

    return make


def trial(plan):
    expect_gradients(plan, build.build_family(plan), CPU)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("name", "size", "task", "each"),
    [
        ("wan", "tiny", "t2v", 2),  # self-attention and cross-attention
        ("wan", "tiny-i2v", "i2v", 3),  # cross-attention to the image too
        ("ltxvideo", "tiny", "t2v", 1),  # the other one has a mask
        ("ltxvideo", "tiny-0.9.5", "i2v", 1),
        ("kandinsky5_video", "tiny", "t2v", 2),
    ],
)
def test_a_kernel_gets_q_k_v_in_one_data_type_and_no_mask(make_plan, monkeypatch, kernel, name, size, task, each):
    calls = attention.install(monkeypatch, kernel)
    plan = make_plan(name, size, task=task, attention_backend=kernel)
    with attention.norms_in_fp32(monkeypatch):
        trial(plan)
    assert len(calls) == each
    assert {dtype for dtype, _ in calls} == {torch.bfloat16}


def test_the_stand_in_is_as_strict_as_flash_attention(make_plan, monkeypatch):
    """Without the package's own cast, Wan's q and k would be refused."""
    attention.install(monkeypatch, "flash")
    plan = make_plan(attention_backend="flash")
    monkeypatch.setattr("crepatrain.families.attention._in_one_dtype", lambda kernel: kernel)
    with (
        attention.norms_in_fp32(monkeypatch),
        pytest.raises(UserError, match=r"one block fails \(RuntimeError: FlashAttention only"),
    ):
        trial(plan)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            attention.without_backward,
            r"no gradient reaches .*attn1\.to_q, attn1\.to_k, attn1\.to_v.*; it would train, and not learn",
        ),
        (attention.wrong_backward, r"gradients of .*attn1\.to_k.* are not those without it; .* is off by \d+%"),
        (attention.refusing_backward, r"a trial of one block fails \(NotImplementedError: this head dimension has no backward\)"),
        (lambda q, k, v: attention.exact(q, k, v) * float("nan"), r"is off by nan%"),
    ],
)
def test_a_kernel_that_does_not_train_is_refused(make_plan, monkeypatch, kernel, wrong, words):
    attention.install(monkeypatch, kernel, wrong)
    with pytest.raises(UserError, match=f"(?s)attention_backend={kernel}: .*{words}.*use native"):
        trial(make_plan(attention_backend=kernel))


def test_a_kernel_that_this_machine_lacks_is_refused(make_plan):
    with pytest.raises(UserError, match="attention_backend=_native_efficient: a trial of one block fails"):
        trial(make_plan(attention_backend="_native_efficient"))


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"sanavideo"}))
def test_torchs_own_kernels_pass(make_plan, name, precision):
    trial(make_plan(name, attention_backend="_native_math", mixed_precision=precision))


def test_all_weights_in_training_pass(make_plan):
    trial(make_plan(model_type="full", lora_rank=..., attention_backend="_native_math"))


def test_what_compiling_breaks_is_named_by_its_setting(make_plan, monkeypatch):
    def compiled(block):
        block._compiled_call_impl = lambda hidden, *rest, **named: block._call_impl(hidden.detach(), *rest, **named)

    monkeypatch.setattr(nn.Module, "compile", compiled)
    with pytest.raises(UserError, match=r"(?s)compile=true: .* no gradient reaches its input 0; .*set compile to false"):
        trial(make_plan(compile=True))


def test_a_block_that_can_not_be_compiled_is_named_by_its_setting(make_plan, monkeypatch):
    def failing(block):
        block._compiled_call_impl = lambda *_, **__: 1 / 0

    monkeypatch.setattr(nn.Module, "compile", failing)
    with pytest.raises(UserError, match="compile=true: a trial of one block fails"):
        trial(make_plan("sanavideo", compile=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_blocks_pass(make_plan, monkeypatch, name):
    compiling = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block: compiling(block, backend="aot_eager"))
    trial(make_plan(name, compile=True, attention_backend=None if name == "sanavideo" else "_native_math"))


@pytest.mark.parametrize("backend", [None, "native"])
def test_nothing_is_tried_where_nothing_special_is_on(make_plan, monkeypatch, backend):
    monkeypatch.setattr(selftest, "_shallow", None)
    trial(make_plan(attention_backend=backend))


def test_a_trial_leaves_the_random_numbers_and_the_process_as_they_were(make_plan, monkeypatch):
    attention.install(monkeypatch, "flash")
    before, active = torch.get_rng_state(), _AttentionBackendRegistry._active_backend
    trial(make_plan(attention_backend="flash"))
    assert torch.equal(before, torch.get_rng_state())
    assert _AttentionBackendRegistry._active_backend is active is AttentionBackendName.NATIVE
