"""The report as one HTML file: everything is in it, and it asks the network for nothing."""

import base64
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from crepatrain.config.run_config import KEYS
from crepatrain.labels import LABELS
from crepatrain.records.reading import RunRecord, duration, first_and_last, mean, read_lines
from crepatrain.reporting.charts import Chart, figure_charts, sections
from crepatrain.reporting.heatmap import map_section

# The size of all videos in a report together; the newest are kept.
_VIDEO_BYTES = 24 << 20
_CLIPS_SHOWN = 40
_WINDOWS_SHOWN = 200

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; media-src data:"
# The numbers of the summary.
_SUMMED_UP = ("diffusion_loss", "crepa_alignment_score", "crepa_similarity_self")
_STATES = {"completed", "running", "stopped", "failed"}


def page(runs: Sequence[RunRecord]) -> str:
    """The whole report of some runs."""
    charts: list[Chart] = []
    body = [f"<h1>{_escape(', '.join(run.name for run in runs))}</h1>", _summary(runs)]
    for title, found in sections(runs):
        body.append(f"<h2>{title}</h2>{_figures(found, charts)}")
    body += [_samples(runs, charts), *(map_section(run.root) for run in runs), _dataset(runs), _config(runs)]
    numbers = json.dumps([chart.plain() for chart in charts], allow_nan=False).replace("<", "\\u003c")
    own = files("crepatrain.reporting")
    css, script = ((own / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escape(', '.join(run.name for run in runs))} - crepatrain</title><style>{css}</style></head>\n"
        f'<body><main>{"".join(body)}</main>\n<script type="application/json" id="charts">{numbers}</script>\n'
        f"<script>{script}</script></body></html>\n"
    )


def _escape(text: object) -> str:
    return html.escape(str(text))


def _figures(found: Sequence[Chart], charts: list[Chart]) -> str:
    """Places for charts, which the script fills in."""
    figures = []
    for chart in found:
        caption = f"{_escape(chart.title)}<small>{_escape(chart.note)}</small>"
        figures.append(f'<figure data-chart="{len(charts)}"><figcaption>{caption}</figcaption></figure>')
        charts.append(chart)
    return f'<div class="charts">{"".join(figures)}</div>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """A table of HTML cells; all columns but the first are numbers where their header begins with #."""
    right = [name.startswith("#") for name in header]
    kind = [' class="number"' if one else "" for one in right]
    head = "".join(f"<th{one}>{_escape(name.lstrip('#'))}</th>" for name, one in zip(header, kind, strict=True))
    body = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td{one}>{cell}</td>" for cell, one in zip(row, kind, strict=True))
        body.append(f'<tr class="{classes[number] if classes else ""}">{cells}</tr>')
    top = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="card scroll"><table>{top}<tbody>{"".join(body)}</tbody></table></div>'


def _summary(runs: Sequence[RunRecord]) -> str:
    header = ("run", "state", "#steps", *(f"#{LABELS[key]}" for key in _SUMMED_UP), "#s / step", "#time", "#memory")
    rows = []
    for run in runs:
        state = run.status.get("status", "not started")
        chip = f'<span class="state {state if state in _STATES else ""}">{_escape(state)}</span>'
        reason = run.status.get("reason")
        seconds, memory = run.column("step_seconds")[1], run.column("peak_memory_gib")[1]
        steps = f"{run.step}" + (f" / {run.total}" if run.total else "")
        rows.append(
            (
                f"{_escape(run.name)}<br><code>{_escape(run.root)}</code>",
                chip + (f"<p>{_escape(reason)}</p>" if reason else ""),
                steps,
                *(_first_to_last(run, key) for key in _SUMMED_UP),
                f"{sorted(seconds)[len(seconds) // 2]:.3g}" if seconds else "-",
                duration(sum(seconds) * run.logging_steps) if seconds else "-",
                f"{max(memory):.1f} GiB" if memory else "-",
            )
        )
    note = "<p>Losses and scores: the mean of the first tenth of the logged steps &rarr; of the last; s / step: the median.</p>"
    return f"<h2>Summary</h2>{_table(header, rows)}{note}"


def _first_to_last(run: RunRecord, key: str) -> str:
    _, values = run.column(key)
    first, last = map(mean, first_and_last(values))
    return "-" if first is None or last is None else f"{first:.4f} &rarr; <b>{last:.4f}</b>"


def _samples(runs: Sequence[RunRecord], charts: list[Chart]) -> str:
    figures = [read_lines(run.layout.figures) for run in runs]
    measured = figure_charts(figures, runs)
    shown, left_out = _videos(runs)
    if not measured and not shown and not left_out:
        return ""
    text = "<h2>Validation</h2>" + (_figures(measured, charts) if measured else "")
    if shown:
        text += f'<div class="videos" style="margin-top:14px">{"".join(shown)}</div>'
    if left_out:
        text += f"<p>{left_out} older or larger videos are left out to keep this file small; they are in samples/.</p>"
    return text


def _videos(runs: Sequence[RunRecord]) -> tuple[list[str], int]:
    """The newest videos of all runs as far as they fit, and how many don't."""
    room, shown, left_out = _VIDEO_BYTES, [], 0
    every = [(step, number, path) for number, run in enumerate(runs) for step, path in run.videos]
    for step, number, path in sorted(every, key=lambda one: -one[0]):
        size = path.stat().st_size
        if size > room:
            left_out += 1
            continue
        room -= size
        words = [*([runs[number].name] if len(runs) > 1 else []), f"step {step}", path.name]
        video = base64.b64encode(path.read_bytes()).decode("ascii")
        caption = _escape(", ".join(words))
        shown.append(
            f'<figure><video controls loop muted playsinline preload="metadata" aria-label="{caption}" '
            f'src="data:video/mp4;base64,{video}"></video><figcaption>{caption}</figcaption></figure>'
        )
    return shown, left_out


def _dataset(runs: Sequence[RunRecord]) -> str:
    known = [run for run in runs if run.dataset]
    parts = []
    for run in known:
        facts = run.dataset
        title = f"Dataset of {run.name}" if len(runs) > 1 else "Dataset"
        header = ("bucket (frames x height x width)", "#windows", "token grid", "#tokens", "teacher grid")
        rows = [
            (
                _escape(bucket["bucket"]),
                str(bucket["windows"]),
                _escape(bucket["grid"]),
                str(bucket["tokens"]),
                _escape(bucket["teacher_grid"] or "-"),
            )
            for bucket in facts["buckets"]
        ]
        words = (
            f"{facts['clips']} clips of {_escape(facts['train_data'])}, {facts['left_out']} left out; "
            f"{facts['windows']} windows; {facts['steps_per_epoch']} steps of {facts['unit']} windows in an epoch, "
            f"{facts['steps'] / facts['steps_per_epoch']:.1f} epochs in the run"
        )
        clips = [(_escape(clip["file"]), str(clip["windows"]), _escape(clip["caption"])) for clip in facts["captions"]]
        more = len(clips) - _CLIPS_SHOWN
        listed = _table(("clip", "#windows", "caption"), clips[:_CLIPS_SHOWN]) + (f"<p>and {more} more</p>" if more > 0 else "")
        listed = f"<details><summary>captions</summary>{listed}</details>{_windows(facts.get('each', []))}"
        parts.append(f"<h2>{_escape(title)}</h2>{_table(header, rows)}<p>{words}</p>{listed}")
    return "".join(parts)


def _windows(each: Sequence[dict[str, Any]]) -> str:
    """Where each window of a dataset is from; empty for a run of a version that did not write it."""
    if not each:
        return ""
    rows = [
        (
            _escape(f"{window['file']} from {window['start']:g} s"),
            f"{window['source'][1]} x {window['source'][0]}, {window['source_fps']:g} fps",
            _escape(f"{window['crop']}, {window['kept']:.0%} left"),
            _escape(window["bucket"]),
            f"{window['weight']:g}",
            _escape("; ".join(window["warnings"])),
        )
        for window in each[:_WINDOWS_SHOWN]
    ]
    more = f"<p>and {len(each) - _WINDOWS_SHOWN} more</p>" if len(each) > _WINDOWS_SHOWN else ""
    table = _table(("window", "file", "crop", "bucket", "#times an epoch", "warnings"), rows)
    return f"<details><summary>windows</summary>{table}{more}</details>"


def _config(runs: Sequence[RunRecord]) -> str:
    """Every key: what differs between the runs first, then what was changed from its default."""
    known = [run for run in runs if run.config]
    if not known:
        return ""
    keys = list(dict.fromkeys(key for run in known for key in run.config))
    differing = [key for key in keys if len({_value(run, key) for run in known}) > 1]
    same = [key for key in keys if key not in differing]
    changed = [key for key in same if _value(known[0], key) != _default(key)]
    rest = [key for key in same if key not in changed]
    header = ("key", *(run.name if len(runs) > 1 else "value" for run in known), "default")

    def table(part: Sequence[str], row_class: str) -> str:
        rows = [
            (
                f"<code>{_escape(key)}</code>",
                *(f"<code>{_escape(_value(run, key))}</code>" for run in known),
                f"<code>{_escape(_default(key))}</code>",
            )
            for key in part
        ]
        return _table(header, rows, [row_class] * len(rows)) if rows else ""

    first = f"{table(differing, 'differs')}<p>The keys that differ.</p>" if differing else ""
    return (
        f"<h2>Config</h2>{_changes(known)}{first}{table(changed, 'changed')}"
        f"<details><summary>{len(rest)} keys at their default</summary>{table(rest, '')}</details>"
    )


def _changes(runs: Sequence[RunRecord]) -> str:
    """What was changed of a run on the way: the config is the one that it ended with."""
    return "".join(f"<p>{_escape(run.name)} was changed {_escape(words)}.</p>" for run in runs for words in run.changes)


def _default(key: str) -> str:
    if key not in KEYS:
        return "unknown to this version"
    field = KEYS[key].field
    return "required" if field.is_required() else json.dumps(field.default)


def _value(run: RunRecord, key: str) -> str:
    return json.dumps(run.config.get(key), ensure_ascii=False)
