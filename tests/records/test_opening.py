"""A run that another version has written: its result is read, and what is not understood is named."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from crepatrain import cli
from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.records.opening import config_of
from crepatrain.records.runfolder import RunFolder

NOTE = "config.json: a_key_of_the_future, another: unknown to this version of crepatrain"


@pytest.fixture
def future(config_file: Callable[..., Path], tmp_path: Path) -> Path:
    """A trained run whose config has keys that this version does not know."""
    fit(read_plan(config_file(max_train_steps=1)), Screen(quiet=True))
    file = tmp_path / "run" / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({"a_key_of_the_future": 1} | values | {"another": ["a", "b"]}), encoding="utf-8")
    return tmp_path / "run"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command as from a shell, and gives what it printed, with whitespace folded."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["crepatrain", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return " ".join(printed.out.split())

    return run


def test_a_run_with_unknown_keys_is_exported_and_shown(future: Path, command: Callable[..., str], tmp_path: Path):
    out = tmp_path / "adapter.safetensors"
    assert NOTE in command("export", future, "--output", out)
    tensors, expected = load_file(out), load_file(future / "pytorch_lora_weights.safetensors")
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].equal(expected[name]) for name in tensors)
    assert NOTE in command("report", future)
    assert command("report", future, "--map").count(NOTE) == 1
    text = (future / "report.html").read_text(encoding="utf-8")
    assert "<code>a_key_of_the_future</code>" in text
    assert "<code>unknown to this version</code>" in text
    assert "Alignment map" in text


def test_a_run_with_unknown_keys_does_not_go_on(future: Path, config_file: Callable[..., Path]):
    with (
        RunFolder(read_plan(config_file(max_train_steps=2)).config) as folder,
        pytest.raises(UserError, match=r"holds a different run \(a_key_of_the_future: 1 there, null here; another: "),
    ):
        folder.inspect()


@pytest.mark.parametrize("content", ["[]", "5", "{", "null", json.dumps({"model_family": "wan", "unknown": 1}), "[" * 100_000])
def test_what_is_no_config_is_refused(tmp_path: Path, content: Any):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json(: Input| can't be read) .*\n.*give (another folder|the folder of a run)"):
        config_of(tmp_path, Screen(quiet=True))
