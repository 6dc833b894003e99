"""Runs with blocks in host memory are the runs without, to the bit, whatever comes between two steps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import RESTLESS, Write, expect_same_run, train

from crepatrain.records.events import VideosMade

EVERYTHING = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "gradient_accumulation_steps": 2,
    "use_ema": True,
    "eval_share": 0.34,
    "validation_prompts": ["a square"],
    "validation_steps": 2,
    "validation_sampling_steps": 2,
    "layersync_enabled": True,
    "layersync_student_block": 1,
    "layersync_teacher_block": 8,
    "mixed_precision": "bf16",
    **RESTLESS,
}
BACKBONE = {"crepa_feature_source": "backbone", "crepa_teacher_block_index": 9}


@pytest.mark.parametrize("changes", [{}, pytest.param({**BACKBONE, "crepa_block_index": 0}, marks=pytest.mark.slow)])
def test_a_run_is_the_same_to_the_bit(config_file: Write, tmp_path: Path, changes: dict):
    videos: dict[Path, dict[int, np.ndarray]] = {}

    def trained(name: str, **more: Any) -> Path:
        def watch(event: object) -> None:
            if isinstance(event, VideosMade):
                videos.setdefault(folder, {})[event.step] = next(iter(event.videos.values()))

        folder = tmp_path / name
        return train(config_file, subscribers=[watch], output_dir=str(folder), **EVERYTHING | changes | more)

    resident = trained("resident")
    trained("ringed", block_offload=10, max_train_steps=2)
    ringed = trained("ringed", block_offload=7)
    expect_same_run(resident, ringed)
    assert videos[resident].keys() == videos[ringed].keys() == {0, 2, 4}
    for step, video in videos[resident].items():
        assert np.array_equal(videos[ringed][step], video), step
