"""Runs that are ended: by a signal, a kill, a full disk or GPU, numbers that are not finite."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from common import disk_of
from runs import (
    RESTLESS,
    Batches,
    Write,
    adapter,
    column,
    expect_same_run,
    interrupted,
    lines,
    names,
    run_cli,
    same_tensors,
    snapshot,
    start,
    status,
    train,
    wait_until,
)
from safetensors.torch import load_file, save_file

from crepatrain import files
from crepatrain.config.plan import read_plan
from crepatrain.errors import DivergedError, UserError
from crepatrain.records.events import CheckpointSaved
from crepatrain.records.layout import RunLayout, checkpoints, step_of
from crepatrain.records.runfolder import RunFolder
from crepatrain.running import loop
from crepatrain.running.divergence import keep_batches
from crepatrain.tensors import Batch
from crepatrain.training.step import training_loss


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
    assert "a second signal ends it at once" in output
    assert (folder / "checkpoints" / f"step-{status(folder)['step']:06d}").is_dir()


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
    kept = run / f"diverged-step-{done + 1:06d}.safetensors"
    assert f"its batch is kept in {kept}" in message
    batch = load_file(kept)
    assert {"0.latents", "0.noise", "0.sigma", "0.text.prompt_embeds"} <= batch.keys()
    assert batch["0.latents"].isfinite().all() == (kind != "latents")
    assert batch["0.noise"].isfinite().all()
    if done:
        assert f"step-{done:06d}" in message
        assert same_tensors(adapter(run), load_file(run / "adapters" / f"adapter-{done:06d}.safetensors"))
        assert max(names(run / "checkpoints")) == f"step-{done:06d}"
        assert all(tensor.isfinite().all() for tensor in adapter(run).values())
    else:
        assert "no checkpoint yet" in message


def test_the_batch_of_a_step_that_diverges_is_kept_whole(config_file: Write, tmp_path: Path):
    """As the step saw it, with every micro-batch; and a disk that is full takes away no word of the error."""
    seen, cache = Batches(), tmp_path / "cache"
    common = {"cache_dir": str(cache), "train_batch_size": 2, "gradient_accumulation_steps": 3, "checkpointing_steps": 1}
    train(config_file, max_train_steps=1, **common)
    for path in (cache / "latents").rglob("*.safetensors"):
        save_file({"latents": torch.full_like(load_file(path)["latents"], math.inf)}, path)
    with pytest.raises(DivergedError, match=r"step 2: [^\n]*\n.*kept in .*diverged-step-000002\.safetensors"):
        train(config_file, max_train_steps=2, subscribers=[seen], **common)
    kept = tmp_path / "run" / "diverged-step-000002.safetensors"
    batch = load_file(kept)
    for number, given in enumerate(seen[:3]):
        for name, tensor in {"latents": given.latents, "noise": given.noise, "sigma": given.sigma}.items():
            assert torch.equal(batch[f"{number}.{name}"], tensor)
        for name, tensor in given.text.items():
            assert torch.equal(batch[f"{number}.text.{name}"], tensor)
    assert not [name for name in batch if name.startswith("3.")]
    header = files.safetensors_header(kept)
    assert header
    assert header["__metadata__"]["step"] == "2"
    assert json.loads(header["__metadata__"]["samples"]) == [list(given.keys) for given in seen[:3]]

    with disk_of(1 << 14), pytest.raises(DivergedError, match=r"its batch could not be kept .*\. Lower learning_rate"):
        keep_on_a_full_disk(tmp_path, seen)


def keep_on_a_full_disk(tmp_path: Path, batches: Sequence[Batch]) -> None:
    kept = keep_batches(RunLayout(tmp_path / "full"), 2, batches, process=1)
    assert not list((tmp_path / "full").iterdir())
    raise DivergedError("step 2", f"{kept}. Lower learning_rate")


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
    """The message says which, the steps before it are saved, and the same command repairs it and goes on to the bit."""
    common = {"max_train_steps": 14, "dataloader_num_workers": workers}
    whole = train(config_file, output_dir=str(tmp_path / "whole"), cache_dir=str(tmp_path / "other"), **common)
    cache = tmp_path / "cache"

    def lose(step: int) -> None:
        if step == 3:
            for entry in (cache / "latents").rglob("*.safetensors"):
                entry.write_bytes(b"lost")

    parts = {"output_dir": str(tmp_path / "parts"), "cache_dir": str(cache), **common}
    with pytest.raises(UserError, match=r"cache entry .* is damaged .*\n.*run the same command again"):
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
    assert late.inspect() is None
    folder = train(config_file, max_train_steps=2)
    before = snapshot(folder)
    with pytest.raises(UserError, match=r"another command has trained in it while this one was preparing\n.*same command again"):
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

    def watch(event: object) -> None:
        if isinstance(event, CheckpointSaved):
            alive_at_the_save.append(held[-1]() is not None)

    monkeypatch.setattr(loop, "training_loss", step)
    with pytest.raises(UserError, match=r"out of GPU memory at step 4"):
        train(config_file, subscribers=[watch], max_train_steps=6)
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


def test_a_checkpoint_that_holds_something_else_is_reported(config_file: Write):
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
        with pytest.raises(
            UserError, match=r"step-000002 is damaged: the content of .*\n.*take the newest that is whole.*step-000001"
        ):
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


def test_a_cache_disk_that_is_full_is_reported(config_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(UserError, match=r"cache.*can't be written .No space left on device\)\n.*set cache_dir"):
        train(config_file, cache_dir=str(tmp_path / "cache"), max_train_steps=1)
