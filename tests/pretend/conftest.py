"""Gives commands on the pretend device to the tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from building import compiled, why_not

HERE = Path(__file__).parent
Asked = list[dict[str, Any]]


@pytest.fixture(scope="session")
def library(request: pytest.FixtureRequest) -> Path:
    """The pretend device, compiled; skips the test where it can't be."""
    if reason := why_not():
        pytest.skip(reason)
    return compiled(Path(request.config.cache.mkdir("pretend")))


@pytest.fixture
def on_cuda(library: Path, tmp_path: Path) -> Callable[[Asked], list[dict[str, Any]]]:
    """Runs commands in one process that has the device, and gives what each did."""

    def run(asked: Asked) -> list[dict[str, Any]]:
        asks, results = tmp_path / "asked.json", tmp_path / "results.json"
        asks.write_text(json.dumps(asked), encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, str(HERE / "commands.py"), str(library), str(asks), str(results)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(results.read_text(encoding="utf-8"))

    return run


@pytest.fixture
def inside(library: Path, tmp_path: Path) -> Callable[[str], str]:
    """Runs Python code that has `device` and torch, and gives what it prints."""

    def run(code: str) -> str:
        path = tmp_path / "inside.py"
        first = f"from pathlib import Path\nfrom device import install\ndevice = install(Path({str(library)!r}))\nimport torch\n"
        path.write_text(first + code, encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": str(HERE)}
        done = subprocess.run(
            [sys.executable, str(path)], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
