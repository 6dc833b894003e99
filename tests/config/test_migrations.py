"""Config files of other versions: earlier ones are read as the newest, newer ones are refused, a run's unknown keys are named."""

import json

import pytest

from crepatrain.config.load import read_run_config, read_values
from crepatrain.config.migrations import CONFIG_VERSION, MIGRATIONS, migrate
from crepatrain.config.plan import read_plan
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.errors import UserError


def renamed(values: dict) -> dict:
    return {{"lr": "learning_rate"}.get(key, key): value for key, value in values.items()}


def doubled(values: dict) -> dict:
    return values | {"learning_rate": 2 * values["learning_rate"]}


TABLE = {1: renamed, 2: doubled}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lr": 1}, {"learning_rate": 2}),
        ({"config_version": 1, "lr": 1}, {"learning_rate": 2}),
        ({"config_version": 2, "learning_rate": 1}, {"learning_rate": 2}),
        ({"config_version": 3, "learning_rate": 1}, {"learning_rate": 1}),
    ],
)
def test_a_file_of_every_version_is_read_as_the_newest(values, expected):
    before = dict(values)
    assert migrate(values, "config", TABLE) == expected
    assert values == before


def test_every_version_leads_to_the_newest():
    assert list(MIGRATIONS) == list(range(1, CONFIG_VERSION))


def test_a_file_of_a_newer_version_is_refused():
    with pytest.raises(UserError) as caught:
        migrate({"config_version": 9}, "config a.json", TABLE)
    [problem] = caught.value.problems
    assert problem.what == "config a.json is of config_version 9, and this crepatrain reads versions up to 3"
    assert problem.fix == "upgrade crepatrain"


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.0, None])
def test_a_version_that_is_none_is_refused(version):
    with pytest.raises(UserError, match=r"(?s)a\.json: config_version=.* is not a version.*whole number from 1 to"):
        migrate({"config_version": version}, "a.json")


def test_the_config_that_a_run_writes_is_a_config_again(config_file, tmp_path):
    plan = read_plan(config_file())
    written = plan.config.as_file()
    assert next(iter(written.items())) == ("config_version", CONFIG_VERSION)
    path = tmp_path / "written.json"
    path.write_text(json.dumps(written), encoding="utf-8")
    assert "config_version" not in read_values(path, (), [])
    assert read_plan(path).config == plan.config
    assert read_run_config(written, path) == (plan.config, ())


def test_a_newer_file_is_refused_with_its_name(config_file, tmp_path):
    path = config_file(config_version=CONFIG_VERSION + 1)
    with pytest.raises(UserError, match=rf"config {path} is of config_version {CONFIG_VERSION + 1}"):
        read_plan(path)


def test_keys_of_a_run_that_are_not_known_are_set_aside_by_name(config_file):
    written = read_plan(config_file()).config.model_dump()
    config, unknown = read_run_config(written | {"later_key": 1, "another": None}, "run/config.json")
    assert unknown == ("later_key", "another")
    assert isinstance(config, ResolvedConfig)
    assert config.model_dump() == written


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": "x"}, r'run/config.json can.t be read \(seed="x": wrong type\)\n.*the folder of a run'),
        ({"height": 3}, r"run/config.json can't be read \(height=3: out of range\)"),
        ({"task": None}, r"run/config.json can't be read \(task=null"),
        ({"config_version": 99}, r"run/config.json is of config_version 99"),
    ],
)
def test_a_damaged_config_of_a_run_is_refused(config_file, changes, words):
    written = read_plan(config_file()).config.model_dump()
    with pytest.raises(UserError, match=words):
        read_run_config(written | changes, "run/config.json")


def test_a_config_of_a_run_that_is_no_object_is_refused():
    with pytest.raises(UserError, match=r"run/config.json can't be read \(it holds a list\)"):
        read_run_config([], "run/config.json")
