"""Runs on a base in fewer bits, from the caches to an adapter."""

import json
from pathlib import Path

import pytest
from runs import ADAPTER, RESTLESS, Write, expect_same_run, interrupted, train
from safetensors import safe_open

from crepatrain.errors import UserError


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
