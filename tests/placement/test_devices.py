"""The device that a command takes, and how its libraries are set."""

import os
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from crepatrain.commands.cache import cache
from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.placement import devices

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class _Notes(Screen):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch):
    for name in (*_NAMES, "ACCELERATE_USE_CPU", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that what a test sets is undone
        monkeypatch.delenv(name)
    yield
    torch.backends.cudnn.benchmark = False


def see(monkeypatch: pytest.MonkeyPatch, *, cuda: bool = False, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize("command", [fit, cache])
def test_the_gpu_of_a_mac_is_refused_in_words(monkeypatch, config_file, command):
    see(monkeypatch, mps=True)
    with pytest.raises(UserError, match=r"Apple's \(MPS\).*needs CUDA"):
        command(read_plan(config_file()), Screen(quiet=True))


def test_a_mac_computes_on_its_cpu_where_that_is_asked_for(monkeypatch):
    see(monkeypatch, mps=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert devices.open_device(Screen(quiet=True)).type == "cpu"


def test_without_a_gpu_it_is_the_cpu_and_nothing_is_set(monkeypatch):
    see(monkeypatch)
    screen = _Notes()
    assert devices.open_device(screen).type == "cpu"
    assert not screen.notes
    assert not any(name in os.environ for name in _NAMES)


def test_on_cuda_the_allocator_is_set_once_and_said(monkeypatch):
    see(monkeypatch, cuda=True)
    torch.backends.cudnn.benchmark = True
    screen = _Notes()
    for _ in range(2):
        assert devices.open_device(screen).type == "cuda"
    assert len(screen.notes) == 1
    assert "expandable_segments:True" in screen.notes[0]
    assert {os.environ[name] for name in _NAMES} == {"expandable_segments:True"}
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("name", _NAMES)
def test_an_allocator_that_the_user_has_set_stays(monkeypatch, name):
    see(monkeypatch, cuda=True)
    monkeypatch.setenv(name, "max_split_size_mb:128")
    screen = _Notes()
    devices.open_device(screen)
    assert not screen.notes
    assert {key: os.environ.get(key) for key in _NAMES if key in os.environ} == {name: "max_split_size_mb:128"}


def test_what_is_compiled_is_kept_beside_the_caches(monkeypatch, tmp_path: Path):
    devices.keep_compiled(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch's own imports leave it
    devices.keep_compiled(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    devices.keep_compiled(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
