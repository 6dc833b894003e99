"""Videos from an adapter."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from common import PROMPTS, frames_of

from crepatrain.commands import sample as module
from crepatrain.commands.sample import SampleOptions, sample
from crepatrain.config.load import parse_numbers
from crepatrain.console import Screen
from crepatrain.data.encode import video_facts
from crepatrain.errors import UserError
from crepatrain.records.opening import asked_step


def test_a_sample_stands_beside_the_base_of_the_same_seed(trained, tmp_path, capsys):
    sample(trained, SampleOptions(prompt="a square", steps=2, output=tmp_path / "one.mp4"), Screen())
    out = capsys.readouterr().out
    assert "steps: 2 instead of the recipe's 50" in out
    assert "adapter changes" in out
    assert frames_of(tmp_path / "one.mp4").shape == (9, 64, 96, 3)
    beside = frames_of(tmp_path / "one-beside-base.mp4")
    assert beside.shape[0] == 9
    assert beside.shape[2] == 2 * 96 + 4
    base, made = (beside[:, 22:86, start : start + 96].astype(int) for start in (0, 100))
    assert np.abs(base - made).mean() > 1
    facts = video_facts(tmp_path / "one-beside-base.mp4")
    assert {key: facts[key] for key in ("prompt", "seed", "step", "steps", "shown", "base")} == {
        "prompt": "a square",
        "seed": 42,
        "step": 4,
        "steps": 2,
        "shown": ["base", "adapter"],
        "base": "wan-tiny",
    }
    assert video_facts(trained / "samples" / "step-000002.mp4") == {"prompts": PROMPTS, "seed": 42, "steps": 2, "step": 2}


def test_a_sample_takes_no_others_place(trained):
    for _ in range(2):
        sample(trained, SampleOptions(prompt="a", steps=2, frames=5, seed=3), Screen(quiet=True))
    names = {path.name for path in (trained / "samples").glob("sample-3*")}
    assert names == {"sample-3.mp4", "sample-3-beside-base.mp4", "sample-3-2.mp4", "sample-3-2-beside-base.mp4"}


def test_the_same_seed_gives_the_same_frames(trained, tmp_path, monkeypatch):
    """Before they are encoded: the encoder's threads may split the bits otherwise."""
    written = []
    monkeypatch.setattr(module, "write_video", lambda _path, frames, *, fps, facts: written.append((frames.copy(), fps)))
    for seed in (1, 1, 2):
        sample(trained, SampleOptions(prompt="a", steps=2, frames=5, seed=seed, output=tmp_path / "out.mp4"), Screen(quiet=True))
    first, again, other = (written[index][0] for index in (0, 2, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert {fps for _, fps in written} == {16.0}


def test_checkpoints_and_strengths_make_one_grid(trained, tmp_path):
    options = SampleOptions(prompt="a", steps=2, frames=5, at=(2, 4), strengths=(0.5, 1.0), output=tmp_path / "grid.mp4")
    sample(trained, options, Screen(quiet=True))
    grid = frames_of(tmp_path / "grid-beside-base.mp4")
    assert grid.shape == (5, 2 * (64 + 22) + 4, 3 * 96 + 2 * 4, 3)


def test_an_adapters_file_is_enough_where_its_base_is_known(trained, wan, tiny_checkpoint, tmp_path):
    file = tmp_path / "copied.safetensors"
    shutil.copy(trained / "pytorch_lora_weights.safetensors", file)
    sample(file, SampleOptions(prompt="a", steps=2, frames=5, base=str(wan), output=tmp_path / "out.mp4"), Screen(quiet=True))
    assert len(frames_of(tmp_path / "out.mp4")) == 5
    with pytest.raises(UserError, match="its base was a local folder called wan"):
        sample(file, SampleOptions(prompt="a"), Screen(quiet=True))
    with pytest.raises(UserError, match=r"--base .*: it is Wan 2.1 image-to-video, and this was trained for text"):
        sample(file, SampleOptions(prompt="a", base=str(tiny_checkpoint("wan", "tiny-i2v"))), Screen(quiet=True))
    with pytest.raises(UserError, match=r"--base=.*: its transformer is a LTXVideoTransformer3DModel.*\n.*give another one"):
        sample(trained, SampleOptions(prompt="a", base=str(tiny_checkpoint("ltxvideo", "tiny"))), Screen(quiet=True))
    with pytest.raises(UserError, match="--at: it compares the checkpoints of a run"):
        sample(file, SampleOptions(prompt="a", at=(2,)), Screen(quiet=True))


def test_what_another_base_decides_otherwise_is_reported(trained, wan, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(wan, other)
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"flow_shift": 5.0}))
    options = SampleOptions(prompt="a", steps=2, frames=5, base=str(other), output=tmp_path / "out.mp4")
    for target in (trained, trained / "pytorch_lora_weights.safetensors"):
        sample(target, options, Screen())
        assert f"shift: 5.0, as {other} has it, instead of the recipe's 3.0" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SampleOptions(prompt="a", frames=6), "num_frames=6: this model takes 4k"),
        (SampleOptions(prompt="a", height=60), "height=60: this model takes multiples of 16"),
        (SampleOptions(prompt="a", image=Path("x.png")), "--image x.png: the run was trained from text alone"),
        (SampleOptions(prompt="a", output=Path("video.avi")), "--output video.avi: not the name of an .mp4 file"),
        (SampleOptions(prompt="a", output=Path("/proc/video.mp4")), "--output /proc/video.mp4: it can't be written"),
        (SampleOptions(prompt="a", guidance=math.inf), "--guidance inf: not a finite number"),
        (SampleOptions(prompt="a", at=(3,)), "adapter-000003.safetensors: there is no such file"),
    ],
)
def test_what_cant_be_sampled_is_reported(trained, options, message):
    with pytest.raises(UserError, match=message):
        sample(trained, options, Screen(quiet=True))


def test_numbers_between_commas():
    assert parse_numbers("0.5, 1", float, "--strength") == (0.5, 1.0)
    assert parse_numbers("", int, "--at") == ()
    with pytest.raises(UserError, match="--at 5,x: not numbers"):
        parse_numbers("5,x", int, "--at")
    with pytest.raises(UserError, match=r"--strength nan: not numbers .*\n.*0.7,1.0"):
        parse_numbers("nan", float, "--strength")


def test_the_best_step_can_be_asked_for(trained, config_file, tmp_path):
    best = json.loads((trained / "best.json").read_text())["step"]
    assert asked_step(trained, "best") == best
    assert asked_step(trained, "2") == 2
    assert asked_step(trained, None) is None
    with pytest.raises(UserError, match="--step last: not a step"):
        asked_step(trained, "last")
    with pytest.raises(UserError, match=r"has no best.json, as it held out no clips"):
        asked_step(tmp_path, "best")
