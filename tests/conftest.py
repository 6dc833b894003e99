"""A tiny real checkpoint, real clips, and a config that trains on them in seconds."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from common import PROMPTS, render_clip, render_image, tiny_values

# A comparison in a module of helpers explains what differs, as one in a test does.
pytest.register_assert_rewrite("runs")


def pytest_configure() -> None:
    """Commands that the tests begin hear every signal, though whoever began the tests may ignore some, as nohup does."""
    for name in ("SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A run that was asked to stop ignores some signals until its process ends, which here it does not."""
    numbers = [getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGINT", "SIGTERM") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_apart(tmp_path_factory: pytest.TempPathFactory):
    """No test reads or writes the user's own caches, and none reaches for the network."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("xdg"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Two processes test at once; with more threads than cores the tiny models spend their time waiting for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives a tiny random pipeline folder of a family and variant, with `encoder/` beside its parts; not to be changed."""
    from crepatrain.families import family_class
    from crepatrain.families.random import write_random_pipeline

    root = tmp_path_factory.mktemp("checkpoints")

    def folder(family: str = "wan", size: str = "tiny") -> Path:
        path = root / f"{family}-{size}"
        if not path.exists():
            write_random_pipeline(family_class(family), path, family_class(family).tiny[size])
        return path

    return folder


@pytest.fixture(scope="session")
def wan(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A tiny random Wan pipeline folder with `encoder/` beside its parts."""
    return tiny_checkpoint("wan", "tiny")


@pytest.fixture(scope="session")
def clips_and_images(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips and two captioned images."""
    folder = Path(shutil.copytree(clips, tmp_path_factory.mktemp("mixed") / "mixed"))
    for index, suffix in enumerate((".png", ".jpg")):
        render_image(folder / f"image-{index}{suffix}", seed=index)
        (folder / f"image-{index}.txt").write_text(f"coloured blocks, number {index}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short captioned clips."""
    folder = tmp_path_factory.mktemp("clips")
    for index in range(3):
        render_clip(folder / f"clip-{index}.mp4", seed=index)
        (folder / f"clip-{index}.txt").write_text(f"a square moves, number {index}\n", encoding="utf-8")
    return folder


@pytest.fixture
def values(wan: Path, clips: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of `tiny_values`."""
    return tiny_values(wan, clips, tmp_path / "run", tmp_path_factory)


@pytest.fixture
def config_file(tmp_path: Path, values: dict[str, Any]) -> Callable[..., Path]:
    """Writes the config with changes; a key changed to `...` is left out."""

    def write(**changes: Any) -> Path:
        merged = {key: value for key, value in (values | changes).items() if value is not ...}
        path = tmp_path / "config.json"
        path.write_text(json.dumps(merged), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, wan: Path, clips: Path) -> Path:
    """A run of the tiny Wan with two adapters, a base that it does change, videos on the way and clips held out."""
    from crepatrain.commands.fit import fit
    from crepatrain.config.plan import read_plan
    from crepatrain.console import Screen

    root = tmp_path_factory.mktemp("trained")
    held_out = root / "held-out"
    held_out.mkdir()
    render_clip(held_out / "other.mp4", seed=77)
    (held_out / "other.txt").write_text("something else\n", encoding="utf-8")
    values = tiny_values(wan, clips, root / "run", tmp_path_factory) | {
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 1,
        "learning_rate": 0.05,
        "validation_prompts": PROMPTS,
        "validation_steps": 2,
        "validation_sampling_steps": 2,
        "eval_data": str(held_out),
    }
    path = root / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    fit(read_plan(path), Screen(quiet=True))
    return root / "run"


@pytest.fixture(scope="session")
def foreign() -> Callable[..., Any]:
    """Adapters of every Linear of a tiny model's blocks, by family and size."""
    from foreign_adapters import Foreign

    made: dict[tuple[str, str | None], Foreign] = {}

    def of(family: str, size: str | None = None) -> Any:
        return made.setdefault((family, size), Foreign(family, size))

    return of


@pytest.fixture
def fake_run(config_file: Callable[..., Path], tiny_checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """Makes a run's folder of random weights."""
    from written_adapters import FakeRun

    from crepatrain.config.plan import read_plan

    def make(family: str = "wan", size: str = "tiny", **changes: Any) -> Any:
        sizes = {"num_frames": 9, "height": 128, "width": 192} if family != "wan" else {}
        path = config_file(
            model_family=family,
            pretrained_model_name_or_path=str(tiny_checkpoint(family, size)),
            **sizes,
            **changes,
        )
        return FakeRun(read_plan(path))

    return make
