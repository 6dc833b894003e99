"""A run's folder: whose run it is, where it stands, what it has logged."""

import json
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from filelock import FileLock, Timeout

from crepatrain.config.sections import RunConfig
from crepatrain.config.sources import read_checkpoint
from crepatrain.errors import UserError
from crepatrain.families import get_family
from crepatrain.families.base import Family
from crepatrain.records.reading import BEST_FILE, read_best
from crepatrain.specs import FAMILIES
from crepatrain.training.checkpoint import checkpoints, replace_json, step_of

_LOCK_FILE = ".lock"
_STEP_AT_THE_END = re.compile(r"-(\d{6,})$")


class Tracker(Protocol):
    """Where logged lines go beside metrics.jsonl, and videos beside samples/."""

    def log(self, line: Mapping[str, Any]) -> None: ...

    def show(self, step: int, videos: Mapping[str, np.ndarray], file: Path) -> None:
        """Videos [F, H, W, 3] uint8 by prompt, and the file in which they stand side by side."""
        ...

    def close(self) -> None: ...


class RunFolder:
    """The folder of one run. From `look`, or `claim` where it is new, to the end of its context no other command trains in it.

    Args:
        config: of the run, with every default filled in.
        writes: whether this process is the one that writes; the others only look.
    """

    def __init__(self, config: RunConfig, *, writes: bool = True) -> None:
        self.writes = writes
        self.trackers: list[Tracker] = []
        self.root = Path(config.output_dir)
        self.checkpoints = self.root / "checkpoints"
        self.adapters = self.root / "adapters"
        self.metrics = self.root / "metrics.jsonl"
        self._config_file = self.root / "config.json"
        self._status_file = self.root / "status.json"
        self.config = config
        self._lock = FileLock(self.root / _LOCK_FILE, timeout=0)
        self._seen: Path | None = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def look(self) -> Path | None:
        """Make sure that the folder is this run's, or nobody's. One that is, is locked; nothing else is written.

        Returns:
            The checkpoint to go on from; None: begin at step 0.

        Raises:
            UserError: the folder holds another run, one that is under way, or there is no such checkpoint.
        """
        self._expect_same_run()
        if self._config_file.is_file() or (self.root / _LOCK_FILE).is_file():
            self._take()
        self._seen = self._checkpoint()
        return self._seen

    def mark_best(self) -> None:
        """Write down the checkpoint of the smallest eval_loss among all lines, for people and programs."""
        found = [line for line in self.lines() if line.get("eval_loss") is not None and line["step"] > 0]
        if found:
            best = min(found, key=lambda line: line["eval_loss"])
            replace_json(self.root / BEST_FILE, {"step": best["step"], "eval_loss": best["eval_loss"]})
        else:
            (self.root / BEST_FILE).unlink(missing_ok=True)

    def claim(self, step: int) -> None:
        """Make the folder this run's, from `step` on.

        What later steps have left, as a resume from an earlier one does, is forgotten or set aside under names ending in .left.
        """
        if not self.writes:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir={self.root}: it can't be made ({error.strerror})", "give another folder") from error
        self._take()
        self._expect_same_run()
        if self._checkpoint() != self._seen:
            raise UserError(
                f"output_dir={self.root}: another command has trained in it while this one was preparing", "give it again"
            )
        self.status("running", step)
        replace_json(self._config_file, self.config.model_dump())
        for log in (self.metrics, self.root / "samples" / "figures.jsonl"):
            _forget_after(log, step)
        self.mark_best()
        for unfinished in self.checkpoints.glob("step-*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        for later in checkpoints(self.checkpoints):
            if step_of(later) > step:
                aside = later.with_name(f"{later.name}.left")
                shutil.rmtree(aside, ignore_errors=True)
                later.rename(aside)
        for pattern in ("samples/step-*.mp4", "adapters/*.safetensors"):
            for path in self.root.glob(pattern):
                match = _STEP_AT_THE_END.search(path.stem)
                if match and (step == 0 or int(match.group(1)) > step):
                    path.replace(path.with_name(f"{path.name}.left"))

    def _take(self) -> None:
        """The system frees the lock when this process ends, however it ends."""
        if not self.writes or self._lock.is_locked:
            return
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"output_dir={self.root}: a run is under way in it already", "wait for it or stop it, or give a new output_dir"
            ) from None
        except NotImplementedError:
            return  # a disk that knows no locks
        except OSError as error:
            raise UserError(f"{self._lock.lock_file}: it can't be made ({error.strerror})", "mend its permissions") from error

    def _expect_same_run(self) -> None:
        before = self._config_before()
        if before is None:
            strangers = sorted(path.name for path in self.root.iterdir() if path.name != _LOCK_FILE) if self.root.is_dir() else []
            if strangers:
                raise UserError(
                    f"output_dir={self.root}: it is not empty and holds no run ({', '.join(strangers[:5])})", "give a new folder"
                )
            return
        if not checkpoints(self.checkpoints) and not any(line["step"] > 0 for line in self.lines()):
            return  # it ended before its first step: there is nothing to lose
        now = self.config.model_dump()
        # A key that the run did not know yet had the meaning of its default.
        defaults = {key: field.default for key, field in RunConfig.model_fields.items() if key not in before}
        before |= {key: now[key] if default is None else default for key, default in defaults.items()}
        changed = [key for key in sorted(now.keys() | before.keys()) if now.get(key) != before.get(key) and not _may_change(key)]
        if changed:
            listed = "; ".join(f"{key}: {json.dumps(before.get(key))} there, {json.dumps(now.get(key))} here" for key in changed)
            raise UserError(
                f"output_dir={self.root} holds a different run ({listed})",
                "give a new output_dir, or the same values to continue it",
            )

    def _config_before(self) -> dict[str, Any] | None:
        """The config of the run that the folder holds; None if it holds none, or somebody else's config.json."""
        if not self._config_file.is_file():
            return None
        try:
            before = json.loads(self._config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self._config_file} can't be read ({error})", "give a new output_dir") from None
        return before if isinstance(before, dict) and {"model_family", "output_dir"} <= before.keys() else None

    def _checkpoint(self) -> Path | None:
        wanted = self.config.resume_from_checkpoint
        found = checkpoints(self.checkpoints)
        if wanted is None:
            if found:
                raise UserError(
                    f"output_dir={self.root} holds a run at step {step_of(found[-1])}, and resume_from_checkpoint is null",
                    "give a new output_dir, or set resume_from_checkpoint to latest",
                )
            return None
        if wanted == "latest":
            return found[-1] if found else None
        for path in found:
            if path.name == Path(wanted).name:
                return path
        names = ", ".join(path.name for path in found) or "none yet"
        raise UserError(
            f"resume_from_checkpoint={wanted}: no such checkpoint in {self.checkpoints}", f"use latest, or one of: {names}"
        )

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, and tell the trackers."""
        if not self.writes:
            return
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"{self.metrics} can't be written ({error})", "free disk space, then give the same command"
            ) from error
        for tracker in self.trackers:
            tracker.log(line)

    def show(self, step: int, videos: Mapping[str, np.ndarray], file: Path) -> None:
        """Tell the trackers of the videos of a step."""
        for tracker in self.trackers:
            tracker.show(step, videos, file)

    def status(self, status: Literal["running", "completed", "stopped", "failed"], step: int, reason: str = "") -> None:
        """Say where the run stands."""
        if self.writes:
            replace_json(self._status_file, {"status": status, "step": step, "reason": reason})

    def describe(self, dataset: Mapping[str, Any]) -> None:
        """Write down what is trained on, for the report."""
        if self.writes:
            replace_json(self.root / "dataset.json", dataset)

    def lines(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds, without what a kill has cut off."""
        if not self.metrics.is_file():
            return []
        found = self.metrics.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in found if _step_of_line(line) < math.inf]


def expect_same_fingerprint(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what a checkpoint was made from with what there is now.

    Raises:
        UserError: something of it has changed.
    """
    # The encoder is in neither where no teacher is asked any more.
    parts = sorted(
        part for part in before["models"].keys() & now["models"].keys() if before["models"][part] != now["models"][part]
    )
    changed = [f"the weights of {', '.join(parts)}"] if parts else []
    changed += ["the clips or captions"] if before["samples"] != now["samples"] else []
    changed += ["the number of samples of a step"] if before["unit"] != now["unit"] else []
    if changed:
        raise UserError(f"{' and '.join(changed)} changed since this run's checkpoint", "put them back, or give a new output_dir")


def _may_change(key: str) -> bool:
    # A key that this version doesn't know is a difference: it may have meant something.
    return key == "output_dir" or (key in RunConfig.model_fields and RunConfig.may_change(key))


def _forget_after(log: Path, step: int) -> None:
    """Drop the lines of a log that will be written again, and one that was cut off."""
    if not log.is_file():
        return
    lines = log.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if step > 0 and _step_of_line(line) <= step]
    if len(kept) != len(lines):
        aside = log.with_name(f"{log.name}.tmp")
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        aside.replace(log)


def _step_of_line(line: str) -> float:
    """Of a metrics line; one that a kill has cut off belongs nowhere."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf


def asked_step(root: Path, text: str | None) -> int | None:
    """What `--step` means: a number, or `best`; None: the last.

    Raises:
        UserError: it is neither, or the run held nothing out.
    """
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    if text != "best":
        raise UserError(f"--step {text}: no step", "give a number, or best")
    best = read_best(root).get("step")
    if best is None:
        raise UserError(
            f"--step best: {root} has no {BEST_FILE}, as it held out no clips", "give a number, or train with eval_share"
        )
    return best


def config_of(run: Path) -> RunConfig:
    """The config of a run's folder.

    Raises:
        UserError: it holds no run.
    """
    path = run / "config.json"
    try:
        return RunConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} can't be read ({reason})", "give the folder of a run, its output_dir") from error


def family_of(config: RunConfig) -> Family:
    """The family as a run's base is; of the base only the JSON files are read.

    Raises:
        UserError: the base is gone.
    """
    source, revision = config.pretrained_model_name_or_path, config.revision
    checkpoint, _ = read_checkpoint(source, revision, FAMILIES[config.model_family], config.wan_expert, online=False)
    return get_family(config.model_family, checkpoint, task=config.task, expert=config.wan_expert)


def adapter_name(config: RunConfig, family: Family) -> str:
    """How the run's adapters are named, with the expert that they are for."""
    return config.output_name + (f"_{family.variant.expert}_noise" if family.variant.expert else "")
