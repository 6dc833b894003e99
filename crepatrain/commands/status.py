"""Where a run stands, in five lines, from its files alone."""

import time
from pathlib import Path

from crepatrain.records.reading import RunRecord, duration, mean, read_run
from crepatrain.screen import Screen

# Lines of metrics.jsonl over which the speed is taken.
_RECENT = 20
# A running run that has written nothing for so many logged lines, and for at least so many seconds, may have died.
_SILENT_LINES, _SILENT_SECONDS = 10, 600


def status(root: Path, screen: Screen) -> None:
    """Print what a run does.

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
    ):
        screen.say(f"{topic:<12}{words.encode(errors='replace').decode()}")  # paths may hold what is no text


def _state(run: RunRecord) -> str:
    state, reason = run.status.get("status", "not begun"), run.status.get("reason")
    told = f"{state}: {reason}" if reason else state
    written = [path.stat().st_mtime for path in (run.root / "metrics.jsonl", run.root / "status.json") if path.is_file()]
    if state != "running" or not written:
        return told
    silent = time.time() - max(written)
    told += f", last heard of {duration(silent)} ago"
    between = (_step_seconds(run) or 0.0) * run.logging_steps
    return told + ("; it may have died" if silent > max(_SILENT_LINES * between, _SILENT_SECONDS) else "")


def _step_seconds(run: RunRecord) -> float | None:
    return mean(run.column("step_seconds")[1][-_RECENT:])


def _progress(run: RunRecord) -> str:
    seconds, total = _step_seconds(run), run.total
    told = f"step {run.step}" + (f" of {total} ({run.step / total:.0%})" if total else "")
    if seconds is None:
        return told
    told += f", {seconds:.3g} s a step"
    left = (total or run.step) - run.step
    return f"{told}, {duration(left * seconds)} to go" if left else told


def _numbers(run: RunRecord) -> str:
    if not run.steps:
        return "none logged yet"
    last = run.steps[-1]
    told = [
        f"{name} {last[key]:.4f}"
        for name, key in (
            ("loss", "loss"),
            ("diffusion loss", "diffusion_loss"),
            ("alignment", "crepa_alignment_score"),
            ("self-similarity", "crepa_similarity_self"),
            ("weight", "crepa_weight"),
        )
        if key in last
    ]
    cutoff = last.get("crepa_cutoff")
    return "  ".join([*told, *([] if cutoff is None else [f"CREPA {'cut off' if cutoff else 'on'}"])])


def _saved(run: RunRecord) -> str:
    found = (run.newest("checkpoints", "step-*"), run.newest("adapters", "*.safetensors"))
    return ", ".join(str(path.relative_to(run.root)) for path in found if path) or "no checkpoint yet"


def _validation(run: RunRecord) -> str:
    told = []
    for key in ("eval_loss", "eval_alignment"):
        steps, values = run.column(key)
        if values:
            told.append(f"{key} {values[-1]:.4f} at step {steps[-1]}")
        if values and key == "eval_loss" and run.best:
            told[-1] += f" (best {run.best['eval_loss']:.4f} at step {run.best['step']})"
    if run.videos:
        told.append(f"samples of step {run.videos[0][0]}")
    return ", ".join(told) or "none yet"
