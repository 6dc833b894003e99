"""Where a run stands, in words, from its files alone. No torch."""

import time

from crepatrain.labels import LABELS
from crepatrain.records.layout import checkpoints, step_of
from crepatrain.records.reading import RunRecord, duration, mean
from crepatrain.records.signs import heartbeat_of, is_locked, is_of_this_host

# Lines of metrics.jsonl over which the speed is taken.
_RECENT = 20
# A running run that has written nothing for so many logged lines, and for at least so many seconds, may have died.
_SILENT_LINES, _SILENT_SECONDS = 10, 600


def standing(run: RunRecord) -> list[tuple[str, str]]:
    """Where a run stands, as (topic, words)."""
    return [
        ("state", state_of(run)),
        ("progress", progress_of(run)),
        ("numbers", numbers_of(run)),
        ("saved", _saved(run)),
        ("validation", _validation(run)),
        *(("changed", words) for words in run.changes),
    ]


def state_of(run: RunRecord) -> str:
    """Whether a run goes on, or how it ended."""
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


def progress_of(run: RunRecord) -> str:
    """The steps that are done, their speed, and the time that is left."""
    seconds, total = _step_seconds(run), run.total
    words = f"step {run.step}" + (f" of {total} ({run.step / total:.0%})" if total else "")
    if seconds is None:
        return words
    words += f", {seconds:.3g} s a step"
    left = (total or run.step) - run.step
    return f"{words}, {duration(left * seconds)} left" if left else words


def numbers_of(run: RunRecord) -> str:
    """The losses and scores that were logged last."""
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
