"""From a run's logged lines to the curves of its report: what is drawn, in plain numbers. The page's script draws it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from crepatrain.records.reading import RunRecord, first_and_last, mean

# A curve is drawn with at most about so many points: more than a screen is wide shows nothing more.
_POINTS = 900
# A smoothed curve follows about this share of the run, and at least so many points.
_SMOOTH_SHARE, _SMOOTH_POINTS = 1 / 40, 4
# The outermost values of a noisy curve may leave the picture, so that a spike does not flatten the rest.
_SEEN_SHARE = 0.98

_PARTS = ("data", "forward", "crepa", "backward", "optimizer")
# The keys of a line whose step was timed part by part.
_TIMED = {"step_seconds", "forward_seconds"}

Look = Literal["raw", "line", "dashed", "dots"]


@dataclass(frozen=True)
class Series:
    """One curve. Curves of one name share an entry of the legend.

    Attributes:
        color: name of one of the page's colours.
        look: raw is as logged, thin behind a smoothed one.
        x: steps, or the index of a category.
    """

    name: str
    color: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Mark:
    """A level on the y axis, or a step on the x axis."""

    name: str
    color: str
    at: float


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        note: what the reader should know.
        kind: line; stack: areas on top of each other; bars: side by side, and stackedbars: on top of each other, per category.
        low, high: of the y axis.
    """

    key: str
    title: str
    note: str
    series: Sequence[Series]
    low: float
    high: float
    kind: Literal["line", "stack", "bars", "stackedbars"] = "line"
    unit: str = ""
    levels: Sequence[Mark] = ()
    marks: Sequence[Mark] = ()
    categories: Sequence[str] = field(default=())

    def plain(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class Curve:
    """One number over the steps: how it is logged and how it is shown.

    Attributes:
        noisy: drawn thin, with a smoothed curve over it.
        from_zero: whether the y axis holds 0.
    """

    key: str
    title: str
    note: str = ""
    unit: str = ""
    noisy: bool = False
    from_zero: bool = False


LOSSES = (
    Curve("loss", "Loss", "diffusion + CREPA (+ LayerSync): what was optimised", noisy=True),
    Curve("diffusion_loss", "Diffusion loss", "the model's own; each step draws its noise levels, so it is noisy", noisy=True),
    Curve("crepa_loss", "CREPA loss", "weight x -alignment: negative, and it shrinks with the weight", noisy=True),
    Curve("layersync_loss", "LayerSync loss", "", noisy=True),
)
HELD_OUT = (
    Curve("eval_loss", "Held-out diffusion loss", "clips that are not trained on, at fixed noise"),
    Curve("eval_alignment", "Held-out alignment", "the same clips, scored by the projector"),
)
OPTIMIZER = (
    Curve("learning_rate", "Learning rate", from_zero=True),
    Curve("grad_norm", "Gradient norm", "before it is clipped", noisy=True, from_zero=True),
)
WEIGHT = Curve("crepa_weight", "CREPA weight", "of the alignment loss", from_zero=True)
MEMORY = Curve("peak_memory_gib", "Peak memory", "of the first GPU, since the run began", unit="GiB", from_zero=True)
FIGURES = (
    Curve("flicker", "Flicker", "of the validation videos, the mean over their prompts; lower is steadier", from_zero=True),
    Curve("consistency", "Consistency", "of the validation videos, the mean over their prompts; higher is steadier"),
)


def run_color(index: int, count: int) -> str:
    """Of several runs each has its own; one alone has the first."""
    return f"c{index if count > 1 else 0}"


def _mark_color(index: int, count: int) -> str:
    return run_color(index, count) if count > 1 else "ink"


def _of_run(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    """What a name begins with that belongs to one of several runs."""
    return f"{run.name}: " if len(runs) > 1 else ""


def curve_chart(curve: Curve, runs: Sequence[RunRecord]) -> Chart | None:
    """One number of all runs that have it; None where none has."""
    series: list[Series] = []
    for index, run in enumerate(runs):
        steps, values = run.column(curve.key)
        name = run.name if len(runs) > 1 else curve.title
        series += _drawn(name, run_color(index, len(runs)), steps, values, noisy=curve.noisy)
    return _chart(curve, series) if series else None


def _drawn(name: str, color: str, steps: Sequence[float], values: Sequence[float], *, noisy: bool) -> list[Series]:
    """A curve, and a smoothed one over it where it is noisy and long enough for that."""
    if not values:
        return []
    if not noisy or len(values) < 2 * _SMOOTH_POINTS:
        return [Series(name, color, "line" if len(values) > 1 else "dots", *thinned(steps, values))]
    smooth = smoothed(values, max(len(values) * _SMOOTH_SHARE, _SMOOTH_POINTS))
    return [
        Series(name, color, "raw", *thinned(steps, values)),
        Series(name, color, "line", *thinned(steps, smooth, like=values)),
    ]


def _chart(curve: Curve, series: Sequence[Series], **more: Any) -> Chart:
    low, high = _bounds(series, [mark.at for mark in more.get("levels", ())], from_zero=curve.from_zero)
    return Chart(curve.key, curve.title, curve.note, series, low, high, unit=curve.unit, **more)


def smoothed(values: Sequence[float], window: float) -> list[float]:
    """The exponential moving average, corrected for the weight that its first values lack."""
    decay = 1 - 1 / window
    total = weight = 0.0
    result = []
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append(total / weight)
    return result


def thinned(
    steps: Sequence[float], values: Sequence[float], *, like: Sequence[float] | None = None
) -> tuple[list[float], list[float]]:
    """The lowest and the highest value of every stretch of the curve, in their order, and both ends.

    Args:
        like: another curve, at whose steps this one is taken.
    """
    count, seen = len(values), like or values
    if count <= _POINTS:
        return list(steps), list(values)
    stretches = _POINTS // 2
    kept = {0, count - 1}
    for stretch in range(stretches):
        within = range(stretch * count // stretches, (stretch + 1) * count // stretches)
        kept |= {min(within, key=lambda index: seen[index]), max(within, key=lambda index: seen[index])}
    order = sorted(kept)
    return [steps[index] for index in order], [values[index] for index in order]


def _bounds(series: Iterable[Series], also: Iterable[float] = (), *, from_zero: bool) -> tuple[float, float]:
    seen = list(also)
    for one in series:
        ordered = sorted(one.y)
        outside = int(len(ordered) * (1 - _SEEN_SHARE)) if one.look == "raw" else 0
        seen += (ordered[outside], ordered[-1 - outside])
    if from_zero:
        seen.append(0.0)
    low, high = min(seen), max(seen)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if from_zero and low == 0 else low - room), high + room


def alignment_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Alignment and self-similarity, with the EMA and the threshold on the one that it follows, and the steps of a cutoff."""
    charts = []
    for metric, curve in (
        (
            "alignment",
            Curve("crepa_alignment_score", "Alignment", "of a frame with its own features and its neighbours'", noisy=True),
        ),
        ("self", Curve("crepa_similarity_self", "Self-similarity", "the cosine with the frame's own features alone", noisy=True)),
    ):
        series: list[Series] = []
        levels: list[Mark] = []
        marks: list[Mark] = []
        for index, run in enumerate(runs):
            of_run = _of_run(run, runs)
            color = run_color(index, len(runs))
            drawn = _drawn(run.name if of_run else curve.title, color, *run.column(curve.key), noisy=True)
            series += drawn
            if not drawn:
                continue
            marks += _cutoffs(run, of_run, _mark_color(index, len(runs)))
            threshold = run.config.get("crepa_similarity_threshold")
            if run.config.get("crepa_threshold_metric", "alignment") == metric:
                ema = thinned(*run.column("crepa_alignment_score_ema"))
                series += [Series(f"{of_run}EMA", color if of_run else "c1", "dashed", *ema)] if ema[0] else []
                if threshold is not None and threshold not in [level.at for level in levels]:
                    levels.append(Mark(f"threshold {threshold:g}", "ink", threshold))
        if series:
            charts.append(_chart(curve, series, levels=levels, marks=marks))
    return charts


def _cutoffs(run: RunRecord, of_run: str, color: str) -> list[Mark]:
    """Where CREPA went off, and came back."""
    marks = []
    before = False
    for line in run.steps:
        now = bool(line.get("crepa_cutoff"))
        if now != before:
            marks.append(Mark(f"{of_run}{'off' if now else 'on again'} at step {line['step']}", color, line["step"]))
        before = now
    return marks


def sigma_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """The diffusion loss by noise level: over the steps for one run alone, and its means at a run's end."""
    ranges = sorted({name for run in runs for line in run.steps for name in line.get("sigma_loss", {})})
    if not ranges:
        return []
    charts = []
    if len(runs) == 1:
        series = []
        for number, name in enumerate(ranges):
            steps, values = _of_sigma(runs[0].steps, name)
            smooth = smoothed(values, max(2 * len(values) * _SMOOTH_SHARE, _SMOOTH_POINTS))
            series.append(Series(f"sigma {name}", f"s{number % 5}", "line", *thinned(steps, smooth)))
        curve = Curve("sigma_loss", "Diffusion loss by noise level", "smoothed; sigma 0 is clean, 1 is noise")
        charts.append(_chart(curve, series))
    bars = []
    for index, run in enumerate(runs):
        first, last = first_and_last(run.steps)
        parts = [(run.name, run_color(index, len(runs)), last)]
        if len(runs) == 1:
            parts = [("first tenth", "muted", first), ("last tenth", "c0", last)]
        for name, color, lines in parts:
            means = [(number, mean(_of_sigma(lines, one)[1])) for number, one in enumerate(ranges)]
            found = [(number, value) for number, value in means if value is not None]
            bars.append(Series(name, color, "line", [number for number, _ in found], [value for _, value in found]))
    note = "means over the run's first and last tenth" if len(runs) == 1 else "means over each run's last tenth"
    high = 1.06 * max((value for one in bars for value in one.y), default=1.0)
    charts.append(Chart("sigma_bars", "Loss by noise level", note, bars, 0.0, high, kind="bars", categories=ranges))
    return charts


def held_out_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """The held-out numbers, and for one run alone the loss at each noise level."""
    charts = [chart for curve in HELD_OUT if (chart := curve_chart(curve, runs))]
    charts = [replace(chart, marks=_bests(runs)) if chart.key == "eval_loss" else chart for chart in charts]
    lines = [line for line in runs[0].lines if line.get("eval_sigma_loss")] if len(runs) == 1 else []
    series = [
        Series(f"sigma {name}", f"s{number % 5}", "line", *thinned(*_of_sigma(lines, name, "eval_sigma_loss")))
        for number, name in enumerate(sorted({name for line in lines for name in line["eval_sigma_loss"]}))
    ]
    if series:
        curve = Curve("eval_sigma_loss", "Held-out loss by noise level", "at fixed noise levels; sigma 0 is clean, 1 is noise")
        charts.append(_chart(curve, series))
    return charts


def _bests(runs: Sequence[RunRecord]) -> list[Mark]:
    """The steps of the best checkpoints."""
    return [
        Mark(f"{_of_run(run, runs)}best at step {run.best['step']}", _mark_color(index, len(runs)), run.best["step"])
        for index, run in enumerate(runs)
        if run.best
    ]


def _of_sigma(lines: Sequence[Mapping[str, Any]], name: str, key: str = "sigma_loss") -> tuple[list[int], list[float]]:
    found = [line for line in lines if name in line.get(key, {})]
    return [line["step"] for line in found], [line[key][name] for line in found]


def time_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Where a step's time goes: over the steps for one run, as means for several."""
    timed = {run.name: lines for run in runs if (lines := [line for line in run.steps if line.keys() >= _TIMED])}
    if not timed:
        return []
    if len(runs) > 1:
        names = list(timed)
        parts = [_parts(lines) for lines in timed.values()]
        bars = [
            Series(part, f"p{number}", "line", list(range(len(timed))), [mean(one[part]) or 0.0 for one in parts])
            for number, part in enumerate(parts[0])
        ]
        high = 1.06 * max(sum(one.y[index] for one in bars) for index in range(len(timed)))
        note = "means over all logged steps"
        return [
            Chart("step_parts", "Time of a step", note, bars, 0.0, high, kind="stackedbars", unit="s", categories=names),
            *_step_seconds(runs),
        ]
    [lines] = timed.values()
    steps = [line["step"] for line in lines]
    series = [
        Series(part, f"p{number}", "line", *_strided(steps, smoothed(values, max(len(values) * _SMOOTH_SHARE, 2))))
        for number, (part, values) in enumerate(_parts(lines).items())
    ]
    totals = sorted(sum(one.y[index] for one in series) for index in range(len(series[0].x)))
    high = 1.1 * totals[int((len(totals) - 1) * _SEEN_SHARE)]
    note = "on a GPU the waiting for data may hide behind the device's work; other is the loop and what is timed in no part"
    return [Chart("step_parts", "Time of a step", note, series, 0.0, high, kind="stack", unit="s")]


def _parts(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Seconds of every part of every step, with what is left of the step."""
    parts = {part: [line.get(f"{part}_seconds", 0.0) for line in lines] for part in _PARTS}
    known = [sum(values) for values in zip(*parts.values(), strict=True)]
    return parts | {"other": [max(line["step_seconds"] - timed, 0.0) for line, timed in zip(lines, known, strict=True)]}


def _step_seconds(runs: Sequence[RunRecord]) -> list[Chart]:
    chart = curve_chart(Curve("step_seconds", "Step time", unit="s", noisy=True, from_zero=True), runs)
    return [chart] if chart else []


def _strided(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Points at a regular distance, so that curves that are stacked keep the same steps."""
    stride = -(-len(steps) // _POINTS)
    return list(steps[::stride]), list(values[::stride])


def figure_charts(figures: Sequence[Sequence[Mapping[str, Any]]], runs: Sequence[RunRecord]) -> list[Chart]:
    """What was measured of the validation videos, the mean over the prompts of a step.

    Args:
        figures: lines of samples/figures.jsonl, per run.
    """
    charts = []
    for curve in FIGURES:
        series = []
        for index, (run, lines) in enumerate(zip(runs, figures, strict=True)):
            # A step that was validated again counts once.
            last = {(line["step"], line.get("prompt")): line[curve.key] for line in lines if curve.key in line}
            measured: dict[int, list[float]] = {}
            for (step, _), value in last.items():
                measured.setdefault(step, []).append(value)
            if measured:
                name = run.name if len(runs) > 1 else curve.title
                steps = sorted(measured)
                means = [sum(measured[step]) / len(measured[step]) for step in steps]
                series.append(Series(name, run_color(index, len(runs)), "dots", steps, means))
        if series:
            charts.append(_chart(curve, series))
    return charts


def sections(runs: Sequence[RunRecord]) -> list[tuple[str, list[Chart]]]:
    """Every chart of some runs under its heading; without those that have nothing to show."""

    def of(curves: Sequence[Curve]) -> list[Chart]:
        return [chart for curve in curves if (chart := curve_chart(curve, runs))]

    found = (
        ("Loss", of(LOSSES)),
        ("Held out", held_out_charts(runs)),
        ("CREPA", [*alignment_charts(runs), *of([WEIGHT])]),
        ("Noise levels", sigma_charts(runs)),
        ("Optimizer", of(OPTIMIZER)),
        ("Time and memory", [*time_charts(runs), *of([MEMORY])]),
    )
    return [(title, charts) for title, charts in found if charts]
