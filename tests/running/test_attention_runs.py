"""Whole runs with an attention kernel of another package: what trains, and what is refused before anything is cached."""

from pathlib import Path

import pytest
import stand_in_kernels
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from runs import Write, adapter, of, status, train

from crepatrain.errors import UserError

FLASH = {"attention_backend": "flash", "mixed_precision": "bf16", "max_train_steps": 2}


@pytest.fixture(autouse=True)
def _kernels_as_they_were(monkeypatch):
    for kept in ("_backends", "_constraints", "_supported_arg_names"):
        monkeypatch.setattr(_AttentionBackendRegistry, kept, dict(getattr(_AttentionBackendRegistry, kept)))


@pytest.mark.parametrize("name", ["wan", "ltxvideo"])
def test_every_layer_of_q_k_v_learns_with_a_kernel(config_file: Write, tiny_checkpoint, monkeypatch, name):
    calls = stand_in_kernels.install(monkeypatch, "flash")
    size = {"height": 128, "width": 192, "num_frames": 17} if name == "ltxvideo" else {}
    sampled = {"validation_prompts": ["a red square"], "validation_sampling_steps": 2, "eval_share": 0.3}
    with stand_in_kernels.norms_in_fp32(monkeypatch):
        folder = train(config_file, **FLASH, **of(tiny_checkpoint(name)), **size, **sampled)
    assert status(folder)["status"] == "completed"
    assert {dtype for dtype, _ in calls} == {torch.bfloat16}
    ups = {key: value for key, value in adapter(folder).items() if "lora_B" in key}
    assert any(".q." in key or "to_q" in key for key in ups)
    assert all(value.any() for value in ups.values())
    assert _AttentionBackendRegistry._active_backend is AttentionBackendName.NATIVE


def test_a_kernel_without_a_backward_is_refused_before_anything_is_cached(config_file: Write, tmp_path: Path, monkeypatch):
    stand_in_kernels.install(monkeypatch, "flash", stand_in_kernels.without_backward)
    cache = tmp_path / "a cache of its own"
    with pytest.raises(UserError, match=r"attention_backend=flash: .*no gradient reaches"):
        train(config_file, **FLASH, cache_dir=str(cache))
    assert not [path for path in cache.rglob("*") if path.suffix == ".safetensors"]
