"""Where a run stands, in five lines, from its files alone."""

import time
from pathlib import Path

from crepatrain.labels import LABELS
from crepatrain.records.layout import checkpoints, step_of
from crepatrain.records.reading import RunRecord, duration, mean, read_run
from crepatrain.records.signs import heartbeat_of, is_locked, is_of_this_host
from crepatrain.screen import Screen

# Lines of metrics.jsonl over which the speed is taken.
_RECENT = 20
# A running run that has written nothing for so many logged lines, and for at least so many seconds, may have died.
_SILENT_LINES, _SILENT_SECONDS = 10, 600


def status(root: Path, screen: Screen) -> None:
    """Print where a run stands.

    Raises:
        UserError: the folder holds no run, or a damaged one.
    """
    run = read_run(root)
    for topic, words in (
        ("state", _state(run)),
        ("progress", _progress(run)),
        ("numbers", _numbers(run)),
        ("saved", _saved(run)),
        ("validation", _validation(run)),
        *(("changed", words) for words in run.changes),
    ):
        screen.say(f"{topic:<12}{words.encode(errors='replace').decode()}")  # paths may hold bytes that are no text


def _state(run: RunRecord) -> str:
    state, reason = run.status.get("status", "not started"), run.status.get("reason")
    words = f"{state}: {reason}" if reason else state
    locked = is_locked(run.layout.lock_file)
    if state != "running":
        return words + ("; a command is at work in it now" if locked else "")
    if locked is False and is_of_this_host(run.status):
        return f"it ended without a word at step {run.step}: the same command {_goes_on(run)}"
    written = [path.stat().st_mtime for path in (run.layout.metrics, run.layout.status_file) if path.is_file()]
    if not is_of_this_host(run.status) and (beat := heartbeat_of(run.status)):
        words, written = f"{words} on {run.status.get('host')}", [beat]  # a shared disk may show another time, or an old file
    silent = max(time.time() - max(written), 0.0)
    words += f", last written {duration(silent)} ago"
    between = (_step_seconds(run) or 0.0) * run.logging_steps
    if silent <= max(_SILENT_LINES * between, _SILENT_SECONDS):
        return words
    return f"{words}; {'its process is there, but may hang' if locked else 'it may have died'}"


def _goes_on(run: RunRecord) -> str:
    saved = checkpoints(run.layout.checkpoints)
    return f"goes on from step {step_of(saved[-1])}" if saved else "begins it anew"


def _step_seconds(run: RunRecord) -> float | None:
    return mean(run.column("step_seconds")[1][-_RECENT:])


def _progress(run: RunRecord) -> str:
    seconds, total = _step_seconds(run), run.total
    words = f"step {run.step}" + (f" of {total} ({run.step / total:.0%})" if total else "")
    if seconds is None:
        return words
    words += f", {seconds:.3g} s a step"
    left = (total or run.step) - run.step
    return f"{words}, {duration(left * seconds)} left" if left else words


def _numbers(run: RunRecord) -> str:
    if not run.steps:
        return "none logged yet"
    last = run.steps[-1]
    numbers = [
        f"{LABELS[key]} {last[key]:.4f}"
        for key in ("loss", "diffusion_loss", "crepa_alignment_score", "crepa_similarity_self", "crepa_weight")
        if key in last
    ]
    cutoff = last.get("crepa_cutoff")
    return "  ".join([*numbers, *([] if cutoff is None else [f"CREPA {'cut off' if cutoff else 'on'}"])])


def _saved(run: RunRecord) -> str:
    newest = [*checkpoints(run.layout.checkpoints)[-1:], *run.layout.all_adapters()[-1:]]
    return ", ".join(str(path.relative_to(run.root)) for path in newest) or "no checkpoint yet"


def _validation(run: RunRecord) -> str:
    parts = []
    for key in ("eval_loss", "eval_alignment"):
        steps, values = run.column(key)
        if values:
            parts.append(f"{key} {values[-1]:.4f} at step {steps[-1]}")
        if values and key == "eval_loss" and run.best:
            parts[-1] += f" (best {run.best['eval_loss']:.4f} at step {run.best['step']})"
    if run.videos:
        parts.append(f"samples of step {run.videos[0][0]}")
    return ", ".join(parts) or "none yet"
