"""What the user sees: tables, progress, the live line of training; plain lines where the output is no terminal."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from crepatrain.errors import Problem
from crepatrain.labels import LABELS

_PLAIN_SECONDS = 10.0

# The numbers of the live line, and how each is written.
_COLUMNS: Mapping[str, str] = {
    "diffusion_loss": ".4f",
    "crepa_loss": ".4f",
    "crepa_alignment_score": ".4f",
    "crepa_similarity_self": ".4f",
    "crepa_weight": ".3f",
    "learning_rate": ".2e",
    "grad_norm": ".3f",
}


class Screen:
    """A terminal as `crepatrain.screen.Screen` asks for one, drawn by rich; plain lines where the output is none.

    Args:
        quiet: print nothing (processes other than the first).
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False)
        self.errors = Console(stderr=True, highlight=False)
        for console in (self.console, self.errors):
            console.soft_wrap = not console.is_terminal  # a log keeps its lines whole, a window breaks them between words

    def say(self, text: str = "") -> None:
        """A line."""
        self.console.print(escape(text))

    def note(self, text: str) -> None:
        """Something that the user should know though nothing is wrong."""
        self.console.print(f"[yellow]note:[/yellow] {escape(text)}")

    def problems(self, problems: Sequence[Problem]) -> None:
        """What is wrong, to the error stream."""
        for problem in problems:
            self.errors.print(f"[bold red]error:[/bold red] {escape(problem.what)}\n  [green]->[/green] {escape(problem.fix)}")

    def rows(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """A table of (topic, words)."""
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for topic, words in rows:
            table.add_row(topic, escape(words))
        self._print_table(table)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table with a header."""
        table = Table(title=title, title_justify="left", pad_edge=False, box=None)
        for number, name in enumerate(header):
            table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        self._print_table(table)

    def _print_table(self, table: Table) -> None:
        self.console.print(table, soft_wrap=False)
        self.console.print()

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar over `total` things; yields what to call after each."""
        if not self.console.is_terminal:
            yield _plain_progress(self, what, total)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)

    @contextmanager
    def training(self, done: int, total: int) -> Iterator["TrainingView"]:
        """The live view of a run from step `done` to `total`."""
        if not self.console.is_terminal:
            yield TrainingView(self, done, total, None)
            return
        with Live(console=self.console, refresh_per_second=4) as live:
            yield TrainingView(self, done, total, live)


def _plain_progress(screen: Screen, what: str, total: int) -> Callable[[], None]:
    done = 0
    last = time.monotonic()

    def advance() -> None:
        nonlocal done, last
        done += 1
        now = time.monotonic()
        if done == total or now - last > _PLAIN_SECONDS:
            last = now
            screen.say(f"{what}: {done}/{total}")

    return advance


class TrainingView:
    """Progress and the last numbers of a run.

    Args:
        live: of rich; None for plain lines.
    """

    def __init__(self, screen: Screen, done: int, total: int, live: Live | None) -> None:
        self._screen = screen
        self._live = live
        self._total = total
        self._first = done
        self._seconds = 0.0
        self._numbers: Mapping[str, Any] = {}
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            console=screen.console,
        )
        self._task = self._bar.add_task("training", total=total, completed=done, speed="")

    def step(self, done: int, seconds: float) -> None:
        """An optimizer step is done, and took so long. Validation and saving between the steps are not counted."""
        self._seconds += seconds
        if self._live:
            self._bar.update(self._task, completed=done, speed=self._speed(done))
            self._live.update(self._render())

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics was written."""
        self._numbers = line
        now = time.monotonic()
        done = int(line["step"])
        tenth = done * 10 // self._total > (done - 1) * 10 // self._total
        if not self._live and (now - self._last_line > _PLAIN_SECONDS or tenth or done == self._first + 1):
            self._last_line = now
            numbers = "  ".join(
                f"{LABELS[key]} {_number(line.get(key), form)}" for key, form in _COLUMNS.items() if line.get(key) is not None
            )
            self._screen.say(f"step {done}/{self._total}  {self._speed(done)}  {numbers}")

    def _speed(self, done: int) -> str:
        steps = done - self._first
        if steps < 1:
            return ""
        seconds = self._seconds / steps
        left = int(seconds * (self._total - done))
        samples = self._numbers.get("samples_per_second", 0.0) * self._numbers.get("step_seconds", 0.0)  # of one step
        rate = f"  {samples / seconds:.2f} samples/s" if samples else ""
        return f"{seconds:.2f} s/step  eta {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}{rate}"

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for key in _COLUMNS:
            table.add_column(LABELS[key], justify="right", style="cyan")
        table.add_row(*(_number(self._numbers.get(key), form) for key, form in _COLUMNS.items()))
        return Group(self._bar, table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
