"""Every clip as it would be trained, before anything is: in words, as JSON, and on a page."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crepatrain.config.plan import Plan
from crepatrain.data.buckets import Window
from crepatrain.errors import UserError
from crepatrain.files import written_aside
from crepatrain.outputs import expect_writable
from crepatrain.preparing.context import Context
from crepatrain.preparing.inspection import WindowRow, inspect, without_caption
from crepatrain.preparing.preflight import Dataset, read_dataset
from crepatrain.reporting.contact_sheet import ContactSheet
from crepatrain.screen import Screen
from crepatrain.stopping import StopSignal

_NAMED = 5


def preflight(
    plan: Plan, screen: Screen, stop: StopSignal, *, html: Path | None = None, missing: Path | None = None
) -> tuple[Dataset, list[WindowRow]]:
    """Look at every window as training reads it, and say what its owner may want to know.

    Clips without a caption and files that can't be used are named rather than refused.

    Args:
        html: a page to write.
        missing: a .csv list to write of the clips without a caption.

    Raises:
        UserError: a dataset that can't be read, or a file that can't be written.
        Stopped: a signal came.
    """
    for path, option in ((html, "html"), (missing, "write-missing")):
        if path is not None:
            _expect_place(plan, path, option)
    lenient = replace(plan, config=plan.config.changed(missing_captions="empty", unusable_clips="skip"))
    context = Context(lenient, screen, torch.device("cpu"), stop)
    uncaptioned = without_caption(plan)
    dataset = read_dataset(context, download=False)
    sheet = ContactSheet(html, len(dataset.clips.windows), plan.fps) if html else None

    def each(_window: Window, frames: Tensor) -> None:
        if sheet:
            sheet.add(frames)

    rows = inspect(context, dataset, each)
    if sheet:
        notes = [f"{refusal.path}: left out, {refusal.reason}" for refusal in dataset.refused]
        sheet.write(", ".join(str(dataset.path) for dataset in plan.datasets), rows, notes)
    if missing:
        _write_missing(missing, uncaptioned)
    _say(rows, dataset, uncaptioned, screen)
    for path in filter(None, (html, missing)):
        screen.say(f"{path}: written")
    return dataset, rows


def as_json(rows: Sequence[WindowRow], dataset: Dataset) -> str:
    """One object for each window, and the files that are left out."""
    left_out = [{"file": str(refusal.path), "reason": refusal.reason} for refusal in dataset.refused]
    plain: dict[str, Any] = {"windows": [row.plain() for row in rows], "left_out": left_out}
    return json.dumps(plain, indent=2)


def _expect_place(plan: Plan, path: Path, option: str) -> None:
    """A file may be written there, and what stands beside it will not be taken for clips."""
    for dataset in plan.datasets:
        if dataset.path.is_dir() and path.resolve().is_relative_to(dataset.path.resolve()):
            raise UserError(f"--{option} {path}: it is inside a dataset, {dataset.path}", "give another folder")
    expect_writable(path)


def _write_missing(path: Path, clips: Sequence[str]) -> None:
    try:
        with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("video", "caption"))
            writer.writerows((str(Path(clip).absolute()), "") for clip in clips)
    except (OSError, UnicodeEncodeError) as error:
        raise UserError(f"--write-missing {path}: it can't be written ({error})", "give another file") from error


def _say(rows: Sequence[WindowRow], dataset: Dataset, uncaptioned: Sequence[str], screen: Screen) -> None:
    warned = [row for row in rows if row.warnings]
    table = [
        (f"{Path(row.clip).name} from {row.start:g} s", "; ".join(row.warnings))
        for row in sorted(warned, key=lambda row: -len(row.warnings))[:_NAMED]
    ]
    if table:
        screen.table("windows to look at", ("window", "why"), table)
    buckets = Counter(row.bucket for row in rows)
    lines = [
        ("windows", f"{len(rows)} in {len(buckets)} bucket{'s' * (len(buckets) != 1)}, {len(warned)} to look at"),
        ("left out", f"{len(dataset.refused)} files"),
        ("without a caption", f"{len(uncaptioned)} clips; missing_captions decides"),
    ]
    screen.rows("preflight", lines)
