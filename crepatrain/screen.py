"""What a run says to its user, whatever shows it: a terminal, a page, a test."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from crepatrain.errors import Problem


class TrainingView(Protocol):
    """The live view of a run in training."""

    def step(self, done: int, seconds: float) -> None:
        """An optimizer step is done, and took so long. What happens between the steps is no part of it."""
        ...

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics was written."""
        ...


class Screen(Protocol):
    """Where messages, tables and progress go. `crepatrain.console` draws them in a terminal."""

    def say(self, text: str = "") -> None:
        """A line."""
        ...

    def note(self, text: str) -> None:
        """Something that the user should know though nothing is wrong."""
        ...

    def problems(self, problems: Sequence[Problem]) -> None:
        """What is wrong, and what to do about it."""
        ...

    def rows(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """A table of (topic, words)."""
        ...

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table with a header."""
        ...

    def progress(self, what: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Progress over `total` things; yields what to call after each."""
        ...

    def training(self, done: int, total: int) -> AbstractContextManager[TrainingView]:
        """The live view of a run from step `done` to `total`."""
        ...
