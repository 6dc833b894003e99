"""The page in the browser: what it costs a run that it shows, what it costs idle, and how soon it is there. Needs chromium.

    python benchmarks/page.py

One run goes on all the time. In turn the browser shows the run's page and an empty one; the ratio is that of the median step
times of neighbouring turns.
"""

import argparse
import contextlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from common import ratio, write
from playwright.sync_api import Page, sync_playwright

_COMMAND = [sys.executable, "-m", "crepatrain"]
_IDLE_SECONDS = 60
# After the browser was sent elsewhere, before steps count.
_SETTLE_SECONDS = 3


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    command = [*_COMMAND, "ui", "--port", "0", "--runs", "runs", "--data", "."]
    server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.match(r"http://\S+", server.stdout.readline())
        assert found
        yield found.group(), psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait()


def _seconds_to_first_page(folder: Path) -> float:
    began = time.perf_counter()
    with _served(folder) as (address, _):
        with urllib.request.urlopen(address) as answer:
            assert b"crepatrain" in answer.read()
        return time.perf_counter() - began


def _cpu_seconds(server: psutil.Process) -> float:
    def used() -> float:
        times = server.cpu_times()
        return times.user + times.system

    before = used()
    time.sleep(_IDLE_SECONDS)
    return used() - before


def _steps(metrics: Path, after: int) -> list[tuple[int, float]]:
    """(step, seconds) of the steps after one."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["step_seconds"]) for line in lines if "step_seconds" in line and line["step"] > after]


def _turn(page: Page, address: str, metrics: Path, seconds: float) -> float:
    """The median step time while the browser shows an address."""
    page.goto(address)
    time.sleep(_SETTLE_SECONDS)
    last = _steps(metrics, 0)[-1][0]
    time.sleep(seconds)
    return statistics.median(took for _, took in _steps(metrics, last))


def _train(folder: Path, size: tuple[int, int, int]) -> subprocess.Popen[bytes]:
    for command in (["make-random", "wan", "model"], ["make-clips", "clips"]):
        subprocess.run([*_COMMAND, *command], cwd=folder, check=True, capture_output=True)
    frames, height, width = size
    config = {
        "model_family": "wan",
        "pretrained_model_name_or_path": "model",
        "train_data": "clips",
        "output_dir": "runs/run",
        "height": height,
        "width": width,
        "num_frames": frames,
        "max_train_steps": 10**6,
        "checkpointing_steps": 10**6,
        "mixed_precision": "no",
        "lora_rank": 4,
        "crepa_enabled": True,
        "crepa_block_index": 1,
        "crepa_encoder": "model/encoder",
        "crepa_encoder_image_size": "grid",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen([*_COMMAND, "fit", "config.json"], cwd=folder, stdout=log, stderr=log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=15, help="of each turn")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, sync_playwright() as driver:
        folder = Path(name)
        (folder / "runs").mkdir()
        first = [_seconds_to_first_page(folder) for _ in range(options.repeats)]
        rows.append(_row("command to first page, s", first))
        metrics = folder / "runs" / "run" / "metrics.jsonl"
        run = _train(folder, (9, 128, 192))
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            with _served(folder) as (address, server):
                while not metrics.is_file() or len(_steps(metrics, 0)) < 20:
                    assert run.poll() is None, (folder / "log.txt").read_text()
                    time.sleep(0.5)
                page = browser.new_page()
                took: dict[str, list[float]] = {"open": [], "closed": []}
                for number in range(options.repeats):
                    for which in sorted(took, reverse=bool(number % 2)):
                        shown = f"{address}run/run" if which == "open" else "about:blank"
                        took[which].append(_turn(page, shown, metrics, options.seconds))
                page.goto("about:blank")
                run.terminate()
                run.wait()
                against = ratio(took["open"], took["closed"])
                rows.append(_row("step with the page closed, s", took["closed"]))
                rows.append(_row("step with the page open, s", took["open"]))
                rows.append({"what": "open / closed", **against})
                time.sleep(_SETTLE_SECONDS)
                rows.append(_row(f"CPU s of the server in {_IDLE_SECONDS} s, no page open", [_cpu_seconds(server)]))
                page.goto(f"{address}run/run")
                time.sleep(_SETTLE_SECONDS)
                rows.append(_row(f"CPU s of the server in {_IDLE_SECONDS} s, an ended run open", [_cpu_seconds(server)]))
        finally:
            run.kill()
            run.wait()
            browser.close()
    write("page-cpu", " ".join(["python", *sys.argv]), rows)


def _row(what: str, values: list[float]) -> dict[str, Any]:
    return {"what": what, "median": statistics.median(values), "low": min(values), "high": max(values)}


if __name__ == "__main__":
    main()
