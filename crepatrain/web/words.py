"""The place of what a command prints, and the buttons that begin it."""

from collections.abc import Callable, Sequence

from nicegui import run, ui

from crepatrain.errors import UserError
from crepatrain.web.frame import printable, tell
from crepatrain.web.processes import Printed


class Words:
    """A command's words, which stand here once it has ended; hidden while there are none."""

    def __init__(self) -> None:
        self.buttons: list[ui.button] = []
        self._label = ui.label().classes("pre").props("aria-live=polite")
        self.show("")

    def show(self, text: str) -> None:
        """Show some words."""
        self._label.set_text(printable(text))
        self._label.set_visibility(bool(text))

    async def of(self, prepare: Callable[[], Callable[[], Printed]]) -> Printed | None:
        """Show what a command prints; the buttons wait for its end.

        Args:
            prepare: gives what runs the command in a thread, or raises a UserError where it may not begin.

        Returns:
            None where it did not begin, took too long, or the server is about to end.
        """
        try:
            begin = prepare()
        except UserError as error:
            tell(error)
            return None
        _switch(self.buttons, on=False)
        self.show("working ...")
        try:
            printed = await run.io_bound(begin)
            self.show(printed.text if printed else "")
        except UserError as error:
            self.show(str(error))
            return None
        finally:
            _switch(self.buttons, on=True)
        return printed


def _switch(buttons: Sequence[ui.button], *, on: bool) -> None:
    for button in buttons:
        button.set_enabled(on)
