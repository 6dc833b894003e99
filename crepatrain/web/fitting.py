"""What fits this card: the verdict on the draft as it is, and the changes that would make it smaller."""

import contextlib
import shutil
import subprocess
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from nicegui import background_tasks, run, ui
from nicegui.events import ValueChangeEventArguments

from crepatrain.memory.cards import CARDS, usable
from crepatrain.web.estimates import Estimated, Remedy
from crepatrain.web.form import Form
from crepatrain.web.frame import Site, heading, printable

_GIB = 1 << 30
# In GB: where this machine has no card.
_USUAL = 24
# Without these nothing can be trained, but they decide about no memory.
_OF_THE_LENGTH = {"max_train_steps", "num_train_epochs"}


@cache
def card_here() -> tuple[str, float] | None:
    """The first card of this machine, as (name, GiB); None where its driver names none."""
    asked = shutil.which("nvidia-smi")
    if asked is None:
        return None
    query = [asked, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        printed = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout  # noqa: S603
        name, mebibytes = printed.splitlines()[0].rsplit(",", 1)
        return name.strip(), int(mebibytes) / 1024
    return None


def verdict(estimated: Estimated, card: str, room: float) -> str:
    """Whether a draft fits, in words.

    Args:
        room: GiB of the card that can be used.
    """
    needed = f"It needs {estimated.peak:.2f} GiB, while {estimated.largest}"
    left = room - estimated.peak
    if left >= 0:
        return f"Fits {card} with {left:.2f} GiB left. {needed}."
    return f"Does not fit {card}: {-left:.2f} GiB too much. {needed}."


class _Fitting:
    """The card, the verdict, and the remedies."""

    def __init__(self, site: Site, form: Form, address: str, found: tuple[str, float] | None) -> None:
        self._site, self._form, self._address, self._found = site, form, address, found
        cards = {0: f"this machine's {found[0]}, {found[1]:.1f} GiB"} if found else {}
        cards |= {size: f"a card of {size} GB" for size in CARDS}
        self._card = (0 if found else _USUAL) if site.card is None else site.card
        with ui.element("section").classes("card").props('aria-label="What fits this card"'):
            heading("What fits this card")
            ui.select(cards, label="Graphics card", value=self._card, on_change=self._choose).props("outlined dense").classes(
                "w-full"
            )
            self._words = ui.label().props("aria-live=polite")
            self._place = ui.element("div").classes("remedies")

    async def _choose(self, event: ValueChangeEventArguments[Any]) -> None:
        self._card = self._site.card = event.value
        await self.refresh()

    def _room(self) -> float:
        return self._found[1] if self._card == 0 and self._found else usable(self._card) / _GIB

    def _asked(self) -> tuple[dict[str, Any], tuple[str, ...]] | None:
        """What is to be estimated: the draft and the options; None while something is wrong with it."""
        values = dict(self._site.draft.values)
        problems = self._form.checked.problems
        if any(not problem.keys or not set(problem.keys) <= _OF_THE_LENGTH for problem in problems):
            return None
        if problems:
            values["max_train_steps"] = 1
        if self._site.folders.problems_of(values):  # another page may have changed the draft since it was checked
            return None
        # What is chosen for a card depends on it.
        is_open = "auto" in {values.get("memory"), values.get("block_offload")}
        return values, ("--fits", f"{self._room():g}" if self._card == 0 else str(self._card)) if is_open else ()

    async def refresh(self) -> None:
        """Say what is known, and then what is found."""
        asked = self._asked()
        self._place.clear()
        if asked is None:
            self._site.estimates.end()
            self._words.set_text("It is estimated once nothing of the draft is missing or wrong.")
            return
        if self._site.estimates.known(*asked) is None:
            self._words.set_text("estimating ...")
        estimated = await self._site.estimates.of(*asked)
        if estimated is None or self._place.is_deleted or asked != self._asked():  # a newer draft has its own words
            return
        self._show(estimated)

    def _show(self, estimated: Estimated) -> None:
        if estimated.problem:
            self._words.set_text(printable(f"There is no estimate:\n{estimated.problem}"))
            return
        room = self._room()
        card = "this machine's card" if self._card == 0 else f"a card of {self._card} GB"
        self._words.set_text(verdict(estimated, card, room))
        with self._place:
            if estimated.largest != "training":
                ui.label(f"Training itself needs {estimated.training:.2f} GiB.").classes("help")
            for remedy in estimated.remedies:
                with ui.element("div").classes("row"):
                    button = ui.button("Use", on_click=partial(self._take, remedy)).props("no-caps outline dense")
                    button.props["aria-label"] = f"Use {remedy}"
                    ui.label(str(remedy))
                    fits = "fits" if remedy.peak <= room else "does not fit"
                    ui.label(f"{remedy.peak:.2f} GiB in training, which {fits}").classes("help")

    def _take(self, remedy: Remedy) -> None:
        for key, text in remedy.changes:
            self._site.draft.write(key, text)
        ui.navigate.to(self._address)


async def fitting(site: Site, form: Form, address: str) -> Callable[[], None]:
    """What fits a card, brought up to date with every change of the draft; gives what begins the first estimate.

    Args:
        address: of the page, which is opened again when a remedy has changed fields on it.
    """
    shown = _Fitting(site, form, address, await run.io_bound(card_here))

    def begin() -> None:
        # Not awaited: no field waits for an estimate.
        background_tasks.create(shown.refresh(), name="estimate")

    form.listeners.append(begin)
    return begin
