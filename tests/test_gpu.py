"""What only a CUDA device can show."""

from pathlib import Path

import pytest
import torch

from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.running.events import StepBegins, StepLaunched

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("source", ["cached", "pixels", "backbone"])
def test_a_step_is_launched_without_waiting(config_file, source: str):
    def watch(event: object) -> None:
        match event:
            case StepBegins(run):
                # The first step allocates and builds what later ones keep.
                torch.cuda.set_sync_debug_mode("error" if run.state.step else "default")
            case StepLaunched():
                torch.cuda.set_sync_debug_mode("default")

    block = {"crepa_teacher_block_index": 9} if source == "backbone" else {}
    changes = {"crepa_feature_source": source, "mixed_precision": "bf16", "gradient_accumulation_steps": 2, **block}
    plan = read_plan(config_file(**changes))
    try:
        fit(plan, Screen(quiet=True), subscribers=[watch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (Path(plan.config.loop.output_dir) / "pytorch_lora_weights.safetensors").is_file()


def test_training_holds_no_encoder_and_little_of_crepa(config_file, tmp_path):
    peaks = {}
    for name, changes in (("plain", {"crepa_enabled": False}), ("crepa", {})):
        plan = read_plan(config_file(output_dir=str(tmp_path / name), mixed_precision="bf16", **changes))
        fit(plan, Screen(quiet=True))
        peaks[name] = torch.cuda.max_memory_allocated()
    assert peaks["crepa"] - peaks["plain"] < 32 << 20
