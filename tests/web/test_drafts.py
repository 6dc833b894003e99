"""A config that is being written: kept, checked, and as the command line would have it."""

import json
from pathlib import Path

import pytest

from crepatrain.alignment.schedule import CrepaSchedule
from crepatrain.config.plan import read_plan
from crepatrain.config.summary import summarize
from crepatrain.errors import UserError
from crepatrain.web.confinement import Folders
from crepatrain.web.drafts import Draft


@pytest.fixture
def folders(tmp_path: Path, wan: Path, clips: Path, values) -> Folders:
    (tmp_path / "runs").mkdir()
    return Folders(tmp_path / "runs", (wan, clips, Path(values["cache_dir"])))


@pytest.fixture
def draft(folders: Folders, values) -> Draft:
    draft = Draft(folders)
    draft.replace(values | {"output_dir": str(folders.runs / "run")})
    return draft


def test_it_says_what_validate_config_says(draft, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(draft.text())
    plan = read_plan(path)
    checked = draft.check()
    assert checked.problems == ()
    assert checked.plan == plan
    assert list(checked.summary) == summarize(plan)
    assert checked.maximum == pytest.approx(1.491, abs=1e-3)


def test_it_is_there_again_after_a_restart(draft, folders):
    draft.write("crepa_lambda", "0.25")
    assert Draft(folders).values == draft.values


def test_a_default_is_not_written(draft):
    before = dict(draft.values)
    draft.write("crepa_lambda", "0.25")
    draft.write("crepa_lambda", "0.5")
    draft.write("lora_alpha", "8")
    draft.write("lora_alpha", "")
    draft.choose("compile", value=False)
    assert draft.values == before


def test_null_is_another_value_than_nothing(draft):
    draft.write("checkpoints_total_limit", "null")
    assert draft.values["checkpoints_total_limit"] is None
    assert draft.shown("checkpoints_total_limit") == "null"
    draft.write("checkpoints_total_limit", "")
    assert "checkpoints_total_limit" not in draft.values
    assert draft.shown("checkpoints_total_limit") == "3"


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("crepa_block_index", "99", "crepa_block_index=99"),
        ("crepa_block_index", "no number", "wrong type"),
        ("crepa_lambda", "-1", "out of range"),
        ("train_data", "", "train_data is missing"),
        ("crepa_similarity_threshold", "5", "crepa_similarity_threshold=5"),
    ],
)
def test_a_problem_stands_beside_its_field(draft, key, text, words):
    draft.write(key, text)
    [problem] = draft.check().of(key)
    assert words in problem.what


def test_what_the_score_can_reach_is_known_before_the_rest(draft):
    for key in ("output_dir", "train_data", "max_train_steps"):
        draft.values.pop(key)
    checked = draft.check()
    assert checked.problems
    assert checked.maximum == pytest.approx(1.491, abs=1e-3)


def test_the_drawn_weight_is_that_of_training(draft):
    draft.replace(
        draft.values | {"max_train_steps": 100, "crepa_scheduler": "cosine", "crepa_warmup_steps": 10, "crepa_lambda_end": 0.1}
    )
    steps, weights = draft.weights()
    schedule = CrepaSchedule(scheduler="cosine", warmup_steps=10, lambda_end=0.1, max_train_steps=100)
    assert steps == list(range(100))
    assert weights == [schedule.weight(step) for step in steps]


def test_no_weight_is_drawn_where_there_is_none(draft):
    draft.write("crepa_lambda", "much")
    assert draft.weights() is None
    draft.preset("Off")
    assert draft.weights() is None


def test_a_preset_leaves_block_and_teacher(draft):
    draft.write("crepa_block_index", "2")
    draft.write("crepa_cutoff_step", "7")
    draft.preset("Text-to-video")
    assert draft.values["crepa_block_index"] == 2
    assert draft.values["crepa_encoder_image_size"] == "grid"
    assert draft.values["crepa_similarity_threshold"] == 0.85
    assert "crepa_cutoff_step" not in draft.values


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"no_such_key": 1, "": {}, "crepa_lambda": float("nan")},
        {"train_data": 5, "output_dir": ["a"], "validation_prompts": "one", "report_to": [["x"]]},
        {"model_family": "<script>", "pretrained_model_name_or_path": "\ud800", "output_dir": "runs/\ud800"},
        {"crepa_enabled": "yes", "height": 10**30, "lora_targets": "(", "train_data": "a" * 5000, "output_dir": "\0"},
        {"train_data": "~nobody-of-that-name/x", "crepa_encoder": "", "resume_from_checkpoint": "../../etc"},
    ],
)
def test_no_config_takes_the_page_down(folders, written):
    draft = Draft(folders)
    draft.replace(written)
    assert draft.check().problems
    draft.weights()
    draft.text().encode()
    for key in ("train_data", "output_dir"):
        draft.path(key)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"a": 1, "a": 2}', "x" * 300_000])
def test_what_is_no_config_is_not_opened(draft, text):
    before = dict(draft.values)
    with pytest.raises(UserError):
        draft.read_text(text)
    assert draft.values == before


def test_a_runs_config_is_opened_without_its_defaults(draft, folders, tmp_path):
    file = folders.runs / "config.json"
    file.write_text(json.dumps(draft.check().plan.config.as_file()))
    draft.open(file)
    assert "config_version" not in draft.values
    assert "crepa_lambda" not in draft.values
    assert draft.check().problems == ()
