"""Whole runs of the tiny Wan, from clips to an adapter."""

import errno
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import render_image, tiny_family
from crepatrain.commands.runfolder import RunFolder
from crepatrain.commands.session import save
from crepatrain.commands.stopping import Stopped
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crepatrain import cli, files
from crepatrain.commands import fit as command
from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.errors import DivergedError, UserError
from crepatrain.tensors import Batch
from crepatrain.training.checkpoint import checkpoints, step_of
from crepatrain.training.step import training_loss

Write = Callable[..., Path]

KEYS = {
    "step",
    "loss",
    "diffusion_loss",
    "crepa_loss",
    "crepa_alignment_score",
    "crepa_similarity_self",
    "crepa_weight",
    "crepa_cutoff",
    "crepa_alignment_score_ema",
    "learning_rate",
    "grad_norm",
    "sigma_loss",
    "step_seconds",
    "data_seconds",
    "forward_seconds",
    "crepa_seconds",
    "backward_seconds",
    "optimizer_seconds",
    "samples_per_second",
    "peak_memory_gib",
}
TIMES = {key for key in KEYS if key.endswith("_seconds")} | {"samples_per_second", "peak_memory_gib"}
MEASURED = ("crepa_loss", "crepa_alignment_score", "crepa_similarity_self")
ADAPTER = "pytorch_lora_weights.safetensors"
# What could break a resume: dropout of captions and adapter, a warm-up, an EMA, several buckets of randomness.
RESTLESS = {
    "lora_dropout": 0.2,
    "caption_dropout": 0.5,
    "crepa_warmup_steps": 2,
    "lr_warmup_steps": 4,
    "crepa_similarity_threshold": 1.2,
    "crepa_similarity_ema_decay": 0.9,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The modules are tiny: several threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Watching(Screen):
    """A quiet screen that calls back after every optimizer step."""

    def __init__(self, after_step: Callable[[int], None]) -> None:
        super().__init__(quiet=True)
        self.after_step = after_step

    @contextmanager
    def training(self, done: int, total: int):
        with super().training(done, total) as view:
            shown = view.step

            def step(done: int, seconds: float) -> None:
                shown(done, seconds)
                self.after_step(done)

            view.step = step
            yield view


def nothing(_step: int) -> None:
    pass


def train(write: Write, *, after_step: Callable[[int], None] = nothing, **changes: Any) -> Path:
    plan = read_plan(write(**changes))
    fit(plan, Watching(after_step))
    return Path(plan.config.output_dir)


def interrupted(write: Write, *, at: int, **changes: Any) -> Path:
    """A run that gets a SIGINT during the step after `at`."""

    def interrupt(step: int) -> None:
        if step == at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped):
        train(write, after_step=interrupt, **changes)
    return Path(read_plan(write(**changes)).config.output_dir)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines(folder)]


@contextmanager
def watched_batches() -> Iterator[list[Batch]]:
    """Every micro-batch that is trained on."""
    seen: list[Batch] = []
    loss = command.training_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "training_loss", lambda *args: seen.append(args[4]) or loss(*args))
        yield seen


def of(folder: Path) -> dict[str, str]:
    """The keys that name a checkpoint made by `tiny_checkpoint`."""
    return {"model_family": folder.name.partition("-")[0], "pretrained_model_name_or_path": str(folder)}


def column(folder: Path, key: str) -> list[Any]:
    return [line[key] for line in lines(folder)]


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text(encoding="utf-8"))


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / ADAPTER)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


def expect_same_run(left: Path, right: Path) -> None:
    """Every number and every tensor, to the bit."""
    assert timeless(left) == timeless(right)
    assert same_tensors(adapter(left), adapter(right))
    last = [max(names(folder / "checkpoints")) for folder in (left, right)]
    assert last[0] == last[1]
    for file in ("adapter", "projector", "transformer_learner", "projector_learner"):
        tensors = [load_file(folder / "checkpoints" / last[0] / f"{file}.safetensors") for folder in (left, right)]
        assert same_tensors(*tensors), file
    states = [(folder / "checkpoints" / last[0] / "state.json").read_text(encoding="utf-8") for folder in (left, right)]
    assert states[0] == states[1]


def alive(*kinds: str) -> list[Any]:
    """The instances of these classes that are in memory."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing).__name__ in kinds]


def kinds_of(things: list[Any], *, but: set[int]) -> set[str]:
    return {type(thing).__name__ for thing in things if id(thing) not in but}


# What a run writes


@pytest.fixture(scope="module")
def finished(wan: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps on all clips at once."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("finished")
    config = {
        "model_family": "wan",
        "pretrained_model_name_or_path": str(wan),
        "train_data": str(clips),
        "output_dir": str(root / "run"),
        "output_name": "squares",
        "cache_dir": str(root / "cache"),
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "max_train_steps": 12,
        "checkpointing_steps": 5,
        "mixed_precision": "no",
        "dataloader_num_workers": 0,
        "train_batch_size": 3,
        "lora_rank": 4,
        "learning_rate": 5e-3,
        "crepa_enabled": True,
        "crepa_encoder": str(wan / "encoder"),
        "crepa_encoder_image_size": "grid",
    }
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    fit(read_plan(root / "config.json"), Screen(quiet=True))
    torch.set_num_threads(before)
    return root / "run"


def test_every_line_has_every_key_and_adds_up(finished: Path):
    assert column(finished, "step") == list(range(1, 13))
    for line in lines(finished):
        assert set(line) == KEYS
        assert line["peak_memory_gib"] is None
        numbers = [value for key, value in line.items() if key not in {"peak_memory_gib", "crepa_cutoff", "sigma_loss"}]
        assert all(math.isfinite(number) for number in numbers)
        assert line["loss"] == pytest.approx(line["diffusion_loss"] + line["crepa_loss"], abs=1e-6)
        assert line["crepa_loss"] == pytest.approx(-line["crepa_weight"] * line["crepa_alignment_score"], abs=1e-6)
        assert line["crepa_weight"] == 0.5
        assert line["crepa_cutoff"] is False
        assert line["learning_rate"] == 5e-3
        assert line["step_seconds"] > 0
        assert line["samples_per_second"] == pytest.approx(3 / line["step_seconds"])
    assert "NaN" not in (finished / "metrics.jsonl").read_text(encoding="utf-8")


def test_the_ema_is_that_of_the_scores(finished: Path):
    scores = column(finished, "crepa_alignment_score")
    ema = scores[0]
    for score, logged in zip(scores, column(finished, "crepa_alignment_score_ema"), strict=True):
        ema = 0.99 * ema + 0.01 * score if logged != scores[0] else ema
        assert logged == pytest.approx(ema)


def test_self_similarity_rises(finished: Path):
    for key in ("crepa_similarity_self", "crepa_alignment_score"):
        values = column(finished, key)
        assert sum(values[-4:]) / 4 > sum(values[:4]) / 4 + 0.02


def test_the_folder_is_laid_out_as_designed(finished: Path):
    files = ["config.json", "dataset.json", "metrics.jsonl", ADAPTER, "report.html", "status.json"]
    assert names(finished) == sorted([".lock", "adapters", "checkpoints", "tensorboard", *files])
    assert names(finished / "checkpoints") == ["step-000005", "step-000010", "step-000012"]
    assert names(finished / "adapters") == [f"squares-{step:06d}.safetensors" for step in (5, 10, 12)]
    inside = names(finished / "checkpoints" / "step-000012")
    for name in ("adapter.safetensors", "projector.safetensors", "state.json", "fingerprint.json"):
        assert name in inside
    assert status(finished)["status"] == "completed"
    assert status(finished)["step"] == 12
    config = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    assert config["fps"] == 16.0
    assert config["crepa_block_index"] == 8
    assert config["lora_alpha"] == 4.0
    assert config["crepa_adjacent_tau"] == 1.0


def test_the_exported_adapter_is_the_last_and_holds_no_projector(finished: Path):
    last = adapter(finished)
    assert same_tensors(last, load_file(finished / "adapters" / "squares-000012.safetensors"))
    assert not same_tensors(last, load_file(finished / "adapters" / "squares-000005.safetensors"))
    assert all(name.startswith("diffusion_model.blocks.") and ".lora_" in name for name in last)
    assert any(tensor.abs().max() > 0 for name, tensor in last.items() if "lora_B" in name)
    assert {tensor.dtype for tensor in last.values()} == {torch.float32}


def test_a_complete_run_is_left_alone(config_file: Write):
    folder = train(config_file, max_train_steps=1)
    before = snapshot(folder)
    train(config_file, max_train_steps=1)
    assert snapshot(folder) == before


# Going on


def test_a_run_in_two_parts_is_the_run_in_one(config_file: Write, tmp_path: Path):
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=6, checkpointing_steps=3, **RESTLESS)
    parts = train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=3, checkpointing_steps=3, **RESTLESS)
    assert column(parts, "step") == [1, 2, 3]
    train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=6, checkpointing_steps=3, **RESTLESS)
    assert column(parts, "step") == [1, 2, 3, 4, 5, 6]
    expect_same_run(whole, parts)


def test_a_stopped_run_is_saved_and_goes_on_to_the_bit(config_file: Write, tmp_path: Path):
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=5, **RESTLESS)
    parts = interrupted(config_file, at=2, output_dir=str(tmp_path / "parts"), max_train_steps=5, **RESTLESS)
    assert status(parts)["status"] == "stopped"
    assert status(parts)["step"] == 3
    assert names(parts / "checkpoints") == ["step-000003"]
    assert names(parts / "adapters") == ["adapter-000003.safetensors"]
    assert (parts / ADAPTER).is_file()
    train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=5, **RESTLESS)
    assert status(parts)["status"] == "completed"
    expect_same_run(whole, parts)


def forget(folder: Path, *, after: int) -> None:
    """As if the machine had died: checkpoints behind a step never came to be, metrics went on."""
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > after:
            shutil.rmtree(checkpoint)
    (folder / "metrics.jsonl").open("a", encoding="utf-8").write('{"step": 99, "lo')


def test_a_run_that_died_repeats_no_line(config_file: Write, tmp_path: Path):
    changes = {"max_train_steps": 5, "checkpointing_steps": 2, **RESTLESS}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), **changes)
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    forget(parts, after=2)
    train(config_file, output_dir=str(parts), **changes)
    assert column(parts, "step") == [1, 2, 3, 4, 5]
    expect_same_run(whole, parts)


def test_a_run_that_died_within_a_logging_window_logs_the_whole_window(config_file: Write, tmp_path: Path):
    changes = {"max_train_steps": 6, "checkpointing_steps": 3, "logging_steps": 2}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), **changes)
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    forget(parts, after=3)
    train(config_file, output_dir=str(parts), **changes)
    assert column(parts, "step") == [2, 4, 6]
    expect_same_run(whole, parts)


def test_an_older_checkpoint_can_be_gone_on_from(config_file: Write, tmp_path: Path):
    """What came after it is forgotten, checkpoints too: a later `latest` must not jump to them."""
    changes = {"max_train_steps": 6, "checkpointing_steps": 2}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=8, checkpointing_steps=2)
    parts = train(config_file, output_dir=str(tmp_path / "parts"), **changes)
    interrupted(config_file, at=3, output_dir=str(parts), resume_from_checkpoint="step-000002", **changes)
    assert column(parts, "step") == [1, 2, 3, 4]
    train(config_file, output_dir=str(parts), max_train_steps=8, checkpointing_steps=2)
    assert column(parts, "step") == [1, 2, 3, 4, 5, 6, 7, 8]
    expect_same_run(whole, parts)


def test_a_checkpoint_that_is_not_there_is_told(config_file: Write):
    folder = train(config_file, max_train_steps=2, checkpointing_steps=1)
    before = snapshot(folder)
    with pytest.raises(UserError) as error:
        train(config_file, resume_from_checkpoint="step-000009")
    assert "step-000009" in str(error.value)
    assert "step-000001, step-000002" in str(error.value)
    with pytest.raises(UserError, match=r"resume_from_checkpoint is null"):
        train(config_file, resume_from_checkpoint=None)
    assert snapshot(folder) == before


def test_a_different_run_is_refused_with_its_differences(config_file: Write):
    folder = train(config_file, max_train_steps=1)
    before = snapshot(folder)
    with pytest.raises(UserError) as error:
        train(config_file, learning_rate=2e-3, crepa_lambda=0.25, max_train_steps=9)
    text = str(error.value)
    assert str(folder) in text
    assert "learning_rate: 0.001 there, 0.002 here" in text
    assert "crepa_lambda: 0.5 there, 0.25 here" in text
    assert "max_train_steps" not in text
    assert snapshot(folder) == before


def test_a_key_that_the_run_did_not_know_has_its_default(config_file: Write):
    folder = train(config_file, max_train_steps=1)
    before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({key: before[key] for key in before if key != "compile"}), encoding="utf-8")
    train(config_file, max_train_steps=2)
    assert column(folder, "step") == [1, 2]
    (folder / "config.json").write_text(json.dumps(before | {"a_key_of_the_future": 1}), encoding="utf-8")
    with pytest.raises(UserError, match="a_key_of_the_future: 1 there"):
        train(config_file, max_train_steps=3)


def test_the_same_things_elsewhere_are_the_same_run(config_file: Write, clips: Path, wan: Path, tmp_path: Path):
    folder = train(config_file, max_train_steps=1)
    shutil.copytree(clips, tmp_path / "moved clips")
    shutil.copytree(wan, tmp_path / "moved model")
    moved = {"train_data": "moved clips", "pretrained_model_name_or_path": "moved model", "crepa_encoder": "moved model/encoder"}
    train(config_file, max_train_steps=2, **{key: str(tmp_path / name) for key, name in moved.items()})
    assert column(folder, "step") == [1, 2]


def test_another_model_is_told_before_anything_is_computed(config_file: Write, wan: Path, tmp_path: Path):
    train(config_file, max_train_steps=1)
    other = tmp_path / "other"
    shutil.copytree(wan, other)
    for part in ("vae", "encoder"):
        (file,) = (other / part).glob("*.safetensors")
        save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    cache = tmp_path / "fresh"
    changes = {"pretrained_model_name_or_path": str(other), "crepa_encoder": str(other / "encoder"), "cache_dir": str(cache)}
    with pytest.raises(UserError, match="the weights of encoder, vae changed"):
        train(config_file, max_train_steps=2, **changes)
    assert not (cache / "latents").exists()


def test_a_target_that_is_no_layer_is_told_before_anything_is_computed(config_file: Write, tmp_path: Path):
    with pytest.raises(UserError, match="lora_targets: 'to_z'"):
        train(config_file, lora_targets=["to_z"], cache_dir=str(tmp_path / "fresh"))
    assert not (tmp_path / "fresh" / "latents").exists()
    assert not (tmp_path / "run").exists()


def test_a_longer_run_is_said_to_stretch_what_decays(config_file: Write, capsys: pytest.CaptureFixture[str]):
    train(config_file, max_train_steps=1)
    fit(read_plan(config_file(max_train_steps=2)), Screen())
    assert "the run was of 1 steps and is of 2 now" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup"])
def test_a_longer_run_follows_its_new_learning_rate_at_once(config_file: Write, tmp_path: Path, name: str):
    changes = {"lr_scheduler": name, "lr_warmup_steps": 1}
    parts = train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=2, **changes)
    train(config_file, output_dir=str(parts), max_train_steps=4, **changes)
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=4, **changes)
    assert column(parts, "learning_rate")[2:] == column(whole, "learning_rate")[2:]


def test_other_captions_are_a_different_run(config_file: Write, clips: Path, tmp_path: Path):
    own = tmp_path / "clips"
    shutil.copytree(clips, own)
    folder = train(config_file, train_data=str(own), max_train_steps=1)
    (own / "clip-1.txt").write_text("something else", encoding="utf-8")
    before = snapshot(folder)
    with pytest.raises(UserError, match=r"clips or captions changed"):
        train(config_file, train_data=str(own), max_train_steps=2)
    assert snapshot(folder) == before


def test_a_folder_of_something_else_is_refused(config_file: Write, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work", encoding="utf-8")
    before = snapshot(tmp_path / "run")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        train(config_file)
    assert snapshot(tmp_path / "run") == before


def test_a_mistake_before_the_first_step_does_not_claim_the_folder(config_file: Write, clips: Path, tmp_path: Path):
    own = tmp_path / "clips"
    shutil.copytree(clips, own)
    (own / "clip-1.txt").unlink()
    with pytest.raises(UserError, match=r"clip-1\.mp4: no caption"):
        train(config_file, train_data=str(own))
    with pytest.raises(UserError, match=r"num_frames=81 are needed"):
        train(config_file, train_data=str(own), missing_captions="skip", num_frames=81)
    folder = train(config_file, train_data=str(own), missing_captions="empty", max_train_steps=1)
    assert status(folder)["status"] == "completed"


# Processes that end for real


def start(config: Path, log: Path, *, start_new_session: bool = False) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "crepatrain", "fit", str(config)]
    with log.open("wb") as file:  # no pipe: the workers of a killed run hold it open for a while
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=start_new_session
        )


def wait_until(process: subprocess.Popen[bytes], happened: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 90
    while not happened():
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
        assert process.poll() is None, log.read_text(encoding="utf-8")
        time.sleep(0.01)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_process_that_is_ended_goes_on_to_the_bit(config_file: Write, tmp_path: Path, number: signal.Signals):
    changes = {"checkpointing_steps": 4, "dataloader_num_workers": 1, **RESTLESS}
    parts, log = tmp_path / "parts", tmp_path / "log"
    process = start(config_file(output_dir=str(parts), max_train_steps=100_000, **changes), log)
    wait_until(process, (parts / "checkpoints" / "step-000004").is_dir, log)
    time.sleep(0.1)
    process.send_signal(number)
    process.wait(timeout=60)
    output = log.read_text(encoding="utf-8")
    if number == signal.SIGINT:
        assert process.returncode == 3, output
        assert "stopped" in output
        assert "Traceback" not in output
        assert status(parts)["status"] == "stopped"
        done = status(parts)["step"]
        assert (parts / "checkpoints" / f"step-{done:06d}").is_dir()
        assert (parts / "adapters" / f"adapter-{done:06d}.safetensors").is_file()
        assert same_tensors(adapter(parts), load_file(parts / "adapters" / f"adapter-{done:06d}.safetensors"))
    else:
        assert process.returncode == -signal.SIGKILL
        assert status(parts)["status"] == "running"
    total = max(int(name.removeprefix("step-")) for name in names(parts / "checkpoints") if not name.endswith(".tmp")) + 7
    train(config_file, output_dir=str(parts), max_train_steps=total, **changes)
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=total, **changes)
    assert column(parts, "step") == list(range(1, total + 1))
    expect_same_run(whole, parts)


def test_a_signal_to_the_whole_group_loses_nothing(config_file: Write, tmp_path: Path):
    """As a scheduler sends it: the readers get it too."""
    folder, log = tmp_path / "run", tmp_path / "log"
    config = config_file(max_train_steps=100_000, checkpointing_steps=100_000, dataloader_num_workers=2)
    process = start(config, log, start_new_session=True)
    wait_until(process, (folder / "metrics.jsonl").is_file, log)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=60)
    output = log.read_text(encoding="utf-8")
    assert process.returncode == 3, output
    assert "Traceback" not in output
    assert "once more ends it at once" in output
    assert (folder / "checkpoints" / f"step-{status(folder)['step']:06d}").is_dir()


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(config_file: Write, tmp_path: Path):
    changes = {"max_train_steps": 4, "gradient_accumulation_steps": 2, "crepa_cutoff_step": 3, "crepa_warmup_steps": 1}
    alone = train(config_file, output_dir=str(tmp_path / "alone"), train_batch_size=2, **changes)
    both = tmp_path / "both"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "crepatrain", "fit"]
    config = config_file(output_dir=str(both), **changes)
    done = subprocess.run([*command, str(config)], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    assert done.stdout.count(b"looking at clips") == 1
    assert len(lines(both)) == 4
    assert column(both, "crepa_alignment_score")[0] is None  # the warm-up's first step
    for key in ("loss", "diffusion_loss", "crepa_alignment_score", "grad_norm"):
        pairs = zip(column(both, key), column(alone, key), strict=True)
        assert all(a == b or a == pytest.approx(b, rel=1e-5) for a, b in pairs), key


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["crepatrain", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_line_trains_and_ends_with_0(
    config_file: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = config_file(max_train_steps=1)
    assert run_cli(monkeypatch, "fit", str(path), "--crepa_lambda", "0.25", "--max-train-steps=2") == 0
    output = capsys.readouterr().out
    assert "step 2/2" in output
    assert ADAPTER in output.replace("\n", "").replace(" ", "")
    assert column(path.parent / "run", "crepa_weight") == [0.25, 0.25]


# Numbers that are not finite


@pytest.mark.parametrize(("kind", "bad"), [("latents", math.inf), ("teacher", math.nan)])
def test_a_run_that_diverges_stops_before_the_weights_change(
    config_file: Write,
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    bad: float,
):
    own, cache = tmp_path / "clips", tmp_path / "cache"
    shutil.copytree(clips, own)
    held_back = own / "clip-2.mp4"
    held_back.rename(tmp_path / "clip-2.mp4")
    common = {"train_data": str(own), "cache_dir": str(cache), "checkpointing_steps": 1}
    train(config_file, output_dir=str(tmp_path / "first"), max_train_steps=1, **common)
    fine = set((cache / kind).rglob("*.safetensors"))
    (tmp_path / "clip-2.mp4").rename(held_back)
    train(config_file, output_dir=str(tmp_path / "second"), max_train_steps=1, **common)
    for path in set((cache / kind).rglob("*.safetensors")) - fine:
        save_file({name: torch.full_like(tensor, bad) for name, tensor in load_file(path).items()}, path)

    config = config_file(max_train_steps=20, **common)
    assert run_cli(monkeypatch, "fit", str(config)) == 4
    message = capsys.readouterr().err.replace("\n", " ")
    run = tmp_path / "run"
    done = len(lines(run)) if (run / "metrics.jsonl").is_file() else 0
    assert f"step {done + 1}:" in message
    assert "clip-2.mp4 frames" in message
    assert "clip-0.mp4" not in message
    assert "weights were not changed" in message
    assert "Traceback" not in message
    assert status(run)["status"] == "failed"
    assert status(run)["step"] == done
    assert "clip-2.mp4" in status(run)["reason"]
    if done:
        assert f"step-{done:06d}" in message
        assert same_tensors(adapter(run), load_file(run / "adapters" / f"adapter-{done:06d}.safetensors"))
        assert max(names(run / "checkpoints")) == f"step-{done:06d}"
        assert all(tensor.isfinite().all() for tensor in adapter(run).values())
    else:
        assert "no checkpoint yet" in message


def test_the_weights_in_memory_are_those_before_the_step(config_file: Write, tmp_path: Path):
    """Diverged on the only clip's first step: going on from its cleaned cache gives the run that never failed."""
    cache = tmp_path / "cache"
    common = {"cache_dir": str(cache), "train_batch_size": 6, "checkpointing_steps": 2}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=4, **common)
    train(config_file, max_train_steps=2, **common)
    poisoned = next(iter((cache / "latents").rglob("*.safetensors")))
    good = poisoned.read_bytes()
    save_file({"latents": torch.full_like(load_file(poisoned)["latents"], math.inf)}, poisoned)
    with pytest.raises(DivergedError, match=r"step 3:"):
        train(config_file, max_train_steps=4, **common)
    poisoned.write_bytes(good)
    expect_same_run(whole, train(config_file, max_train_steps=4, **common))


def test_a_cache_entry_that_has_lost_its_end_is_written_again(config_file: Write, tmp_path: Path):
    cache = tmp_path / "cache"
    first = train(config_file, cache_dir=str(cache), max_train_steps=2, output_dir=str(tmp_path / "first"))
    entries = [next(iter((cache / kind).rglob("*.safetensors"))) for kind in ("latents", "text", "teacher")]
    whole = [entry.read_bytes() for entry in entries]
    for entry, content in zip(entries, whole, strict=True):
        entry.write_bytes(content[:-8])
    again = train(config_file, cache_dir=str(cache), max_train_steps=2, output_dir=str(tmp_path / "again"))
    assert [entry.read_bytes() for entry in entries] == whole
    expect_same_run(first, again)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_entry_that_is_lost_on_the_way_costs_no_step(config_file: Write, tmp_path: Path, workers: int):
    """The message says which, the steps before it are saved, and the same command mends it and goes on to the bit."""
    common = {"max_train_steps": 14, "dataloader_num_workers": workers}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), cache_dir=str(tmp_path / "other"), **common)
    cache = tmp_path / "cache"

    def lose(step: int) -> None:
        if step == 3:
            for entry in (cache / "latents").rglob("*.safetensors"):
                entry.write_bytes(b"lost")

    parts = {"output_dir": str(tmp_path / "parts"), "cache_dir": str(cache), **common}
    with pytest.raises(UserError, match=r"cache entry .* can't be read .*\n.*delete it"):
        train(config_file, after_step=lose, **parts)
    saved = checkpoints(tmp_path / "parts" / "checkpoints")
    assert len(saved) == 1
    assert step_of(saved[0]) >= 3
    assert json.loads((tmp_path / "parts" / "status.json").read_text())["status"] == "failed"
    expect_same_run(whole, train(config_file, **parts))


def test_two_commands_never_train_in_one_folder(config_file: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = []

    def second(step: int) -> None:
        if step == 2:
            ended = subprocess.run(
                [sys.executable, "-m", "crepatrain", "fit", str(tmp_path / "config.json")],
                capture_output=True,
                text=True,
                check=False,
            )
            seen.append((ended.returncode, " ".join(ended.stderr.split())))

    folder = train(config_file, after_step=second, max_train_steps=4, checkpointing_steps=1)
    assert [code for code, _ in seen] == [2]
    assert "a run is under way in it already" in seen[0][1]
    assert column(folder, "step") == [1, 2, 3, 4]


def test_a_command_that_was_preparing_takes_no_place_of_one_that_has_trained(config_file: Write, tmp_path: Path):
    late = RunFolder(read_plan(config_file(max_train_steps=2)).config)
    assert late.look() is None
    folder = train(config_file, max_train_steps=2)
    before = snapshot(folder)
    with pytest.raises(UserError, match=r"another command has trained in it while this one was preparing\n.*give it again"):
        late.claim(0)
    assert {path: content for path, (content, _) in before.items()} == {
        path: content for path, (content, _) in snapshot(folder).items()
    }


def test_steps_survive_a_gpu_that_is_out_of_memory(config_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=6)
    held, alive_at_the_save = [], []

    def step(*given: Any) -> Any:
        losses = training_loss(*given)
        held.append(weakref.ref(losses.diffusion))
        if len(held) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    def watched(run: Any) -> None:
        alive_at_the_save.append(held[-1]() is not None)
        save(run)

    monkeypatch.setattr(command, "training_loss", step)
    monkeypatch.setattr(command, "save", watched)
    with pytest.raises(UserError, match=r"out of GPU memory at step 4"):
        train(config_file, max_train_steps=6)
    assert alive_at_the_save == [False]  # what did not fit is given back before anything else is asked for
    assert names(tmp_path / "run" / "checkpoints") == ["step-000003"]
    monkeypatch.undo()
    expect_same_run(whole, train(config_file, max_train_steps=6))


def test_a_lock_that_a_kill_has_left_holds_nobody_off(config_file: Write, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert column(train(config_file, max_train_steps=1), "step") == [1]


def test_a_stop_within_a_logging_window_changes_no_line(config_file: Write, tmp_path: Path):
    changes = {"max_train_steps": 12, "logging_steps": 5}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), **changes)
    interrupted(config_file, at=7, output_dir=str(tmp_path / "parts"), **changes)
    assert column(tmp_path / "parts", "step") == [5]
    parts = train(config_file, output_dir=str(tmp_path / "parts"), **changes)
    assert column(parts, "step") == [5, 10, 12]
    expect_same_run(whole, parts)


def test_a_checkpoint_that_holds_something_else_is_told(config_file: Write):
    folder = train(config_file, max_train_steps=2, checkpointing_steps=1)
    last = folder / "checkpoints" / "step-000002"
    for name, content in (
        ("state", "{}"),
        ("state", "[]"),
        ("state", '{"step": "x", "samples_seen": 1, "window": {}, "schedule": null}'),
        ("fingerprint", "{}"),
        ("transformer_learner", "{}"),
    ):
        file = last / f"{name}.json"
        good = file.read_text()
        file.write_text(content)
        with pytest.raises(UserError, match=r"step-000002.* can't be read .*\n.*remove this checkpoint folder"):
            train(config_file, max_train_steps=3, checkpointing_steps=1)
        file.write_text(good)
    shutil.rmtree(last)
    assert column(train(config_file, max_train_steps=3, checkpointing_steps=1), "step") == [1, 2, 3]


def test_a_kill_behind_the_last_checkpoint_is_made_good(config_file: Write):
    folder = train(config_file, max_train_steps=1)
    (folder / "status.json").write_text('{"status": "running", "step": 1, "reason": ""}')
    (folder / "report.html").unlink()
    train(config_file, max_train_steps=1)
    assert json.loads((folder / "status.json").read_text())["status"] == "completed"
    assert (folder / "report.html").is_file()


def test_a_cache_disk_that_is_full_is_told(config_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(UserError, match=r"cache.*can't be written .No space left on device\)\n.*set cache_dir"):
        train(config_file, cache_dir=str(tmp_path / "cache"), max_train_steps=1)


# CREPA over a run


CUT = {"crepa_similarity_threshold": -0.9, "crepa_similarity_ema_decay": 0.0}


def test_a_run_that_was_cut_off_stays_cut_off(config_file: Write, wan: Path, tmp_path: Path):
    """And neither features nor encoder are read any more."""
    encoder, cache = tmp_path / "encoder", tmp_path / "cache"
    shutil.copytree(wan / "encoder", encoder)
    common = {"crepa_encoder": str(encoder), "cache_dir": str(cache), "checkpointing_steps": 1, **CUT}
    folder = train(config_file, max_train_steps=3, **common)
    assert column(folder, "crepa_cutoff") == [False, True, True]
    assert column(folder, "crepa_weight") == [0.5, 0.0, 0.0]
    shutil.rmtree(cache / "teacher")
    for weights in encoder.glob("*.safetensors"):
        weights.write_bytes(b"no weights")
    train(config_file, max_train_steps=5, **common)
    after = lines(folder)
    assert column(folder, "step") == [1, 2, 3, 4, 5]
    assert not (cache / "teacher").exists()
    for line in after[1:]:
        assert line["crepa_cutoff"] is True
        assert line["crepa_weight"] == 0.0
        assert [line[key] for key in MEASURED] == [None] * 3
        assert line["loss"] == line["diffusion_loss"]
        assert line["crepa_alignment_score_ema"] == after[0]["crepa_alignment_score"]
    saved = [load_file(folder / "checkpoints" / f"step-{step:06d}" / "projector.safetensors") for step in (3, 5)]
    assert same_tensors(*saved)


def test_the_projector_is_frozen_once_crepa_is_cut_off(config_file: Write):
    folder = train(config_file, max_train_steps=3, checkpointing_steps=1, **CUT)
    saved = [load_file(folder / "checkpoints" / f"step-{step:06d}" / "projector.safetensors") for step in (1, 2, 3)]
    assert same_tensors(saved[0], saved[1])
    assert same_tensors(saved[1], saved[2])
    adapters = [load_file(folder / "adapters" / f"adapter-{step:06d}.safetensors") for step in (1, 3)]
    assert not same_tensors(*adapters)


def test_a_recoverable_cutoff_probes(config_file: Write):
    changes = {"crepa_threshold_mode": "recoverable", "crepa_probe_interval": 2, "checkpointing_steps": 1, **CUT}
    folder = train(config_file, max_train_steps=6, **changes)
    assert column(folder, "crepa_cutoff") == [False, True, True, True, True, True]
    assert column(folder, "crepa_weight") == [0.5, 0, 0, 0, 0, 0]
    measured = [line["crepa_alignment_score"] is not None for line in lines(folder)]
    assert measured == [True, False, True, False, True, False]
    for line in lines(folder)[1:]:
        assert line["loss"] == line["diffusion_loss"]
        assert not line["crepa_loss"]
    assert not (folder / "checkpoints" / "step-000001").exists()
    saved = [load_file(folder / "checkpoints" / f"step-{step:06d}" / "projector.safetensors") for step in (4, 5, 6)]
    assert same_tensors(saved[0], saved[2])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_recoverable_cutoff_comes_back(config_file: Write, tmp_path: Path, workers: int):
    for seed in range(10):
        free = train(config_file, output_dir=str(tmp_path / f"free-{seed}"), seed=seed, max_train_steps=2)
        first, second = column(free, "crepa_alignment_score")
        if second < first:
            break
    assert second < first
    folder = train(
        config_file,
        seed=seed,
        crepa_similarity_threshold=(first + second) / 2,
        crepa_similarity_ema_decay=0.0,
        crepa_threshold_mode="recoverable",
        crepa_probe_interval=1,
        dataloader_num_workers=workers,
        max_train_steps=3,
    )
    assert column(folder, "crepa_alignment_score")[:2] == pytest.approx([first, second])
    assert column(folder, "crepa_weight") == [0.5, 0.0, 0.5]
    assert column(folder, "crepa_cutoff") == [False, True, False]


def test_the_first_step_of_a_warm_up_measures_nothing(config_file: Write):
    folder = train(config_file, crepa_warmup_steps=2, max_train_steps=4)
    assert column(folder, "crepa_weight") == [0.0, 0.25, 0.5, 0.5]
    first, second = lines(folder)[:2]
    assert [first[key] for key in (*MEASURED, "crepa_alignment_score_ema")] == [None] * 4
    assert first["loss"] == first["diffusion_loss"]
    assert first["crepa_cutoff"] is False
    assert second["crepa_alignment_score"] == second["crepa_alignment_score_ema"]


def test_a_cutoff_step_frees_the_teacher(config_file: Write):
    before = alive("Dinov2Model")
    seen: dict[int, set[str]] = {}

    def look(step: int) -> None:
        seen[step] = kinds_of(alive("Dinov2Model"), but=set(map(id, before)))

    folder = train(config_file, after_step=look, crepa_feature_source="pixels", crepa_cutoff_step=2, max_train_steps=4)
    assert column(folder, "crepa_cutoff") == [False, False, True, True]
    assert column(folder, "crepa_weight") == [0.5, 0.5, 0.0, 0.0]
    assert seen[1] == {"Dinov2Model"}
    assert seen[3] == set()


def test_without_crepa_nothing_of_it_is_said(config_file: Write):
    folder = train(config_file, crepa_enabled=False, max_train_steps=2)
    for line in lines(folder):
        assert all(line.get(key) is None for key in KEYS if key.startswith("crepa"))
        assert line["loss"] == line["diffusion_loss"]
    assert "projector.safetensors" not in names(folder / "checkpoints" / "step-000002")


def test_crepa_changes_neither_data_nor_noise(config_file: Write, tmp_path: Path):
    losses = [
        column(train(config_file, output_dir=str(tmp_path / str(on)), crepa_enabled=on, max_train_steps=2), "diffusion_loss")
        for on in (True, False)
    ]
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


# Ways to the same numbers


def losses_of(folder: Path) -> list[float]:
    return [line[key] for line in lines(folder) for key in ("loss", "diffusion_loss", "crepa_loss", "crepa_alignment_score")]


def test_accumulation_is_a_larger_batch(config_file: Write, tmp_path: Path):
    runs = [
        train(config_file, output_dir=str(tmp_path / name), train_batch_size=batch, gradient_accumulation_steps=accumulation)
        for name, batch, accumulation in (("batch", 2, 1), ("accumulated", 1, 2))
    ]
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]), abs=1e-5)
    assert column(runs[0], "grad_norm") == pytest.approx(column(runs[1], "grad_norm"), rel=1e-3)


def test_gradient_checkpointing_changes_nothing(config_file: Write, tmp_path: Path):
    runs = [
        train(config_file, output_dir=str(tmp_path / str(on)), gradient_checkpointing=on, lora_dropout=0.2)
        for on in (True, False)
    ]
    assert losses_of(runs[0]) == pytest.approx(losses_of(runs[1]), abs=1e-6)
    left, right = map(adapter, runs)
    assert all(torch.allclose(left[name], right[name], atol=1e-5) for name in left)


def test_workers_change_nothing(config_file: Write, tmp_path: Path):
    runs = [train(config_file, output_dir=str(tmp_path / str(count)), dataloader_num_workers=count) for count in (0, 2)]
    expect_same_run(*runs)


def test_features_from_the_cache_are_those_of_the_pixels(config_file: Write, tmp_path: Path):
    runs = [
        train(config_file, output_dir=str(tmp_path / source), crepa_feature_source=source, max_train_steps=2)
        for source in ("cached", "pixels")
    ]
    for key in ("crepa_alignment_score", "crepa_similarity_self"):
        assert column(runs[0], key) == pytest.approx(column(runs[1], key), abs=2e-3)
        assert column(runs[0], key)[0] == pytest.approx(column(runs[1], key)[0], abs=2e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"crepa_feature_source": "pixels"},
        {"crepa_feature_source": "latents"},
        {"crepa_feature_source": "latents", "crepa_drop_vae_encoder": True},
        {"crepa_feature_source": "backbone", "crepa_block_index": 3, "crepa_teacher_block_index": 9},
        {"crepa_cache_dtype": "int8"},
        {"attention_backend": "native"},
        {"crepa_projector": "conv"},
        {"crepa_projector": "conv", "crepa_encoder_image_size": 70},
        {"crepa_encoder_image_size": 56},
        {"crepa_spatial_align": False},
        {"crepa_normalize_by_frames": False},
        {"crepa_adjacent_distance": 5, "crepa_cumulative_neighbors": True},
        {"crepa_threshold_metric": "self", "crepa_similarity_threshold": 0.9},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "bf16", "gradient_checkpointing": False, "crepa_feature_source": "pixels"},
        {"vae_dtype": "bfloat16"},
        {"optimizer": "adafactor"},
        {"timestep_sampling": "shifted"},
        {"lora_targets": "all-linear", "lora_alpha": 16.0},
        {"aspect_buckets": True, "train_batch_size": 2},
        {"num_frames": 1, "crepa_adjacent_distance": 0},
    ],
    ids=lambda changes: " ".join(f"{key}={value}" for key, value in changes.items()),
)
def test_every_way_trains(config_file: Write, changes: dict[str, Any]):
    folder = train(config_file, max_train_steps=2, **changes)
    for line in lines(folder):
        assert set(line) == KEYS
        if changes.get("crepa_normalize_by_frames", True):
            assert line["crepa_loss"] == pytest.approx(-0.5 * line["crepa_alignment_score"], abs=1e-5)
        assert line["loss"] == pytest.approx(line["diffusion_loss"] + line["crepa_loss"], abs=1e-6)
        assert line["crepa_similarity_self"] != 0
        assert line["grad_norm"] > 0
    projector = load_file(folder / "checkpoints" / "step-000002" / "projector.safetensors")
    assert {tensor.dtype for tensor in projector.values()} == {torch.float32}
    assert {tensor.dtype for tensor in adapter(folder).values()} == {torch.float32}


@pytest.mark.slow
def test_compiled_blocks_train_the_same(config_file: Write, tmp_path: Path):
    plain = train(config_file, output_dir=str(tmp_path / "plain"))
    compiled = train(config_file, output_dir=str(tmp_path / "compiled"), compile=True)
    for key in ("diffusion_loss", "crepa_loss", "crepa_similarity_self", "grad_norm"):
        assert column(compiled, key) == pytest.approx(column(plain, key), rel=1e-3), key


@pytest.mark.parametrize("crepa", [True, False])
def test_layersync_adds_its_loss(config_file: Write, crepa: bool):
    folder = train(config_file, crepa_enabled=crepa, layersync_enabled=True, layersync_student_block=2, layersync_teacher_block=7)
    for line in lines(folder):
        assert set(line) == KEYS | {"layersync_loss"}
        assert -0.2 <= line["layersync_loss"] < 0.2
        expected = line["diffusion_loss"] + (line["crepa_loss"] or 0) + line["layersync_loss"]
        assert line["loss"] == pytest.approx(expected, abs=1e-6)


# The loop


def test_epochs_are_counted_in_windows(config_file: Write):
    """Three clips of two windows each."""
    folder = train(config_file, max_train_steps=..., num_train_epochs=2, train_batch_size=2, gradient_accumulation_steps=2)
    assert column(folder, "step") == [1, 2, 3, 4]
    assert status(folder) == {"status": "completed", "step": 4, "reason": ""}


def test_a_line_over_several_steps_holds_means(config_file: Write, tmp_path: Path):
    changes = {"max_train_steps": 5, "crepa_warmup_steps": 4}
    single = lines(train(config_file, output_dir=str(tmp_path / "single"), **changes))
    paired = lines(train(config_file, output_dir=str(tmp_path / "paired"), logging_steps=2, **changes))
    assert [line["step"] for line in paired] == [2, 4, 5]
    for line, steps in zip(paired, (single[:2], single[2:4], single[4:]), strict=True):
        for key in ("loss", "diffusion_loss", "grad_norm"):
            assert line[key] == pytest.approx(sum(step[key] for step in steps) / len(steps))
        assert line["crepa_loss"] == pytest.approx(sum(step["crepa_loss"] or 0 for step in steps) / len(steps))
        scores = [step["crepa_alignment_score"] for step in steps if step["crepa_alignment_score"] is not None]
        assert line["crepa_alignment_score"] == pytest.approx(sum(scores) / len(scores))
        assert line["crepa_weight"] == steps[-1]["crepa_weight"]
        assert line["crepa_alignment_score_ema"] == steps[-1]["crepa_alignment_score_ema"]
        assert line["loss"] == pytest.approx(line["diffusion_loss"] + line["crepa_loss"], abs=1e-6)


def test_old_checkpoints_are_rotated_and_adapters_are_kept(config_file: Write):
    folder = train(config_file, max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    assert names(folder / "checkpoints") == ["step-000003", "step-000004"]
    assert names(folder / "adapters") == [f"adapter-{step:06d}.safetensors" for step in (1, 2, 3, 4)]


def test_neither_vae_nor_encoders_are_in_memory_while_training(config_file: Write, tmp_path: Path):
    kinds = ("UMT5EncoderModel", "AutoencoderKLWan", "Dinov2Model", "WanPipeline", "WanTransformer3DModel")
    before = alive(*kinds)
    found: set[str] = set()

    def look(_step: int) -> None:
        found.update(kinds_of(alive(*kinds), but=set(map(id, before))))

    train(config_file, after_step=look, cache_dir=str(tmp_path / "fresh"), max_train_steps=2)
    assert found == {"WanTransformer3DModel"}


def test_the_base_weights_are_untouched(config_file: Write, wan: Path):
    others = alive("WanTransformer3DModel")
    files = sorted((wan / "transformer").glob("*.safetensors"))
    before = [file.read_bytes() for file in files]
    expected = load_file(files[0])
    compared: list[int] = []

    def compare(step: int) -> None:
        if step < 3:
            return
        (transformer,) = [thing for thing in alive("WanTransformer3DModel") if all(thing is not other for other in others)]
        state = {name.replace(".base_layer", ""): tensor for name, tensor in transformer.state_dict().items()}
        base = {name: tensor for name, tensor in state.items() if "lora_" not in name}
        assert same_tensors(base, expected)
        assert not any(parameter.grad is not None for parameter in transformer.parameters())
        compared.append(len(base))

    train(config_file, after_step=compare, max_train_steps=3, learning_rate=1e-2, adam_weight_decay=0.5)
    assert compared == [len(expected)]
    assert [file.read_bytes() for file in files] == before


# Every weight


FULL = {"model_type": "full", "lora_rank": ..., "adam_weight_decay": 0.0}


def last_checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / max(names(folder / "checkpoints"))


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_every_weight_is_trained_and_written_as_a_transformer(config_file: Write, wan: Path, precision: str, dtype: torch.dtype):
    folder = train(config_file, max_train_steps=2, mixed_precision=precision, **FULL)
    assert "transformer" in names(folder)
    assert not {"adapters", ADAPTER} & set(names(folder))
    trained = load_file(last_checkpoint(folder) / "transformer.safetensors")
    begun = load_file(wan / "transformer" / "diffusion_pytorch_model.safetensors")
    assert trained.keys() == begun.keys()
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}, "bf16 would round small steps away"
    assert [name for name in trained if torch.equal(trained[name], begun[name])] == []
    written = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    loaded = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    assert same_tensors(dict(loaded.state_dict()), {name: tensor.to(dtype).float() for name, tensor in trained.items()})
    assert dict(loaded.config)["num_layers"] == 10


def test_a_full_run_in_two_parts_is_the_run_in_one(config_file: Write, tmp_path: Path):
    changes = {
        "caption_dropout": 0.5,
        "crepa_warmup_steps": 1,
        "gradient_accumulation_steps": 2,
        "mixed_precision": "bf16",
        **FULL,
    }
    whole = train(config_file, output_dir=str(tmp_path / "whole"), max_train_steps=2, **changes)
    parts = train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=1, **changes)
    assert names(parts / "checkpoints") == ["step-000001"]
    begun = load_file(last_checkpoint(parts) / "transformer.safetensors")
    train(config_file, output_dir=str(tmp_path / "parts"), max_train_steps=2, **changes)
    assert timeless(whole) == timeless(parts)
    inside = [last_checkpoint(folder) for folder in (whole, parts)]
    assert names(inside[0]) == names(inside[1])
    for file in ("transformer", "projector", "transformer_learner", "projector_learner"):
        assert same_tensors(*(load_file(checkpoint / f"{file}.safetensors") for checkpoint in inside)), file
    assert not same_tensors(begun, load_file(inside[0] / "transformer.safetensors"))
    results = [[content for content, _ in snapshot(folder / "transformer").values()] for folder in (whole, parts)]
    assert results[0] == results[1]


def test_a_full_run_and_an_adapters_run_are_different_runs(config_file: Write):
    train(config_file, max_train_steps=1)
    with pytest.raises(UserError, match='model_type: "lora" there, "full" here'):
        train(config_file, max_train_steps=2, model_type="full")


def test_a_full_run_trains_the_blocks_beyond_crepas_too(config_file: Write, wan: Path):
    """And without CREPA, and with what frees memory; the checkpoint that it began with stays as it was."""
    before = snapshot(wan / "transformer")
    folder = train(
        config_file, max_train_steps=1, crepa_enabled=False, gradient_checkpointing=False, optimizer="adafactor", **FULL
    )
    begun = load_file(wan / "transformer" / "diffusion_pytorch_model.safetensors")
    written = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not [name for name in written if torch.equal(written[name], begun[name])]
    assert snapshot(wan / "transformer") == before


def test_a_full_run_says_how_to_load_what_it_made(config_file: Write, capsys: pytest.CaptureFixture[str]):
    plan = read_plan(config_file(max_train_steps=1, **FULL))
    fit(plan, Screen())
    said = "".join(capsys.readouterr().out.split())
    assert f'WanTransformer3DModel.from_pretrained("{plan.config.output_dir}",subfolder="transformer")' in said
    assert ADAPTER not in said


# Two experts


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize(("expert", "inside"), [("high", (0.875, 1.0)), ("low", (0.0, 0.875))])
def test_an_expert_is_trained_alone_at_its_noise_levels(
    config_file: Write, tiny_checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], expert: str, inside: tuple, kind: str
):
    checkpoint = Path(shutil.copytree(tiny_checkpoint("wan", "tiny-a14b"), tmp_path / "wan-a14b"))
    own, other = ("transformer", "transformer_2") if expert == "high" else ("transformer_2", "transformer")
    (checkpoint / other / "diffusion_pytorch_model.safetensors").unlink()
    changes = {"wan_expert": expert, "model_type": kind, "output_name": "squares", "max_train_steps": 3, "train_batch_size": 3}
    with watched_batches() as seen:
        plan = read_plan(config_file(**of(checkpoint), **changes))
        fit(plan, Screen())
    folder = Path(plan.config.output_dir)
    sigma = torch.cat([batch.sigma for batch in seen])
    assert len(sigma) == 9
    assert inside[0] <= sigma.min()
    assert sigma.max() < inside[1]
    said = "".join(capsys.readouterr().out.split())
    if kind == "full":
        begun = load_file(checkpoint / own / "diffusion_pytorch_model.safetensors")
        written = load_file(folder / own / "diffusion_pytorch_model.safetensors")
        assert begun.keys() == written.keys()
        assert all((written[name] - begun[name]).abs().max() < 0.1 for name in begun), "it begins with its own weights"
        assert not (folder / other).exists()
        assert f'subfolder="{own}"' in said
    else:
        assert names(folder / "adapters") == [f"squares_{expert}_noise-000003.safetensors"]
        for path in (folder / ADAPTER, folder / "adapters" / f"squares_{expert}_noise-000003.safetensors"):
            with safe_open(path, framework="pt") as file:
                assert file.metadata()["crepatrain.expert"] == expert
        assert ("load_into_transformer_2=True" in said) == (expert == "low")


def test_experts_are_different_runs(config_file: Write, tiny_checkpoint):
    checkpoint = of(tiny_checkpoint("wan", "tiny-a14b"))
    train(config_file, max_train_steps=1, wan_expert="high", **checkpoint)
    with pytest.raises(UserError, match='wan_expert: "high" there, "low" here'):
        train(config_file, max_train_steps=2, wan_expert="low", **checkpoint)


def test_an_adapter_of_a_model_with_one_transformer_names_no_expert(finished: Path):
    with safe_open(finished / ADAPTER, framework="pt") as file:
        assert "crepatrain.expert" not in file.metadata()


def test_an_adapter_scaled_by_the_root_of_its_rank_is_written_so(config_file: Write):
    folder = train(config_file, max_train_steps=1, lora_rank=4, lora_alpha=6.0, lora_use_rslora=True)
    trained = load_file(last_checkpoint(folder) / "adapter.safetensors")
    family = tiny_family()
    for name, tensor in trained.items():
        module, _, end = name.partition(".lora_")
        scale = 6.0 / 4**0.5 if end == "B.weight" else 1.0
        written = adapter(folder)[f"{family.export_name(module)}.lora_{end}"]
        torch.testing.assert_close(written, tensor * scale, rtol=1e-6, atol=0)
    assert len(trained) == len(adapter(folder))


# Images, first frames, captions of other lengths


def test_clips_and_images_train_together(config_file: Write, clips_and_images: Path):
    """Six windows and two images, in batches of their own."""
    with watched_batches() as seen:
        folder = train(config_file, train_data=str(clips_and_images), max_train_steps=..., num_train_epochs=1, train_batch_size=2)
    assert [len({key.startswith("image") for key in batch.keys}) for batch in seen] == [1] * 4
    shapes = [batch.latents.shape[2] for batch in seen]
    assert sorted(shapes) == [1, 3, 3, 3]
    (images,) = [line for line, frames in zip(lines(folder), shapes, strict=True) if frames == 1]
    assert images["crepa_alignment_score"] == pytest.approx(images["crepa_similarity_self"], abs=1e-6)
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines(folder))


def test_crepa_on_images_is_plain_repa(config_file: Write, tmp_path: Path):
    data = tmp_path / "images"
    data.mkdir()
    for index in range(3):
        render_image(data / f"{index}.png", seed=index)
        (data / f"{index}.txt").write_text(f"blocks {index}", encoding="utf-8")
    runs = [
        train(config_file, train_data=str(data), output_dir=str(tmp_path / str(distance)), crepa_adjacent_distance=distance)
        for distance in (1, 0)
    ]
    assert timeless(runs[0]) == timeless(runs[1])
    assert same_tensors(*map(adapter, runs))
    assert column(runs[0], "crepa_alignment_score") == pytest.approx(column(runs[0], "crepa_similarity_self"), abs=1e-6)


def test_images_are_refused_before_anything_is_computed(
    config_file: Write, clips_and_images: Path, tiny_checkpoint, tmp_path: Path
):
    fresh = tmp_path / "fresh"
    with pytest.raises(UserError, match=r"image-0\.png: it is an image, and Wan 2\.1 image-to-video is trained on clips alone"):
        train(config_file, train_data=str(clips_and_images), cache_dir=str(fresh), **of(tiny_checkpoint("wan", "tiny-i2v")))
    assert not (fresh / "latents").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "which", [("ltxvideo", "tiny"), ("sanavideo", "tiny"), ("kandinsky5_video", "tiny"), ("wan", "tiny-ti2v")]
)
def test_without_its_first_frames_an_image_to_video_run_is_one_from_text(
    config_file: Write, clips_and_images: Path, tiny_checkpoint, tmp_path: Path, which: tuple[str, str]
):
    """And with them an image is still trained as from text, as nothing would be left to learn beside it."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("clip-0.mp4", "clip-0.txt", "image-0.png", "image-0.txt"):
        shutil.copy(clips_and_images / name, data)
    common = {"train_data": str(data), "max_windows_per_clip": 1, "crepa_enabled": False, "learning_rate": 1e-6, "fps": 16}
    common |= {"max_train_steps": ..., "num_train_epochs": 1, "caption_dropout": 0.0}
    losses, frames = {}, []
    for name, changes in {
        "text": {"task": "t2v"},
        "dropped": {"task": "i2v", "i2v_dropout": 1.0},
        "given": {"task": "i2v"},
    }.items():
        with watched_batches() as seen:
            folder = train(config_file, output_dir=str(tmp_path / name), **common, **changes, **of(tiny_checkpoint(*which)))
        losses[name] = column(folder, "diffusion_loss")
        frames = [batch.latents.shape[2] for batch in seen]
        told = [batch.conditioning["given"].item() if "given" in batch.conditioning else None for batch in seen]
        share = {"text": None, "dropped": 0.0, "given": 1.0}[name]
        assert told == [None if count == 1 else share for count in frames]
    assert len(frames) == len(set(frames)) == 2
    assert losses["dropped"] == pytest.approx(losses["text"], rel=1e-3)
    for count, text, given in zip(frames, losses["text"], losses["given"], strict=True):
        assert (given == pytest.approx(text, rel=1e-3)) == (count == 1)


def test_kandinsky_trains_batches_of_captions_of_other_lengths(
    config_file: Write, clips_and_images: Path, tiny_checkpoint, tmp_path: Path
):
    data = Path(shutil.copytree(clips_and_images, tmp_path / "data"))
    for name, caption in {"clip-0": "a", "clip-1": "two words", "clip-2": "two wards", "image-0": "b"}.items():
        (data / f"{name}.txt").write_text(caption, encoding="utf-8")
    checkpoint = of(tiny_checkpoint("kandinsky5_video"))
    changes = {"train_data": str(data), "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": ...}
    with watched_batches() as seen:
        folder = train(config_file, num_train_epochs=2, caption_dropout=0.4, **changes, **checkpoint)
    assert all(math.isfinite(line["loss"]) for line in lines(folder))
    lengths = [batch.text["prompt_embeds"].shape[1] for batch in seen]
    of_clip = {key.split(" ")[0]: batch.text["prompt_embeds"].shape[1] for batch in seen for key in batch.keys}
    assert of_clip.keys() == {"clip-0.mp4", "clip-1.mp4", "clip-2.mp4", "image-0.png", "image-1.jpg"}
    assert lengths[0::2] == lengths[1::2], "the micro-batches of a step"
    (empty,) = tiny_family("kandinsky5_video").count_tokens(checkpoint["pretrained_model_name_or_path"], [""])
    assert empty in lengths, "the captions of a whole step were dropped"
    assert len(set(lengths)) > 2


@pytest.mark.parametrize("which", [("ltxvideo", "tiny"), ("sanavideo", "tiny"), ("kandinsky5_video", "tiny")])
def test_every_weight_of_every_family_can_be_trained(config_file: Write, tiny_checkpoint, which: tuple[str, str]):
    checkpoint = tiny_checkpoint(*which)
    folder = train(config_file, max_train_steps=1, **FULL, **of(checkpoint))
    begun = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    written = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == begun.keys()
    assert not [name for name in begun if torch.equal(written[name], begun[name])]
