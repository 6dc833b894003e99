"""Runs whose terminal or output goes away, that a scheduler warns, or that end without a word: the real command."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from common import render_clip
from runs import Write, run_cli, start, status, wait_until

from crepatrain.records.layout import checkpoints

# Far longer than a test waits, and yet no process is left for ever by a test that fails.
FOREVER = {"max_train_steps": 8_000, "checkpointing_steps": 100_000, "dataloader_num_workers": 1}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(config: Path) -> list[str]:
    return [sys.executable, "-m", "crepatrain", "fit", str(config)]


def expect_saved(folder: Path) -> None:
    assert status(folder)["status"] == "stopped"
    assert [path.name for path in checkpoints(folder / "checkpoints")] == [f"step-{status(folder)['step']:06d}"]


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_terminal_that_closes_costs_no_step(config_file: Write, tmp_path: Path):
    """As a dropped ssh: the system hangs up, and every write fails."""
    config, folder = config_file(**FOREVER), tmp_path / "run"
    child, terminal = pty.fork()
    if not child:
        os.execve(sys.executable, command(config), ENVIRONMENT)
    shown = b""
    while not (folder / "metrics.jsonl").is_file():  # read meanwhile, or the command waits for its output to be taken
        try:
            shown += os.read(terminal, 1 << 16)
        except OSError:
            break
    os.close(terminal)
    ended: list[int] = []

    def has_ended() -> bool:
        ended.extend(os.waitpid(child, os.WNOHANG))
        return ended[-2] != 0

    wait_for(has_ended)
    code = os.waitstatus_to_exitcode(ended[-1])
    assert code == 3, shown.decode(errors="replace")
    expect_saved(folder)


def test_an_output_that_nobody_reads_costs_no_step(config_file: Write, tmp_path: Path):
    """As `crepatrain fit | head -1`; then a scheduler's warning, which reaches the readers too."""
    config, folder = config_file(**FOREVER), tmp_path / "run"
    process = subprocess.Popen(
        command(config), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True
    )
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    wait_for(lambda: (folder / "metrics.jsonl").is_file() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGUSR1)
    assert process.wait(timeout=60) == 3
    expect_saved(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM])
def test_caching_stops_too(config_file: Write, tmp_path: Path, number: signal.Signals):
    clips, cache, log = tmp_path / "many", tmp_path / "cache", tmp_path / "log"
    clips.mkdir()
    for seed in range(60):
        render_clip(clips / f"{seed}.mp4", seed=seed)
        (clips / f"{seed}.txt").write_text("a square", encoding="utf-8")
    process = start(config_file(train_data=str(clips), cache_dir=str(cache), **FOREVER), log)
    wait_until(process, lambda: any((cache / "latents").rglob("*.safetensors")), log)
    process.send_signal(number)
    process.wait(timeout=60)
    said = log.read_text(encoding="utf-8")
    assert process.returncode == 3, said
    assert "stopped: " in said
    assert 0 < len(list((cache / "latents").rglob("*.safetensors"))) < 60 * 2
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_validation_stops_too(config_file: Write, tmp_path: Path):
    log, folder = tmp_path / "log", tmp_path / "run"
    changes = {"validation_prompts": ["a"], "validation_sampling_steps": 900, "max_train_steps": 5}
    process = start(config_file(**changes), log)
    wait_until(process, (folder / "status.json").is_file, log)
    time.sleep(6)
    process.send_signal(signal.SIGHUP)
    process.wait(timeout=60)
    assert process.returncode == 3, log.read_text(encoding="utf-8")
    assert status(folder)["status"] == "stopped"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_killed_is_known_at_once(
    config_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int
):
    folder, log = tmp_path / "run", tmp_path / "log"
    config = config_file(**FOREVER | {"checkpointing_steps": 2, "dataloader_num_workers": workers})
    process = start(config, log)
    wait_until(process, (folder / "checkpoints" / "step-000002").is_dir, log)
    for _ in range(20):
        assert run_cli(monkeypatch, "status", str(folder)) == 0
    assert capsys.readouterr().out.count("state       running, last written 0:00:0") == 20
    assert process.poll() is None, "it was disturbed"
    assert status(folder)["pid"] == process.pid
    process.kill()
    process.wait()
    assert run_cli(monkeypatch, "status", str(folder)) == 0
    said = capsys.readouterr().out
    newest = checkpoints(folder / "checkpoints")[-1]
    assert "it ended without a word at step " in said
    assert f"the same command goes on from step {int(newest.name.removeprefix('step-'))}\n" in said
    # And nothing of the killed one, such as its readers, keeps the next command from the folder.
    wanted = int(newest.name.removeprefix("step-")) + 1
    values = json.loads(config.read_text(encoding="utf-8")) | {"max_train_steps": wanted}
    config.write_text(json.dumps(values), encoding="utf-8")
    assert run_cli(monkeypatch, "fit", str(config)) == 0
    assert status(folder)["status"] == "completed"
