"""Every key of a config has a field, and a text in it means what it means on the command line."""

import json
from pathlib import Path

import pytest

from crepatrain.config.load import parse_options
from crepatrain.config.run_config import KEYS, RunConfig
from crepatrain.web.fields import UNSET, fields, off_default
from crepatrain.web.steps import CREPA_PRESETS, STEPS

ROOT = Path(__file__).parents[2]


def test_every_key_stands_in_one_step():
    keys = [key for step in STEPS for group in step.groups for key in group.keys]
    assert sorted(keys) == sorted(KEYS)


def test_a_field_says_what_the_schema_says():
    for key, described in RunConfig.model_json_schema()["properties"].items():
        if key in KEYS:
            field = fields()[key]
            assert field.description == described["description"]
            assert field.default == described.get("default")
            assert field.required == KEYS[key].field.is_required()


def test_kinds_follow_the_schema():
    kinds = {key: field.kind for key, field in fields().items()}
    assert kinds["crepa_enabled"] == "switch"
    assert kinds["crepa_lambda"] == kinds["lora_targets"] == kinds["crepa_encoder_image_size"] == "text"
    assert kinds["validation_prompts"] == kinds["allow_changes"] == "lines"
    assert kinds["report_to"] == "choices"
    assert fields()["gradient_checkpointing"].choices.keys() == {True, False, "selective"}
    assert fields()["task"].choices.keys() == {UNSET, "t2v", "i2v"}


@pytest.mark.parametrize(
    ("key", "words"),
    [("crepa_lambda", "0 or more"), ("crepa_adjacent_tau", "above 0"), ("eval_share", "0 to 0.5"), ("caption_prefix", "")],
)
def test_a_range_is_said_in_words(key, words):
    assert fields()[key].range == words


def test_two_fields_of_a_step_have_different_names():
    for step in STEPS:
        labels = [fields()[key].label for key in step.keys]
        assert len(set(labels)) == len(labels), step.title


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("crepa_lambda", "0.25"),
        ("learning_rate", "1e-3"),
        ("crepa_encoder_image_size", "grid"),
        ("checkpoints_total_limit", "null"),
        ("lora_targets", "to_q, to_k"),
        ("lora_targets", "all-linear"),
        ("hub_model_id", "123"),
        ("crepa_block_index", "no number"),
    ],
)
def test_a_text_means_what_it_means_on_the_command_line(key, text):
    problems = []
    assert fields()[key].value_of(text) == parse_options([f"--{key}", text], problems)[key]
    assert not problems


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_a_shown_value_is_read_back_as_itself(path):
    for key, value in json.loads(path.read_text()).items():
        if fields()[key].kind in {"text", "lines"}:
            assert fields()[key].value_of(fields()[key].shown(value)) == value


def test_of_a_runs_config_only_what_was_chosen_is_taken_over():
    values = {key: info.field.default for key, info in KEYS.items()} | {"config_version": 1, "crepa_lambda": 0.3}
    assert off_default(values | {"report_to": ["tensorboard"], "allow_changes": []}).keys() - {
        key for key, info in KEYS.items() if info.field.is_required()
    } == {"crepa_lambda"}


@pytest.mark.parametrize(
    ("preset", "config"),
    [
        ("Text-to-video", "wan2.1-1.3b-t2v"),
        ("Image-to-video", "wan2.1-14b-i2v"),
        ("Solid background", "wan2.1-1.3b-t2v-solid-background"),
    ],
)
def test_a_preset_is_what_the_shipped_config_has(preset, config):
    shipped = json.loads((ROOT / "configs" / f"{config}.json").read_text())
    of_crepa = {key: value for key, value in shipped.items() if key.startswith("crepa_") and "encoder" not in key}
    assert CREPA_PRESETS[preset] == of_crepa
