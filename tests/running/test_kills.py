"""Five kills of the real command, each at a random instant of another stage, with the code of benchmarks/kill.py."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

STAGES = ("caching", "stepping", "exporting", "saving", "validating")


@pytest.fixture(scope="module")
def kill() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "kill.py"
    specification = importlib.util.spec_from_file_location("kill", path)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules["kill"] = module  # where dataclasses look for what a class's annotations name
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_same_command_ends_a_run_that_was_killed_with_the_result_of_one_that_was_not(
    kill: ModuleType, wan: Path, clips: Path, tmp_path: Path
):
    setting = kill.Setting.prepare(tmp_path / "setting", "lora", wan, clips, dataloader_num_workers=1)
    lines = [setting.kill(stage, random.Random(), number) for number, stage in enumerate(STAGES)]
    assert [line for line in lines if line["differences"]] == []
    file = next((tmp_path / "setting" / "run" / "adapters").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert setting.differences() == [f"adapters/{file.name}: other tensors"]
