"""A run's folder while the run is under way: whose it is, its lock, what is logged, where the run stands."""

import contextlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from crepatrain.config.migrations import migrate
from crepatrain.config.resolved import ResolvedConfig
from crepatrain.errors import UserError
from crepatrain.files import unfinished_name, written_aside
from crepatrain.records.layout import RunLayout, checkpoints, set_aside_name, step_of
from crepatrain.records.reading import raw_lines, read_config_values, read_lines, read_run, step_of_line
from crepatrain.records.same_run import expect_same_config
from crepatrain.records.signs import is_given_back, keep_from_children, signs_of_life
from crepatrain.training.checkpoint import replace_json

# A command that looks whether a run is alive holds its lock for less.
_LOCK_SECONDS = 0.5
# Between two signs of life in status.json.
_BEAT_SECONDS = 30.0


class RunFolder(RunLayout):
    """The folder of one run. From `inspect`, or `claim` where it is new, to the end of its context no other command trains in it.

    Args:
        config: of the run, with every default filled in.
        writes: whether this process is the one that writes; the others only read.
    """

    def __init__(self, config: ResolvedConfig, *, writes: bool = True) -> None:
        super().__init__(Path(config.loop.output_dir))
        self.config = config
        self.writes = writes
        self._lock = FileLock(self.lock_file, timeout=_LOCK_SECONDS)
        self._seen: Path | None = None
        self._claimed = False
        self._last_beat = 0.0

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        is_given_back(self.lock_file)

    def inspect(self) -> Path | None:
        """Make sure that the folder is this run's, or nobody's. One that is this run's is locked; nothing else is written.

        Returns:
            The checkpoint to go on from; None: begin at step 0.

        Raises:
            UserError: the folder holds another run, one that is under way, or there is no such checkpoint.
        """
        self._expect_same_run()
        if self.config_file.is_file() or self.lock_file.is_file():
            self._acquire_lock()
        self._seen = self._checkpoint()
        return self._seen

    def claim(self, step: int) -> None:
        """Make the folder this run's, from `step` on.

        Log lines of later steps, as there are where a run goes on from an earlier checkpoint, are removed, and so are damaged
        ones; later checkpoints, adapters and videos are kept under names that end in .left.

        Raises:
            UserError: the folder is another run's or can't be written, or another command has trained in it since `inspect`.
        """
        self._claimed = True
        if not self.writes:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir={self.root}: it can't be made ({error.strerror})", "give another folder") from error
        self._acquire_lock()
        self._expect_same_run()
        if self._checkpoint() != self._seen:
            raise UserError(
                f"output_dir={self.root}: another command has trained in it while this one was preparing",
                "run the same command again",
            )
        for log in (self.metrics, self.figures):
            _remove_lines_after(log, step)
        self.mark_best()
        for unfinished in self.unfinished_checkpoints():
            shutil.rmtree(unfinished, ignore_errors=True)
        for later in self.after(step):
            _set_aside(later)
        replace_json(self.config_file, self.config.as_file())
        self.status("running", step)  # last: whatever fails before leaves the status that the run has ended with

    def _acquire_lock(self) -> None:
        """The system frees the lock when this process ends, however it ends."""
        if not self.writes or self._lock.is_locked:
            return
        try:
            self._lock.acquire()
            keep_from_children(self.lock_file)
        except Timeout:
            raise UserError(
                f"output_dir={self.root}: a run is under way in it already", "wait for it or stop it, or give a new output_dir"
            ) from None
        except NotImplementedError:
            return  # a disk that knows no locks
        except OSError as error:
            raise UserError(f"{self.lock_file}: it can't be made ({error.strerror})", "fix its permissions") from error

    def _expect_same_run(self) -> None:
        before = self._config_before()
        if before is None:
            others = sorted(path.name for path in self.root.iterdir() if path != self.lock_file) if self.root.is_dir() else []
            if others:
                raise UserError(
                    f"output_dir={self.root}: it is not empty and holds no run ({', '.join(others[:5])})", "give a new folder"
                )
            return
        if not checkpoints(self.checkpoints) and not self._has_steps():
            return  # it ended before its first step: there is nothing to lose
        expect_same_config(self.root, before, self.config.model_dump())

    def _has_steps(self) -> bool:
        """Whether a step is logged; a damaged line does not count, as `claim` removes it."""
        return any((step_of_line(text) or 0) > 0 for text in raw_lines(self.metrics))

    def _config_before(self) -> dict[str, Any] | None:
        """The config of the run that the folder holds; None if it holds none, or somebody else's config.json."""
        before = read_config_values(self)
        if not {"model_family", "output_dir"} <= before.keys():
            return None
        return migrate(before, self.config_file)

    def _checkpoint(self) -> Path | None:
        wanted = self.config.loop.resume_from_checkpoint
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
        """Append a line to metrics.jsonl.

        Raises:
            UserError: the disk is full or can't be written to.
        """
        if self.writes:
            _append(self.metrics, [line])

    def log_figures(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append what was measured of validation videos.

        Raises:
            UserError: the disk is full or can't be written to.
        """
        if self.writes:
            _append(self.figures, lines)

    def status(self, status: Literal["running", "completed", "stopped", "failed"], step: int, reason: str = "") -> None:
        """Write down where the run stands."""
        if self.writes:
            self._last_beat = time.monotonic()
            replace_json(self.status_file, {"status": status, "step": step, "reason": reason, **signs_of_life()})

    def beat(self, step: int) -> None:
        """Write down that the run goes on, where that is not known from the last half minute. A disk that is full ends no run."""
        if time.monotonic() - self._last_beat > _BEAT_SECONDS:
            with contextlib.suppress(UserError):
                self.status("running", step)

    def fail(self, reason: str) -> None:
        """Write down that a run of several processes has failed, whichever of them is left to do it."""
        if self._claimed:
            now = read_run(self.root).status
            replace_json(self.status_file, {**now, "status": "failed", "reason": reason, **signs_of_life()})

    def describe(self, dataset: Mapping[str, Any]) -> None:
        """Write down what is trained on, for the report."""
        if self.writes:
            replace_json(self.dataset_file, dataset)

    def mark_best(self) -> None:
        """Write down the checkpoint of the smallest eval_loss among all lines, for people and programs."""
        if not self.writes:
            return
        found = [line for line in self.lines() if "eval_loss" in line and line["step"] > 0]
        if found:
            best = min(found, key=lambda line: line["eval_loss"])
            replace_json(self.best_file, {"step": best["step"], "eval_loss": best["eval_loss"]})
        else:
            self.best_file.unlink(missing_ok=True)

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without what was not measured.

        Raises:
            UserError: a line is damaged; one that a kill has cut off at the end is left out.
        """
        return read_lines(self.metrics)


def _append(log: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    except OSError as error:
        raise UserError(f"{log} can't be written ({error})", "free disk space, then run the same command again") from error


def rotate(folder: Path, limit: int | None, keep: int | None = None) -> None:
    """Keep the newest `limit` checkpoints, None keeps all, and the one of step `keep`."""
    for old in checkpoints(folder)[: -limit if limit else 0]:
        if step_of(old) == keep:
            continue
        hidden = unfinished_name(old)
        old.rename(hidden)  # first out of sight: a half removed folder is never taken for a checkpoint
        shutil.rmtree(hidden, ignore_errors=True)


def _set_aside(path: Path) -> None:
    """Keep a checkpoint's folder or a file under another name, in the place of what was there before."""
    aside = set_aside_name(path)
    shutil.rmtree(aside, ignore_errors=True)
    path.replace(aside)


def _remove_lines_after(log: Path, step: int) -> None:
    """Drop the lines of a log that will be written again, and those that can't be read."""
    lines = raw_lines(log)
    steps = [step_of_line(line) for line in lines]
    kept = [line for line, at in zip(lines, steps, strict=True) if step > 0 and at is not None and at <= step]
    if len(kept) == len(lines):
        return
    try:
        with written_aside(log) as aside:
            aside.write_bytes(b"".join(line.rstrip() + b"\n" for line in kept))
    except OSError as error:
        raise UserError(f"{log} can't be written ({error})", "free disk space, or fix its permissions") from error
