"""Checkpoints: whole or not there, and back to the bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from common import disk_of
from torch import nn

from crepatrain.errors import UserError
from crepatrain.records.layout import checkpoints, step_of
from crepatrain.training.checkpoint import read_plain, read_tensors, read_tree, replace_file, replace_json, write_checkpoint


def same(left: Any, right: Any) -> bool:
    """Equal to the bit, types of numbers and keys included."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def trained(**options: Any) -> torch.optim.AdamW:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, **options)
    for _ in range(3):
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"fused": True}, {"betas": (0.8, 0.99), "weight_decay": 0.1}])
def test_an_adamw_state_comes_back_to_the_bit(tmp_path: Path, options: dict[str, Any]):
    before = trained(**options).state_dict()
    write_checkpoint(tmp_path / "step-000003", {}, {"learner": {"optimizer": before}}, {})
    back = read_tree(tmp_path / "step-000003", "learner")["optimizer"]
    assert before["state"].keys() == back["state"].keys()
    assert same(before["state"], back["state"])
    fresh = trained(**options)
    fresh.load_state_dict(back)
    assert same(fresh.state_dict()["state"], before["state"])
    group, expected = fresh.state_dict()["param_groups"][0], before["param_groups"][0]
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in group.items()} == {
        key: list(v) if isinstance(v, tuple) else v for key, v in expected.items()
    }


def test_nested_trees_come_back(tmp_path: Path):
    tree = {
        "numbers": {0: torch.arange(3), 10: {"x": torch.tensor(2.5, dtype=torch.float64), "none": None}},
        "list": [1, 2.5, "three", True, [torch.zeros(0), torch.ones(2, 2).bfloat16()]],
        "empty": {},
        "tiny": 0.1 + 0.2,
        "big": 2**60 + 1,
    }
    write_checkpoint(tmp_path / "step-000001", {}, {"tree": tree}, {})
    assert same(read_tree(tmp_path / "step-000001", "tree"), tree)


def test_a_checkpoint_holds_its_three_kinds_of_files(tmp_path: Path):
    shared = torch.randn(4, 4)
    folder = tmp_path / "checkpoints" / "step-000012"
    write_checkpoint(folder, {"adapter": {"a": shared, "b": shared.t()}}, {"learner": {"x": 1}}, {"state": {"step": 12}})
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter.safetensors",
        "learner.json",
        "learner.safetensors",
        "manifest.json",
        "state.json",
    ]
    assert not folder.with_name("step-000012.tmp").exists()
    back = read_tensors(folder, "adapter")
    assert torch.equal(back["a"], shared)
    assert torch.equal(back["b"], shared.t())
    assert read_plain(folder, "state") == {"step": 12}
    assert step_of(folder) == 12


def write_step(root: Path, step: int, value: float = 0.0) -> Path:
    folder = root / f"step-{step:06d}"
    write_checkpoint(folder, {"adapter": {"a": torch.full((10,), value)}}, {}, {"state": {"step": step}})
    return folder


def test_a_left_over_tmp_is_in_nobodys_way(tmp_path: Path):
    left = tmp_path / "step-000002.tmp"
    left.mkdir()
    (left / "junk.safetensors").write_bytes(b"half")
    folder = write_step(tmp_path, 2)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "manifest.json", "state.json"]
    assert not left.exists()


def test_writing_a_step_again_replaces_it(tmp_path: Path):
    write_step(tmp_path, 4, 1.0)
    folder = write_step(tmp_path, 4, 2.0)
    assert read_tensors(folder, "adapter")["a"].sum() == 20


@pytest.mark.parametrize("what", ["tensors", "trees", "plain"])
def test_a_full_disk_is_reported_and_earlier_checkpoints_stay(tmp_path: Path, what: str):
    earlier = write_step(tmp_path, 1, 3.0)
    big = torch.randn(50_000)
    content = {
        "tensors": ({"adapter": {"a": big}}, {}, {}),
        "trees": ({}, {"learner": {"state": {0: big}}}, {}),
        "plain": ({}, {}, {"state": list(range(20_000))}),
    }[what]
    with disk_of(16_384), pytest.raises(UserError) as error:
        write_checkpoint(tmp_path / "step-000002", *content)
    assert "step-000002" in str(error.value)
    assert "free disk space" in str(error.value)
    assert checkpoints(tmp_path) == [earlier]
    assert not (tmp_path / "step-000002.tmp").exists()
    assert read_tensors(earlier, "adapter")["a"].sum() == 30


def test_a_full_disk_is_reported_for_the_small_files_too(tmp_path: Path):
    path = tmp_path / "adapters" / "adapter.safetensors"
    replace_file(path, {"a": torch.ones(3)}, {"format": "pt"})
    with disk_of(16_384), pytest.raises(UserError):
        replace_file(path, {"a": torch.randn(50_000)}, {"format": "pt"})
    from safetensors.torch import load_file

    assert torch.equal(load_file(path)["a"], torch.ones(3))


def test_a_number_that_is_not_finite_is_never_written_as_json(tmp_path: Path):
    path = tmp_path / "status.json"
    replace_json(path, {"step": 1})
    with pytest.raises(ValueError, match=r"(?i)json"):
        replace_json(path, {"step": float("nan")})
    assert path.read_text(encoding="utf-8") == '{\n  "step": 1\n}\n'


def test_a_damaged_json_is_reported_with_the_remedy(tmp_path: Path):
    folder = write_step(tmp_path, 3)
    (folder / "state.json").write_text('{"step": ', encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_plain(folder, "state")
    assert str(folder / "state.json") in str(error.value)
    assert "remove this checkpoint folder" in str(error.value)


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_tensor_file_is_reported_with_the_remedy(tmp_path: Path, harm: str):
    folder = write_step(tmp_path, 3)
    path = folder / "adapter.safetensors"
    content = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(content[:-8])
    with pytest.raises(UserError) as error:
        read_tensors(folder, "adapter")
    assert str(path) in str(error.value)


WRITER = """
import sys, torch
from pathlib import Path
from crepatrain.records.runfolder import rotate
from crepatrain.training.checkpoint import write_checkpoint
root, step = Path(sys.argv[1]), 0
while True:
    step += 1
    tensors = {name: {"a": torch.full((300_000,), float(step))} for name in ("adapter", "projector", "ema")}
    trees = {"learner": {"state": {0: tensors["ema"]["a"]}}}
    write_checkpoint(root / f"step-{step:06d}", tensors, trees, {"state": {"step": step}})
    rotate(root, 3)
"""


def test_a_kill_leaves_whole_checkpoints_alone(tmp_path: Path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 60
    while not (found := checkpoints(tmp_path)) or step_of(found[-1]) < 4 or not list(tmp_path.glob("*.tmp")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = checkpoints(tmp_path)
    assert 2 <= len(found) <= 4
    for folder in found:
        step = read_plain(folder, "state")["step"]
        assert step == step_of(folder)
        for name in ("adapter", "projector", "ema"):
            assert torch.equal(read_tensors(folder, name)["a"], torch.full((300_000,), float(step)))
        assert read_tree(folder, "learner")["state"][0][0] == step
