"""SIGKILL at random instants of every stage of a run; then the same command, whose result must be that of a run never killed.

    python benchmarks/kill.py --kills 60                  # all
    python benchmarks/kill.py --first 30 --kills 30       # the second half: added to the log of the first

The stage is read from the run's folder, from outside: the process is halted, its stage looked at, and killed only where that is
the wanted one. Each kill is a line of results/kill-cpu.txt; the table counts them by stage and mode.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

LOG = Path(__file__).parent / "results" / "kill-cpu.txt"
COMMAND = [sys.executable, "-m", "crepatrain"]
STAGES = ("start", "caching", "stepping", "exporting", "saving", "rotating", "validating")
MODES: Mapping[str, Mapping[str, Any]] = {
    "lora": {"lora_dropout": 0.2, "caption_dropout": 0.5, "crepa_similarity_threshold": 1.2, "crepa_similarity_ema_decay": 0.9},
    "full": {"model_type": "full", "lora_rank": None, "adam_weight_decay": 0.0},
    "ema": {"use_ema": True, "ema_decay": 0.8, "lr_warmup_steps": 4, "crepa_warmup_steps": 2},
    "recoverable": {
        "crepa_similarity_threshold": 0.3,
        "crepa_threshold_mode": "recoverable",
        "crepa_similarity_ema_decay": 0.2,
        "lora_dropout": 0.1,
    },
}
VALIDATION_STEPS = 4
COMMON: Mapping[str, Any] = {
    "model_family": "wan",
    "height": 64,
    "width": 96,
    "num_frames": 9,
    "max_train_steps": 8,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 2,
    "validation_steps": VALIDATION_STEPS,
    "validation_prompts": ["a square"],
    "validation_sampling_steps": 10,
    "mixed_precision": "no",
    "lora_rank": 4,
    "learning_rate": 1e-3,
    "crepa_enabled": True,
    "crepa_encoder_image_size": "grid",
}
_TIMES = re.compile(r".*_seconds|samples_per_second|peak_memory_gib")
_STEP = re.compile(r"step-(\d+)(\.tmp)?")
_WAITS = 600.0


def stage_of(run: Path, cache: Path) -> str:
    """Which stage a run is in, by its files; "loading" is between caching and the first step."""
    names = _names(run)
    if "status.json" not in names:
        return "caching" if _names(cache / "latents") | _names(cache / "text") else "start"
    found = [_STEP.fullmatch(name) for name in _names(run / "checkpoints")]
    whole = [int(match[1]) for match in found if match and not match[2]]
    unfinished = [int(match[1]) for match in found if match and match[2]]
    newest = max(whole, default=0)
    if unfinished:
        return "saving" if max(unfinished) > newest else "rotating"
    exported = _names(run / "adapters") | {name for name in names if name.startswith(("pytorch_lora", "transformer"))}
    if any(name.endswith(".tmp") for name in exported):
        return "exporting"
    if newest % VALIDATION_STEPS == 0 and f"step-{newest:06d}.mp4" not in _names(run / "samples"):
        return "validating" if newest else "loading"
    return "stepping"


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 - a thousand times a second
    except OSError:
        return set()


@dataclass(frozen=True)
class Setting:
    """Where one mode is trained: its config, its folders, and the result that it must have.

    Attributes:
        spans: by stage the seconds of each time that the run which was not killed was in it.
    """

    folder: Path
    mode: str
    spans: Mapping[str, list[float]]

    @classmethod
    def prepare(cls, folder: Path, mode: str, base: Path, clips: Path, **changes: Any) -> "Setting":
        """Train once without a kill, and keep the result."""
        folder.mkdir(parents=True)
        values = COMMON | MODES[mode] | {"pretrained_model_name_or_path": str(base), "crepa_encoder": str(base / "encoder")}
        values |= {"train_data": str(clips), "output_dir": str(folder / "run"), "cache_dir": str(folder / "cache")} | changes
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in values.items() if value is not None}), encoding="utf-8"
        )
        process = _start(folder)
        spans: dict[str, list[float]] = defaultdict(list)
        before, since = "start", time.monotonic()
        while process.poll() is None:
            stage = stage_of(folder / "run", folder / "cache")
            if stage != before:
                now = time.monotonic()
                spans[before].append(now - since)
                before, since = stage, now
        assert process.returncode == 0, (folder / "log.txt").read_text(encoding="utf-8")
        (folder / "run").rename(folder / "whole")
        return cls(folder, mode, spans)

    def kill(self, stage: str, source: random.Random, number: int) -> dict[str, Any]:
        """Kill a new run at a random instant of a stage, let the same command end it, and compare."""
        while (found := self._killed_in(stage, source)) is None:
            pass  # the stage was over before the process stood still: from the beginning
        said = _status(self.folder / "run")
        process = _start(self.folder)
        code = process.wait(timeout=_WAITS)
        differs = self.differences() if code == 0 else [f"exit code {code}: {(self.folder / 'log.txt').read_text()[-400:]}"]
        if "status.json" in found["names"] and "it ended without a word" not in said:
            differs.append(f"status: {said}")
        line = {"kill": number, "stage": stage, "mode": self.mode, "time": found["time"], "after_ms": found["after_ms"]}
        return line | {"step": found["step"], "goes_on_from": found["saved"], "differences": differs}

    def _killed_in(self, stage: str, source: random.Random) -> dict[str, Any] | None:
        run, cache = self.folder / "run", self.folder / "cache"
        shutil.rmtree(run, ignore_errors=True)
        if stage in ("start", "caching"):
            shutil.rmtree(cache, ignore_errors=True)
        spans = self.spans.get(stage) or [0.05]
        wanted = source.choices(range(len(spans)), weights=spans)[0]  # every instant of the stage is as likely as another
        delay = source.uniform(0, spans[wanted])
        process, times, before = _start(self.folder), -1, ""
        try:
            while process.poll() is None:
                now = stage_of(run, cache)
                times += now == stage != before
                before = now
                if now != stage or times < wanted:
                    time.sleep(0.0 if stage in ("rotating", "saving", "exporting") else 0.001)
                    continue
                began = time.monotonic()
                while (left := began + delay - time.monotonic()) > 0:
                    time.sleep(min(left, 0.001) if left > 0.002 else 0)
                os.kill(process.pid, signal.SIGSTOP)
                if not os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1]):
                    return None
                after = time.monotonic() - began
                if stage_of(run, cache) == stage:
                    at = {"time": wanted + 1, "after_ms": round(after * 1000, 1), "names": sorted(_names(run))}
                    return at | {"step": _last_step(run), "saved": max(_saved(run), default=0)}
                delay = source.uniform(0, delay)  # too late by now: earlier, at its next time
                os.kill(process.pid, signal.SIGCONT)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return None

    def differences(self) -> list[str]:
        """Of the run that was killed from the one that was not: numbers without times, figures, names and values of tensors."""
        run, whole = self.folder / "run", self.folder / "whole"
        found = [
            f"{log}: other lines"
            for log in ("metrics.jsonl", "samples/figures.jsonl")
            if list(_lines(run / log)) != list(_lines(whole / log))
        ]
        files = [{str(path.relative_to(root)) for path in root.rglob("*.safetensors")} for root in (run, whole)]
        found += [f"{name}: only in one of them" for name in sorted(files[0] ^ files[1])]
        for name in sorted(files[0] & files[1]):
            own, others = load_file(run / name), load_file(whole / name)
            if own.keys() != others.keys() or not all(torch.equal(own[key], others[key]) for key in own):
                found.append(f"{name}: other tensors")
        return found


def _start(folder: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("wb") as log:
        command = [*COMMAND, "fit", str(folder / "config.json")]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _status(run: Path) -> str:
    ended = subprocess.run([*COMMAND, "status", str(run)], capture_output=True, text=True, check=False)
    return (ended.stdout + ended.stderr).partition("\n")[0]


def _lines(log: Path) -> Iterator[dict[str, Any]]:
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        yield {key: value for key, value in json.loads(line).items() if not _TIMES.fullmatch(key)}


def _last_step(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b'"loss"') if log.is_file() else 0


def _saved(run: Path) -> list[int]:
    found = (_STEP.fullmatch(name) for name in _names(run / "checkpoints"))
    return [int(match[1]) for match in found if match and not match[2]]


def sequence() -> Iterator[tuple[str, str]]:
    """Endless (stage, mode): every cell once, then again."""
    while True:
        for stage in STAGES:
            for mode in MODES:
                yield stage, mode


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--first", type=int, default=0, help="number of kills that are done already; their lines stay in the log")
    options = parser.parse_args()
    from common import write

    done = [json.loads(line) for line in LOG.read_text(encoding="utf-8").splitlines()][: options.first] if options.first else []
    assert len(done) == options.first, f"{LOG} holds {len(done)} kills"
    order = sequence()
    kills = [next(order) for _ in range(options.first + options.kills)]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        base, clips = folder / "base", folder / "clips"
        for arguments in (["make-random", "wan", str(base)], ["make-clips", str(clips)]):
            subprocess.run([*COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL)
        settings: dict[str, Setting] = {}
        for number, (stage, mode) in enumerate(kills):
            if number < options.first:
                continue
            if mode not in settings:
                settings[mode] = Setting.prepare(folder / mode, mode, base, clips, dataloader_num_workers=len(settings) % 2)
            done.append(settings[mode].kill(stage, random.Random(number), number))
            print(json.dumps(done[-1]), flush=True)
            LOG.write_text("".join(json.dumps(line) + "\n" for line in done), encoding="utf-8")
    cells = Counter((line["stage"], line["mode"]) for line in done)
    good = Counter((line["stage"], line["mode"]) for line in done if not line["differences"])
    rows = [{"stage": cell[0], "mode": cell[1], "kills": cells[cell], "to_the_bit": good[cell]} for cell in sorted(cells)]
    write("kill-cpu", "python benchmarks/kill.py --kills 60", rows)
    sys.exit(any(line["differences"] for line in done))


if __name__ == "__main__":
    main()
