"""What all pages have: the heading, the ways to the others, and how a message and a table of facts look."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from nicegui import ui

from crepatrain.errors import Problem, UserError
from crepatrain.web.clips import Clips
from crepatrain.web.confinement import Folders
from crepatrain.web.drafts import Draft
from crepatrain.web.estimates import Estimates
from crepatrain.web.processes import Processes
from crepatrain.web.remembered import Remembered
from crepatrain.web.runs import Runs


@dataclass
class Site:
    """What the pages of one server share.

    Attributes:
        card: that drafts are estimated for, in GB as it is sold; 0: this machine's; None: none was chosen yet.
        clips: of the draft, as they were last listed.
        dry_runs: what was printed for a config's text.
    """

    folders: Folders
    draft: Draft
    processes: Processes
    runs: Runs
    estimates: Estimates
    card: int | None = None
    clips: Clips = field(default_factory=lambda: Clips((), ()))
    dry_runs: Remembered[str] = field(default_factory=Remembered)


@cache
def _css() -> str:
    return (files("crepatrain.web") / "page.css").read_text(encoding="utf-8")


@contextlib.contextmanager
def framed(title: str, current: str) -> Iterator[None]:
    """A page with its heading.

    Args:
        current: the address in the heading that the page belongs to.
    """
    ui.page_title(f"{title} - crepatrain")
    ui.add_css(_css())
    with ui.element("header").classes("top"):
        ui.link("crepatrain", "/").classes("name")
        with ui.element("nav").classes("row").props('aria-label="Pages"'):
            for text, address in (("Runs", "/"), ("New run", "/new/model")):
                _way(text, address, here=address == current)
    with ui.element("main").classes("page"):
        heading(title, 1)
        yield


def steps_row(steps: Sequence[tuple[str, str]], current: str) -> dict[str, ui.link]:
    """The ways between the steps of a new run, as (title, address); gives the links by address."""
    with ui.element("nav").classes("steps").props('aria-label="Steps of a new run"'):
        return {address: _way(text, address, here=address == current) for text, address in steps}


def _way(text: str, address: str, *, here: bool) -> ui.link:
    link = ui.link(text, address)
    return link.props("aria-current=page") if here else link


def heading(text: str, level: int = 2) -> None:
    """A heading that a screen reader finds."""
    with ui.element(f"h{level}"):
        ui.label(text)


def facts(rows: Sequence[tuple[str, str]]) -> None:
    """A table of (topic, words)."""
    with ui.element("div").classes("facts"):
        for topic, words in rows:
            ui.label(topic)
            ui.label(printable(words))


def printable(text: str) -> str:
    """A text without bytes that are none, which a path may hold."""
    return text.encode(errors="replace").decode()


def words_of(problems: Sequence[Problem]) -> str:
    """Problems, as they stand beside a field."""
    return printable("\n".join(f"{problem.what}: {problem.fix}" for problem in problems))


def tell(error: UserError) -> None:
    """A message that stays until it is closed."""
    ui.notify(words_of(error.problems), type="negative", multi_line=True, timeout=0, close_button="Close")
