"""attention_backend: what can't train, is not installed, or has nothing to compute is refused before anything is loaded."""

import pytest

from crepatrain.config import checks
from crepatrain.config.plan import read_plan
from crepatrain.errors import UserError


@pytest.fixture(autouse=True)
def _every_package_is_there(monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda _package: "here")


def problems(path):
    with pytest.raises(UserError) as caught:
        read_plan(path, online=False)
    return caught.value.problems


@pytest.mark.parametrize(
    ("backend", "reason", "remedy"),
    [
        ("sage", "it has no backward: q, k, v would not learn", "use native"),
        ("sage_hub", "it has no backward: q, k, v would not learn", "use native"),
        ("_sage_qk_int8_pv_fp16_triton", "it has no backward: q, k, v would not learn", "use native"),
        ("flash_hub", "it runs code that it downloads", "install the kernels"),
        ("_flash_3_hub", "it runs code that it downloads", "install the kernels"),
        ("flash_varlen", "it is for masks", "use flash"),
        ("_native_xla", "it is for another kind of processor", "use native"),
        ("flsh", "it is no backend that can train", "did you mean flash?"),
        ("my_kernel", "it is no backend that can train", "use one of native, "),
        ("flex", "it is for models with NABLA attention, and this model has none", "use native"),
    ],
)
def test_what_can_not_train_is_refused_with_its_reason(config_file, backend, reason, remedy):
    [problem] = problems(config_file(attention_backend=backend, mixed_precision="bf16"))
    assert problem.what.startswith(f"attention_backend={backend}: {reason}")
    assert problem.fix.startswith(remedy)
    assert problem.keys == ("attention_backend",)


@pytest.mark.parametrize("backend", ["_native_cudnn", "_native_math", "flash", "xformers"])
def test_a_family_without_an_attention_for_it_is_refused(config_file, tiny_checkpoint, backend):
    of = {"model_family": "sanavideo", "pretrained_model_name_or_path": str(tiny_checkpoint("sanavideo"))}
    [problem] = problems(config_file(attention_backend=backend, mixed_precision="bf16", crepa_block_index=8, **of))
    assert "SANA-Video has no attention that it could compute" in problem.what


@pytest.mark.parametrize("backend", ["_native_cudnn", "_native_flash", "flash", "_flash_3"])
def test_a_kernel_for_bf16_is_refused_in_fp32(config_file, backend):
    [problem] = problems(config_file(attention_backend=backend, mixed_precision="no"))
    assert problem.what == f"attention_backend={backend}: it takes bf16 alone, and mixed_precision is no"
    assert problem.fix == "set mixed_precision to bf16"


@pytest.mark.parametrize(
    ("backend", "package"), [("flash", "flash-attn"), ("_flash_3", "FlashAttention 3"), ("xformers", "xformers")]
)
def test_a_missing_package_is_named(config_file, monkeypatch, backend, package):
    monkeypatch.setattr(checks, "find_spec", lambda _package: None)
    [problem] = problems(config_file(attention_backend=backend, mixed_precision="bf16"))
    assert problem.what.startswith(f"attention_backend={backend}: {package}")
    assert problem.what.endswith("is not installed")


@pytest.mark.parametrize(
    "backend", ["native", "_native_cudnn", "_native_efficient", "_native_math", "flash", "_flash_3", "xformers"]
)
def test_what_can_train_is_taken(config_file, backend):
    plan = read_plan(config_file(attention_backend=backend, mixed_precision="bf16"), online=False)
    assert plan.config.loop.attention_backend == backend


def test_nabla_takes_flex_and_a_kernel_for_its_other_attentions(config_file, tiny_checkpoint):
    folder = str(tiny_checkpoint("kandinsky5_video", "tiny-nabla"))
    size = {"height": 128, "width": 256, "num_frames": 9}
    for backend in ("flex", "flash"):
        of = {"model_family": "kandinsky5_video", "pretrained_model_name_or_path": folder, "compile": True}
        config = config_file(attention_backend=backend, mixed_precision="bf16", crepa_block_index=8, **of, **size)
        assert read_plan(config, online=False).config.loop.attention_backend == backend
