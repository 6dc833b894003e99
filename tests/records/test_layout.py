"""The names in a run's folder, and the steps that they hold."""

from pathlib import Path

import pytest

from crepatrain.records.layout import RunLayout, checkpoints, step_of
from crepatrain.records.runfolder import rotate


def folders(root: Path, *steps: int) -> list[Path]:
    """Checkpoints of these steps, as empty folders."""
    found = [RunLayout(root).checkpoint(step) for step in steps]
    for folder in found:
        folder.mkdir(parents=True)
    return found


def files(root: Path, *names: str) -> list[Path]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return [root / name for name in names]


def test_the_names_on_the_disk_are_those_of_every_version(tmp_path: Path):
    """A run of an earlier version goes on, and its files are found."""
    layout = RunLayout(tmp_path)
    names = {
        str(path.relative_to(tmp_path))
        for path in (*(path for path in vars(layout).values() if path != tmp_path), layout.checkpoint(500), layout.video(500))
    }
    assert names == {
        *("config.json", "status.json", "dataset.json", "best.json", ".lock", "wandb-id.txt", "alignment_map.json"),
        *("report.html", "README.md", "metrics.jsonl", "samples/figures.jsonl", "pytorch_lora_weights.safetensors"),
        *("checkpoints", "adapters", "samples", "exports", "tensorboard", "changes.jsonl", "clip-lists"),
        *("checkpoints/step-000500", "samples/step-000500.mp4"),
    }
    assert layout.adapter("cat", 500) == tmp_path / "adapters" / "cat-000500.safetensors"


@pytest.mark.parametrize("step", [0, 7, 999_999, 1_000_000])
def test_a_name_holds_its_step(tmp_path: Path, step: int):
    layout = RunLayout(tmp_path)
    for path in (layout.checkpoint(step), layout.video(step), layout.adapter("cat-000012", step)):
        assert step_of(path) == step


def test_unfinished_and_foreign_folders_are_no_checkpoints(tmp_path: Path):
    layout = RunLayout(tmp_path)
    [whole] = folders(tmp_path, 2)
    for name in ("step-000009.tmp", "step-000011.left", "step-last"):
        (layout.checkpoints / name).mkdir()
    (layout.checkpoints / "step-000010").write_text("a file", encoding="utf-8")
    assert checkpoints(layout.checkpoints) == [whole]
    assert [path.name for path in layout.unfinished_checkpoints()] == ["step-000009.tmp"]
    assert checkpoints(tmp_path / "nowhere") == []


def test_everything_is_ordered_by_step_not_by_name(tmp_path: Path):
    layout, steps = RunLayout(tmp_path), (5, 20, 999_999, 1_000_000)
    made = folders(tmp_path, *reversed(steps))
    assert checkpoints(layout.checkpoints) == made[::-1]
    videos = [layout.video(step) for step in steps]
    adapters = [layout.adapter("cat", step) for step in steps]
    files(tmp_path, *(str(path.relative_to(tmp_path)) for path in (*reversed(videos), *reversed(adapters))))
    files(tmp_path, "samples/step-000005.mp4.left", "samples/sample-42.mp4", "adapters/cat.safetensors")
    assert layout.all_videos() == videos
    assert layout.all_adapters() == adapters


def test_the_first_versions_videos_of_single_prompts_are_found(tmp_path: Path):
    made = files(tmp_path, "samples/step-000005-0.mp4", "samples/step-000005-1.mp4")
    assert RunLayout(tmp_path).all_videos() == made
    assert {step_of(path) for path in made} == {5}


def test_what_is_later_than_a_step(tmp_path: Path):
    layout = RunLayout(tmp_path)
    _, _, last = folders(tmp_path, 2, 4, 6)
    names = [
        f"{kind}-{step:06d}.{suffix}"
        for kind, suffix in (("samples/step", "mp4"), ("adapters/cat", "safetensors"))
        for step in (0, 4, 6)
    ]
    files(tmp_path, *names)
    assert set(layout.after(4)) == {last, layout.video(6), layout.adapter("cat", 6)}
    assert {step_of(path) for path in layout.after(0)} == {0, 2, 4, 6}
    assert layout.checkpoint(0) not in layout.after(0)


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 10]), (1, [10]), (3, [2, 3, 10]), (9, [1, 2, 3, 10])])
def test_rotation_keeps_the_newest(tmp_path: Path, limit: int | None, kept: list[int]):
    folders(tmp_path, 10, 1, 3, 2)
    folder = RunLayout(tmp_path).checkpoints
    rotate(folder, limit)
    assert [step_of(path) for path in checkpoints(folder)] == kept
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:06d}" for step in kept]


def test_rotation_keeps_the_best(tmp_path: Path):
    folders(tmp_path, 1, 2, 3)
    folder = RunLayout(tmp_path).checkpoints
    rotate(folder, 1, keep=1)
    assert [step_of(path) for path in checkpoints(folder)] == [1, 3]
