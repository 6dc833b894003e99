"""Plans of the tiny checkpoints."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crepatrain.config.plan import Plan, read_plan
from crepatrain.errors import Problem, UserError


@pytest.fixture
def plan(config_file) -> Callable[..., Plan]:
    return lambda **changes: read_plan(config_file(**changes), online=False)


@pytest.fixture
def problems(config_file) -> Callable[..., list[Problem]]:
    def read(*options: str, **changes: Any) -> list[Problem]:
        with pytest.raises(UserError) as caught:
            read_plan(config_file(**changes), options, online=False)
        return caught.value.problems

    return read


@pytest.fixture
def copied(tiny_checkpoint, tmp_path) -> Callable[..., Path]:
    """Gives a copy of a tiny checkpoint, to be spoilt; its files are links."""

    def copy(*which: str) -> Path:
        return Path(
            shutil.copytree(tiny_checkpoint(*which), tmp_path / "spoilt", copy_function=lambda a, b: Path(b).symlink_to(a))
        )

    return copy


@pytest.fixture
def checkpoint(copied) -> Path:
    """A copy of the tiny Wan, to be spoilt."""
    return copied("wan", "tiny")


@pytest.fixture
def tiny(tiny_checkpoint) -> Callable[..., dict[str, str]]:
    """The keys of a config that name a tiny checkpoint."""
    return lambda family, size="tiny": {
        "model_family": family,
        "pretrained_model_name_or_path": str(tiny_checkpoint(family, size)),
    }
