"""From the charts of a run's report to the options of ECharts, which draws them on the page."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from crepatrain.reporting.charts import Chart, Series

# Readable on a light and on a dark ground.
_NEUTRAL = "#8a8a84"
_FAINT = "rgba(138, 138, 132, 0.25)"
_BARS = {"bars", "stackedbars"}


@cache
def _palette() -> Mapping[str, str]:
    """The colours of the report, by name: those for a light ground, but for the darkest."""
    css = (files("crepatrain.reporting") / "report.css").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for name, color in re.findall(r"--([csp]\d): (#\w+)", css):
        found.setdefault(name, []).append(color)
    light = {name: colors[0] for name, colors in found.items()}
    return light | {"s4": found["s4"][-1], "p1": light["c0"], "ink": _NEUTRAL, "muted": _NEUTRAL}


def options_of(chart: Chart) -> dict[str, Any]:
    """The options of one chart."""
    category = chart.kind in _BARS
    x_axis = (
        {"type": "category", "data": list(chart.categories)}
        if category
        else {"type": "value", "min": "dataMin", "max": "dataMax"}
    )
    return _frame(chart.unit, list(dict.fromkeys(one.name for one in chart.series))) | {
        "xAxis": _axis() | x_axis,
        "yAxis": _axis()
        | {
            "type": "value",
            "min": chart.low,
            "max": chart.high,
            "name": chart.unit,
            "axisLabel": {"color": _NEUTRAL, ":formatter": _SHORT, "showMinLabel": False, "showMaxLabel": False},
        },
        "series": [_series(chart, number, one) for number, one in enumerate(chart.series)],
    }


# At most four digits: the bounds of an axis are no round numbers.
_SHORT = "value => Number(value.toPrecision(4)).toString()"


def weight_options(steps: Sequence[int], weights: Sequence[float]) -> dict[str, Any]:
    """The weight of CREPA over the steps."""
    line = {
        "name": "weight",
        "type": "line",
        "showSymbol": False,
        "data": list(map(list, zip(steps, weights, strict=True))),
        "color": _palette()["c0"],
        "areaStyle": {"opacity": 0.12},
    }
    return _frame("", []) | {
        "xAxis": _axis() | {"type": "value", "min": 0, "max": steps[-1] + 1},
        "yAxis": _axis() | {"type": "value", "min": 0},
        "series": [line],
    }


def _frame(unit: str, names: Sequence[str]) -> dict[str, Any]:
    return {
        "animation": False,
        "grid": {"left": 8, "right": 24, "top": 34 if len(names) > 1 or unit else 16, "bottom": 8, "containLabel": True},
        "legend": {"show": len(names) > 1, "type": "scroll", "top": 0, "textStyle": {"color": _NEUTRAL}, "data": list(names)},
        # Drawn on the canvas, so that no name of a file becomes HTML.
        "tooltip": {"trigger": "axis", "renderMode": "richText", "confine": True},
        "textStyle": {"fontFamily": "inherit"},
    }


def _axis() -> dict[str, Any]:
    return {
        "axisLabel": {"color": _NEUTRAL},
        "nameTextStyle": {"color": _NEUTRAL},
        "axisLine": {"lineStyle": {"color": _FAINT}},
        "splitLine": {"lineStyle": {"color": _FAINT}},
        "scale": True,
    }


def _series(chart: Chart, number: int, one: Series) -> dict[str, Any]:
    color = _palette().get(one.color, _NEUTRAL)
    shown: dict[str, Any] = {"name": one.name, "color": color, "data": list(map(list, zip(one.x, one.y, strict=True)))}
    if chart.kind in _BARS:
        return shown | {"type": "bar"} | ({"stack": "all"} if chart.kind == "stackedbars" else {})
    shown |= {"type": "line", "showSymbol": one.look == "dots" or len(one.y) < 2}
    if chart.kind == "stack":
        return shown | {"stack": "all", "areaStyle": {"opacity": 0.7}, "lineStyle": {"width": 0}}
    widths = {"raw": {"width": 1, "opacity": 0.4}, "dashed": {"width": 2, "type": "dashed"}}
    shown["lineStyle"] = widths.get(one.look, {"width": 2})
    if number == 0:
        lines = [{"yAxis": level.at, "name": level.name} for level in chart.levels]
        lines += [{"xAxis": mark.at, "name": mark.name} for mark in chart.marks]
        shown["markLine"] = {
            "symbol": "none",
            "data": lines,
            "label": {"formatter": "{b}", "position": "insideEndTop", "color": _NEUTRAL},
            "lineStyle": {"color": _NEUTRAL, "type": "dashed"},
        }
    return shown
