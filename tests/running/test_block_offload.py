"""Runs with blocks in host memory are the runs without, to the bit, whatever comes between two steps."""

from pathlib import Path

import numpy as np
import pytest
from common import frames_of
from runs import RESTLESS, Write, expect_same_run, train

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
    values = EVERYTHING | changes
    resident = train(config_file, output_dir=str(tmp_path / "resident"), **values)
    parts = str(tmp_path / "parts")
    train(config_file, output_dir=parts, block_offload=10, **values | {"max_train_steps": 2})
    ringed = train(config_file, output_dir=parts, block_offload=7, **values)
    expect_same_run(resident, ringed)
    videos = [sorted(path.name for path in (run / "samples").glob("*.mp4")) for run in (resident, ringed)]
    assert videos[0] == videos[1] != []
    for name in videos[0]:
        assert np.array_equal(*(frames_of(run / "samples" / name) for run in (resident, ringed)))
