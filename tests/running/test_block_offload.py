"""Runs with blocks or their inputs in host memory are the runs without, to the bit, whatever comes between two steps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import RESTLESS, Write, expect_same_run, train

from crepatrain.commands.validate import validate
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.data.buckets import Bucket
from crepatrain.memory.stages import training_stage
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


IN_FEWER_BITS = [{"base_quantization": how} for how in ("int8", "fp8", "nf4")]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {**BACKBONE, "crepa_block_index": 0}, *IN_FEWER_BITS])
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {**BACKBONE, "crepa_block_index": 0}, {"base_quantization": "int8", "lora_dropout": 0.1}]
)
def test_a_run_with_fewer_activations_is_the_same_to_the_bit(config_file: Write, tmp_path: Path, changes: dict):
    plain, saving = (tmp_path / name for name in ("plain", "saving"))
    train(config_file, output_dir=str(plain), **EVERYTHING | changes)
    begun: dict[str, Any] = {"max_train_steps": 2, "checkpoint_offload": True}
    train(config_file, output_dir=str(saving), **EVERYTHING | changes | begun)
    train(
        config_file,
        output_dir=str(saving),
        **EVERYTHING | changes,
        checkpoint_offload=True,
        nested_checkpointing=True,
        block_offload=7,
    )
    expect_same_run(plain, saving)


def test_a_run_may_go_on_with_fewer_activations(config_file: Write, tmp_path: Path):
    plain, saving = (tmp_path / name for name in ("plain", "saving"))
    train(config_file, output_dir=str(plain), max_train_steps=3)
    train(config_file, output_dir=str(saving), max_train_steps=1, nested_checkpointing=True)
    train(config_file, output_dir=str(saving), max_train_steps=2, checkpoint_offload=True)
    train(config_file, output_dir=str(saving), max_train_steps=3)
    expect_same_run(plain, saving)


def test_auto_is_a_number_in_the_folder(config_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And the run with all of its blocks in host memory is the one with none."""
    written, folders = [], []
    for name, room in (("without-gpu", None), ("small-gpu", 1)):
        monkeypatch.setattr("crepatrain.commands.fit.free_bytes", lambda _device, room=room: room)
        folders.append(train(config_file, output_dir=str(tmp_path / name), block_offload="auto", max_train_steps=2))
        written.append(json.loads((folders[-1] / "config.json").read_text(encoding="utf-8"))["block_offload"])
    assert written == [0, 10]
    expect_same_run(*folders)


def test_memory_is_chosen_and_kept_where_a_run_can_not_change_it(
    config_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A run that began on a large card goes on on one where nothing fits, with the numbers that it would have had."""
    keys = ("memory", "gradient_checkpointing", "block_offload", "checkpoint_offload", "base_quantization")
    resident = train(config_file, output_dir=str(tmp_path / "resident"), gradient_checkpointing="selective")

    def run(room: int, steps: int) -> list[object]:
        monkeypatch.setattr("crepatrain.commands.fit.free_bytes", lambda _device: room)
        train(config_file, output_dir=str(tmp_path / "chosen"), memory="auto", max_train_steps=steps)
        written = json.loads((tmp_path / "chosen" / "config.json").read_text(encoding="utf-8"))
        return [written[key] for key in keys]

    plan = read_plan(config_file(gradient_checkpointing="selective"))
    enough = training_stage(plan, Bucket(*plan.size)).peak
    assert run(enough, 2) == ["auto", "selective", 0, False, "none"]
    assert run(1, 3) == ["auto", "selective", 10, True, "none"]
    expect_same_run(resident, tmp_path / "chosen")
    validate(read_plan(config_file(output_dir=str(tmp_path / "chosen"), memory="auto", max_train_steps=4)), Screen(quiet=True))


@pytest.mark.slow
def test_compiled_blocks_in_host_memory_train_the_same(config_file: Write, tmp_path: Path):
    runs = [
        train(
            config_file,
            output_dir=str(tmp_path / str(count)),
            block_offload=count,
            checkpoint_offload=count > 0,
            compile=True,
            max_train_steps=2,
        )
        for count in (0, 10)
    ]
    expect_same_run(*runs)


@pytest.mark.slow
def test_two_processes_have_a_ring_each(config_file: Write, tmp_path: Path):
    resident, ringed = tmp_path / "resident", tmp_path / "ringed"
    for folder, count in ((resident, 0), (ringed, 10)):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "crepatrain", "fit"]
        saving = {"checkpoint_offload": count > 0, "nested_checkpointing": count > 0}
        config = config_file(output_dir=str(folder), block_offload=count, max_train_steps=2, **saving)
        ended = subprocess.run(
            [*command, str(config)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr
    expect_same_run(resident, ringed)
