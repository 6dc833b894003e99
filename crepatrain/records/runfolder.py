"""A run's folder while the run is under way: whose it is, its lock, what is logged, where the run stands."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from crepatrain.config.resolved import ResolvedConfig
from crepatrain.errors import UserError
from crepatrain.files import unfinished_name, written_aside
from crepatrain.leftovers import remove
from crepatrain.records.clip_lists import as_plain
from crepatrain.records.continuing import Continuation, find_continuation
from crepatrain.records.layout import REPLACED, RunLayout, checkpoints, set_aside_name, step_of
from crepatrain.records.reading import raw_lines, read_lines, read_status, step_of_change, step_of_line
from crepatrain.records.signs import is_given_back, keep_from_children, signs_of_life
from crepatrain.training.checkpoint import replace_json

# A command that looks whether a run is alive holds its lock for less.
_LOCK_SECONDS = 0.5
# Between two signs of life in status.json.
_BEAT_SECONDS = 30.0
# What was set aside is named one by one as far as this.
_NAMED = 12


class RunFolder(RunLayout):
    """The folder of one run. From `inspect`, or `claim` where it is new, to the end of its context no other command trains in it.

    Args:
        config: of the run, with every default filled in.
        writes: whether this process is the one that writes; the others only read.
        processes: that train together; None: not known.
    """

    def __init__(self, config: ResolvedConfig, *, writes: bool = True, processes: int | None = None) -> None:
        super().__init__(Path(config.loop.output_dir))
        self.config = config
        self.writes = writes
        self.processes = processes
        self._lock = FileLock(self.lock_file, timeout=_LOCK_SECONDS)
        self._seen = Continuation()
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
        find_continuation(self, self.config, self.processes)
        if self.config_file.is_file() or self.lock_file.is_file():
            self._acquire_lock()
        self._seen = find_continuation(self, self.config, self.processes)
        return self._seen.checkpoint

    def claim(self, step: int, clips: Sequence[str] = ()) -> list[str]:
        """Make the folder this run's, from `step` on.

        Log lines of later steps, as there are where a run goes on from an earlier checkpoint, are removed, and so are damaged
        ones; later checkpoints, adapters and videos are kept under names that end in .left. What a killed run has left half
        written is removed.

        Args:
            clips: what has changed of the clips, which is recorded beside the keys that have.

        Returns:
            What the user should know of it.

        Raises:
            UserError: the folder is another run's or can't be written, or another command has trained in it since `inspect`.
        """
        self._claimed = True
        if not self.writes:
            return []
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir={self.root}: it can't be made ({error.strerror})", "give another folder") from error
        self._acquire_lock()
        if find_continuation(self, self.config, self.processes) != self._seen:
            raise UserError(
                f"output_dir={self.root}: another command has trained in it while this one was preparing",
                "run the same command again",
            )
        try:
            notes = self._begin(step)
            self._record_changes(step, clips)
        except OSError as error:
            raise UserError(
                f"output_dir={self.root}: it can't be written ({error})", "free disk space, or fix its permissions"
            ) from error
        replace_json(self.config_file, self.config.as_file())
        self.status("running", step)  # last: whatever fails before leaves the status that the run has ended with
        return [*notes, *self._seen.notes]

    def _begin(self, step: int) -> list[str]:
        """Clear the folder of what is not of this run from `step` on."""
        self._restore_transformers()
        remove(self.leftovers())
        aside = list(reversed(self.after(step)))  # the newest first: a kill in between leaves those that `latest` shall take
        back = any(path.parent == self.checkpoints for path in aside)
        logs = [log for log in (self.metrics, self.figures) if log.is_file()]
        if self._seen.lost:
            results = [self.result_adapter, self.changes, self.best_file, *self.transformers()]
            aside += [*logs, *(path for path in results if path.exists())]
        moved = [_set_aside(path) for path in aside]
        moved += [_copy_aside(log) for log in logs if back and log.is_file()]  # the lines of the steps that are given up
        for log in (self.metrics, self.figures):
            _keep_lines(log, lambda at: 0 < step >= at)
        self.mark_best()
        if not moved:
            return []
        names = sorted(
            (str(path.relative_to(self.root)) for path in moved), key=lambda name: (not name.startswith("checkpoints"), name)
        )
        listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        return [f"what this run had of {'all' if self._seen.lost else 'later'} steps is set aside in {self.root}: {listed}"]

    def _restore_transformers(self) -> None:
        """A kill between two renames leaves the last whole transformer under another name alone."""
        for old in self.transformers(REPLACED):
            whole = old.with_name(old.name.removesuffix(REPLACED))
            if whole.exists():
                remove([old])
            else:
                old.rename(whole)

    def _record_changes(self, step: int, clips: Sequence[str]) -> None:
        """Write down what is changed from `step` on; what was changed at later steps, which are given up, holds from here on."""
        lines = []
        for text in raw_lines(self.changes):
            at = step_of_change(text)
            if at is not None:
                lines.append(text.rstrip() if at <= step else json.dumps({**json.loads(text), "step": step}).encode())
        if self._seen.changes or clips:
            keys = {change.key: [json.loads(change.before), json.loads(change.now)] for change in self._seen.changes}
            lines.append(json.dumps({"step": step, "keys": keys, "clips": list(clips)}).encode())
        if lines:
            with written_aside(self.changes) as aside:
                aside.write_bytes(b"".join(line + b"\n" for line in lines))

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

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl.

        Raises:
            UserError: the disk is full or can't be written to.
        """
        if self.writes:
            _append(self.root, self.metrics, [line])

    def log_figures(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write down what was measured of the validation videos of a step, in place of what a kill has left of it.

        Raises:
            UserError: the disk is full or can't be written to.
        """
        if self.writes:
            _keep_lines(self.figures, lambda at: at != step)
            _append(self.root, self.figures, [{"step": step, **line} for line in lines])

    def figures_at(self, step: int) -> int:
        """How many videos of a step were measured."""
        return sum(step_of_line(line) == step for line in raw_lines(self.figures))

    def status(self, status: Literal["running", "completed", "stopped", "failed"], step: int, reason: str = "") -> None:
        """Write down where the run stands."""
        if self.writes and not self.config_file.is_file():  # removed during the run; without it the folder holds no run
            replace_json(self.config_file, self.config.as_file())
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
            now = read_status(self.root)
            replace_json(self.status_file, {**now, "status": "failed", "reason": reason, **signs_of_life()})

    def describe(self, dataset: Mapping[str, Any], samples: str = "", clips: Sequence[Mapping[str, str]] = ()) -> None:
        """Write down what is trained on, for the report, and clip by clip for a run that goes on.

        Args:
            samples: digest of all samples; empty: the clips are not listed.
            clips: the fields of a `ListedClip` of each.
        """
        if self.writes:
            replace_json(self.dataset_file, dataset)
        if self.writes and samples:
            replace_json(self.clip_list(samples), as_plain(clips))

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


def _append(folder: Path, log: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    except OSError as error:
        if not folder.is_dir():
            raise UserError(
                f"output_dir={folder}: it is gone: it was removed, or its disk is no longer there",
                "bring it back where that is possible, then run the same command again",
            ) from error
        raise UserError(f"{log} can't be written ({error})", "free disk space, then run the same command again") from error


def rotate(folder: Path, limit: int | None, keep: int | None = None) -> None:
    """Keep the newest `limit` checkpoints, None keeps all, and the one of step `keep`."""
    for old in checkpoints(folder)[: -limit if limit else 0]:
        if step_of(old) == keep:
            continue
        hidden = unfinished_name(old)
        try:
            old.rename(hidden)  # first out of sight: a half removed folder is never taken for a checkpoint
        except OSError as error:
            raise UserError(f"{old} can't be removed ({error})", "fix its permissions; the newest checkpoint is whole") from error
        shutil.rmtree(hidden, ignore_errors=True)


def _set_aside(path: Path) -> Path:
    """Keep a checkpoint's folder or a file under another name, beside what was set aside before."""
    return path.replace(set_aside_name(path))


def _copy_aside(log: Path) -> Path:
    kept = set_aside_name(log)
    with written_aside(kept) as copy:
        shutil.copyfile(log, copy)
    return kept


def _keep_lines(log: Path, keeps: Callable[[int], bool]) -> None:
    """Drop the lines of a log that will be written again, by their step, and those that can't be read."""
    lines = raw_lines(log)
    steps = [step_of_line(line) for line in lines]
    kept = [line for line, at in zip(lines, steps, strict=True) if at is not None and keeps(at)]
    if len(kept) == len(lines):
        return
    try:
        with written_aside(log) as aside:
            aside.write_bytes(b"".join(line.rstrip() + b"\n" for line in kept))
    except OSError as error:
        raise UserError(f"{log} can't be written ({error})", "free disk space, or fix its permissions") from error
