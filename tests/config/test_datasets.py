"""Several datasets with settings of their own."""

import json
from pathlib import Path

import pytest

from crepatrain.config.datasets import read_datasets
from crepatrain.config.load import option_value
from crepatrain.config.plan import read_plan
from crepatrain.config.summary import summarize
from crepatrain.errors import UserError

ENTRIES = [{"path": "a", "repeats": 2.5, "clip_mode": "first"}, {"path": "b", "num_frames": 5, "start": 1.5}]
YAML = "datasets:\n- path: a\n  repeats: 2.5\n  clip_mode: first\n- path: b\n  num_frames: 5\n  start: 1.5\n"
TOML = """
[[datasets]]
path = "a"
repeats = 2.5
clip_mode = "first"

[[datasets]]
path = "b"
num_frames = 5
start = 1.5
"""


@pytest.fixture
def two(tmp_path: Path, clips: Path) -> Path:
    """A folder in which a and b hold clips."""
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(clips)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.yaml", YAML),
        ("data.yml", YAML.replace("datasets:\n", "")),
        ("data.toml", TOML),
        ("data.toml", TOML.replace("datasets", "directory")),
        ("data.json", json.dumps({"datasets": ENTRIES})),
        ("data.json", json.dumps(ENTRIES)),
    ],
)
def test_a_file_of_datasets_in_every_form(two: Path, name: str, text: str):
    (two / name).write_text(text, encoding="utf-8")
    first, second = read_datasets(str(two / name))
    assert (first.path, second.path) == (two / "a", two / "b"), "paths are seen from the file"
    assert (first.config.repeats, first.config.clip_mode, first.config.num_frames) == (2.5, "first", None)
    assert (second.config.repeats, second.config.num_frames, second.config.start) == (1.0, 5, 1.5)
    assert first.where == f"dataset 1 ({two / 'a'})"


def test_a_json_list_of_clips_is_one_dataset(two: Path):
    (two / "clips.json").write_text(json.dumps([{"path": "a/x.mp4", "caption": "c"}]), encoding="utf-8")
    [only] = read_datasets(str(two / "clips.json"))
    assert (only.path, only.where) == (two / "clips.json", "")


@pytest.mark.parametrize(
    ("entry", "what", "fix"),
    [
        ({"path": "a", "repeat": 2}, "unknown key repeat", "did you mean repeats?"),
        ({"repeats": 2}, "path is missing", "Folder of clips"),
        ({"path": "a", "repeats": 0}, "repeats=0 is not possible", "greater than 0"),
        ({"path": "a", "clip_mode": "fist"}, 'clip_mode="fist" is not possible', "'first'"),
        ({"path": "a", "start": 3, "end": 2}, "end=2 is not after start=3", "correct one of the two"),
        ("a", "it is no entry", "write an object with the keys path"),
    ],
)
def test_a_wrong_entry_is_named(two: Path, entry: object, what: str, fix: str):
    (two / "data.json").write_text(json.dumps({"datasets": [{"path": "b"}, entry]}), encoding="utf-8")
    with pytest.raises(UserError) as raised:
        read_datasets(str(two / "data.json"))
    [problem] = raised.value.problems
    assert "data.json, dataset 2" in problem.what
    assert what in problem.what
    assert fix in problem.fix


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("data.yaml", "a: [", "it can't be read"),
        ("data.toml", "a =", "it can't be read"),
        ("data.yaml", "datasets: []", "it lists no datasets"),
        ("data.yaml", "folders: [a]", "no list named datasets"),
        ("data.json", json.dumps({"datasets": ENTRIES, "general": {}}), "unknown: general"),
        ("data.yaml", "5", "it lists no datasets"),
        ("data.json", "[" * 100_000, "it can't be read"),
    ],
)
def test_a_file_that_names_none_is_one_message(two: Path, name: str, text: str, what: str):
    (two / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        read_datasets(str(two / name))
    [problem] = raised.value.problems
    assert what in problem.what
    assert problem.fix


def test_a_plan_checks_each(config_file, two: Path):
    entries = [
        {"path": str(two / "a"), "num_frames": 6},
        {"path": str(two / "missing")},
        {"path": str(two / "b"), "height": 70},
    ]
    with pytest.raises(UserError) as raised:
        read_plan(config_file(train_data=entries))
    what = " ".join(problem.what for problem in raised.value.problems)
    assert f"dataset 2 ({two / 'missing'}): it does not exist" in what
    assert f"dataset 1 ({two / 'a'}): num_frames=6" in what
    assert f"dataset 3 ({two / 'b'}): height=70" in what


def test_a_plan_knows_the_largest_window(config_file, two: Path):
    entries = [{"path": str(two / "a"), "repeats": 2}, {"path": str(two / "b"), "height": 128, "width": 128, "num_frames": 5}]
    plan = read_plan(config_file(train_data=entries))
    assert plan.size_of(plan.datasets[1]) == (5, 128, 128)
    assert plan.largest == max((plan.size, (5, 128, 128)), key=lambda size: size[0] * size[1] * size[2])
    assert dict(summarize(plan))["clips"].startswith(f"{two / 'a'} x 2, {two / 'b'}: ")
    listed = read_plan(config_file(aspect_buckets=[[64, 96], [128, 128]]))
    assert listed.largest[1:] == (128, 128)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"frame_buckets": [5, 6]}, "frame_buckets=6: the model takes 4k+1 frames"),
        ({"frame_buckets": [801]}, "frame_buckets=801: more than num_frames"),
        ({"aspect_buckets": [[64, 90]]}, "aspect_buckets=[64, 90]: width=90"),
        ({"aspect_buckets": [[64]]}, "aspect_buckets"),
        ({"frame_buckets": []}, "frame_buckets"),
        ({"fps": "kept"}, "fps"),
    ],
)
def test_sizes_and_lengths_are_those_of_the_model(config_file, changes: dict, what: str):
    with pytest.raises(UserError) as raised:
        read_plan(config_file(**changes))
    [problem] = raised.value.problems
    assert what in problem.what
    assert problem.fix


def test_clips_may_keep_their_rate(config_file):
    plan = read_plan(config_file(fps="keep"))
    assert plan.config.data.fps == "keep"
    assert plan.fps == plan.variant.fps
    assert "at their own rate" in dict(summarize(plan))["clips"]


def test_options_give_datasets_too():
    assert option_value("train_data", "my,clips") == "my,clips"
    assert option_value("train_data", "123") == "123"
    assert option_value("train_data", '[{"path": "a"}]') == [{"path": "a"}]
    assert option_value("aspect_buckets", "[[64, 96]]") == [[64, 96]]
    assert option_value("aspect_buckets", "true") is True
    assert option_value("frame_buckets", "17,33") == [17, 33]
    assert option_value("frame_buckets", "17") == [17]
    assert option_value("frame_buckets", "auto") == "auto"
    assert option_value("fps", "keep") == "keep"
    assert option_value("fps", "24") == 24
