"""What can be done with a run that is there: commands whose words are shown when they have ended."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from nicegui import run, ui

from crepatrain.errors import UserError
from crepatrain.records.layout import RunLayout
from crepatrain.web.frame import heading, printable, tell
from crepatrain.web.processes import printed_by

_LONGEST_PROMPT = 5000


class Tools:
    """The commands on a run's page.

    Args:
        expect_usable: raises a UserError where no command may begin in the folder.
    """

    def __init__(self, root: Path, expect_usable: Callable[[], None]) -> None:
        self._expect_usable = expect_usable
        with ui.element("section").classes("card") as self.place:
            heading("With this adapter")
            prompt = ui.input("Prompt", placeholder="a validation prompt or a caption of the run").classes("w-full")
            prompt.props(f"outlined dense stack-label maxlength={_LONGEST_PROMPT}")
            words = "Sample makes a video of the prompt, and one of the base beside it; it appears among the samples."
            ui.label(words).classes("help")
            with ui.element("div").classes("row"):
                self._buttons = [
                    ui.button(title, on_click=self._click(arguments)).props("no-caps outline")
                    for title, arguments in (
                        ("Sample", lambda: ["sample", str(root), *([f"--prompt={prompt.value}"] if prompt.value else [])]),
                        ("Export", lambda: ["export", str(root)]),
                        ("Verify", lambda: ["verify", str(RunLayout(root).result_adapter)]),
                    )
                ]
            self._printed = ui.label().classes("pre").props("aria-live=polite")
            self._printed.set_visibility(False)

    def _click(self, arguments: Callable[[], Sequence[str]]) -> Callable[[], Awaitable[None]]:
        async def begin() -> None:
            try:
                self._expect_usable()
            except UserError as error:
                tell(error)
                return
            for button in self._buttons:
                button.disable()
            self._show("working ...")
            try:
                self._show(printable(await run.io_bound(printed_by, arguments()) or ""))
            except UserError as error:
                self._show(printable(str(error)))
            finally:
                for button in self._buttons:
                    button.enable()

        return begin

    def _show(self, text: str) -> None:
        self._printed.set_text(text)
        self._printed.set_visibility(True)
