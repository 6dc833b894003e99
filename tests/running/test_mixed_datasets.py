"""A run on several datasets, of several lengths and with weights, stopped and resumed to the bit."""

from pathlib import Path

import pytest
from common import render_clip
from runs import RESTLESS, Write, expect_same_run, train

from crepatrain.running.events import BatchReady


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    root = tmp_path_factory.mktemp("mixed")
    for folder, lengths in (("long", (20, 30)), ("short", (6, 9, 13))):
        (root / folder).mkdir()
        for number, frames in enumerate(lengths):
            render_clip(root / folder / f"{number}.mp4", frames=frames, seed=number)
            (root / folder / f"{number}.txt").write_text(f"{folder} {number}", encoding="utf-8")
    return [{"path": str(root / "long"), "repeats": 1.5}, {"path": str(root / "short"), "repeats": 0.7, "clip_mode": "first"}]


@pytest.mark.parametrize("source", ["cached", pytest.param("pixels", marks=pytest.mark.slow)])
def test_it_resumes_to_the_bit(config_file: Write, tmp_path: Path, entries: list[dict], source: str):
    mixed = {"train_data": entries, "frame_buckets": "auto", "num_frames": 13, "crop": "random", "max_train_steps": 12}
    mixed |= {"crepa_feature_source": source, "mixed_precision": "no", **RESTLESS}
    seen: list[tuple[int, int]] = []

    def watch(event: object) -> None:
        if isinstance(event, BatchReady):
            seen.append((event.batch.latents.shape[2], event.batch.grid.t))

    whole = train(config_file, output_dir=str(tmp_path / "whole"), subscribers=[watch], **mixed)
    assert {frames for frames, _ in seen} == {2, 3, 4}, "windows of 5, 9 and 13 frames"
    train(config_file, output_dir=str(tmp_path / "parted"), **mixed | {"max_train_steps": 5})
    expect_same_run(whole, train(config_file, output_dir=str(tmp_path / "parted"), **mixed))
