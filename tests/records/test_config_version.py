"""A run's config.json has a version: an earlier folder goes on, a newer one is refused, an unknown key is a difference."""

import json

import pytest

from crepatrain.config.migrations import CONFIG_VERSION
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.records.opening import config_of
from crepatrain.records.reading import read_run
from crepatrain.records.runfolder import RunFolder


@pytest.fixture
def begun(config_file):
    """The config of a run that has made a step, and its folder."""
    config = read_plan(config_file()).config
    with RunFolder(config) as folder:
        folder.inspect()
        folder.claim(0)
        folder.log({"step": 1, "loss": 1.0})
    return config, folder.root


def rewrite(root, **changes) -> None:
    path = root / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}), encoding="utf-8")


def look(config) -> None:
    with RunFolder(config) as folder:
        folder.inspect()


def test_a_run_writes_the_version_of_its_keys(begun):
    config, root = begun
    written = json.loads((root / "config.json").read_text(encoding="utf-8"))
    assert written == {"config_version": CONFIG_VERSION} | config.model_dump()
    assert config_of(root, Screen(quiet=True)) == config
    assert read_run(root).config == config.model_dump()


def test_a_folder_from_before_the_version_goes_on(begun):
    config, root = begun
    rewrite(root, config_version=...)
    look(config)
    assert config_of(root, Screen(quiet=True)) == config


def test_a_folder_of_a_newer_version_is_refused(begun):
    config, root = begun
    rewrite(root, config_version=CONFIG_VERSION + 1)
    for read in (lambda: look(config), lambda: config_of(root, Screen(quiet=True)), lambda: read_run(root)):
        with pytest.raises(UserError, match=rf"(?s)is of config_version {CONFIG_VERSION + 1}.*upgrade crepatrain"):
            read()


def test_a_key_that_is_not_known_is_a_difference_for_a_resume_and_none_for_the_rest(begun):
    config, root = begun
    rewrite(root, later_key=1)
    with pytest.raises(UserError, match="later_key"):
        look(config)
    assert config_of(root, Screen(quiet=True)) == config
