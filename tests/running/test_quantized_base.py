"""Runs on a base in fewer bits, from the caches to an adapter."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from runs import ADAPTER, RESTLESS, Write, expect_same_run, interrupted, train
from safetensors import safe_open

from crepatrain.commands import sample as sample_command
from crepatrain.commands.sample import SampleOptions
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.sampling.comparison import Held
from crepatrain.training.text_encoders import TextEncoding


@pytest.mark.parametrize("how", ["int8", *(pytest.param(how, marks=pytest.mark.slow) for how in ("fp8", "nf4"))])
def test_a_run_in_two_parts_is_the_run_in_one(config_file: Write, tmp_path: Path, how: str):
    changes = {"base_quantization": how, "use_ema": True, "eval_share": 0.34, "max_train_steps": 4, **RESTLESS}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), **changes)
    parts = interrupted(config_file, at=2, output_dir=str(tmp_path / "parts"), **changes)
    with pytest.raises(UserError, match="base_quantization"):
        train(config_file, output_dir=str(tmp_path / "parts"), **changes | {"base_quantization": "none"})
    train(config_file, output_dir=str(tmp_path / "parts"), **changes)
    expect_same_run(whole, parts)
    with safe_open(whole / ADAPTER, framework="pt") as file:
        assert json.loads(file.metadata()["crepatrain.recipe"])["train"]["quant"] == how


def test_how_encoders_were_held_goes_with_the_adapter(
    config_file: Write, tmp_path: Path, wan: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run goes on with it, and `sample` takes it from the recipe, unless it is told otherwise."""
    changes = {"text_encoder_quantization": "int8", "text_encoder_offload": True, "vae_tiling": True, "max_train_steps": 1}
    changes |= {"validation_prompts": ["a square"], "validation_sampling_steps": 2}
    run = train(config_file, output_dir=str(tmp_path / "run"), **changes)
    assert (run / "samples" / "step-000001.mp4").is_file()
    for key, value in (("text_encoder_quantization", "none"), ("vae_tiling", False)):
        with pytest.raises(UserError, match=key):
            train(config_file, output_dir=str(run), **changes | {key: value, "max_train_steps": 2})
    train(config_file, output_dir=str(run), **changes | {"text_encoder_offload": False, "max_train_steps": 2})
    with safe_open(run / ADAPTER, framework="pt") as file:
        trained = json.loads(file.metadata()["crepatrain.recipe"])["train"]
    assert (trained["text_quant"], trained["vae_tiling"]) == ("int8", True)
    held, opened = [], sample_command.open_pipeline
    monkeypatch.setattr(sample_command, "open_pipeline", lambda model, *rest: (held.append(model.held), opened(model, *rest))[1])
    options = SampleOptions(prompt="a", steps=2, frames=5, base=str(wan), output=tmp_path / "out.mp4")
    for target in (run, run / ADAPTER):
        sample_command.sample(target, options, Screen(quiet=True))
    sample_command.sample(run, replace(options, text_encoder_quantization="none", vae_tiling=False), Screen(quiet=True))
    assert held == [Held(TextEncoding(quantization="int8"), vae_tiling=True)] * 2 + [Held()]
