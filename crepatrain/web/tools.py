"""What can be done with a run that is there: commands whose words are shown when they have ended."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from nicegui import ui

from crepatrain.records.layout import RunLayout
from crepatrain.web.frame import heading
from crepatrain.web.processes import Printed, printed_by
from crepatrain.web.words import Words

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
            buttons: list[ui.button] = []
            with ui.element("div").classes("row"):
                for title, arguments in (
                    ("Sample", lambda: ["sample", str(root), *([f"--prompt={prompt.value}"] if prompt.value else [])]),
                    ("Export", lambda: ["export", str(root)]),
                    ("Verify", lambda: ["verify", str(RunLayout(root).result_adapter)]),
                ):
                    buttons.append(ui.button(title, on_click=partial(self._command, arguments)).props("no-caps outline"))
            self._words = Words()
            self._words.buttons = buttons

    async def _command(self, arguments: Callable[[], Sequence[str]]) -> Printed | None:
        def prepare() -> Callable[[], Printed]:
            self._expect_usable()
            return partial(printed_by, arguments())

        return await self._words.of(prepare)
