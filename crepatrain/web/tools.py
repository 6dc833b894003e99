"""What can be done with a run that is there: commands whose words are shown when they have ended."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from nicegui import ui

from crepatrain.errors import UserError
from crepatrain.records.layout import RunLayout
from crepatrain.web.frame import heading, printable, tell
from crepatrain.web.processes import Printed, printed_by
from crepatrain.web.words import Words

_LONGEST_PROMPT = 5000
_LONGEST_REPOSITORY = 200


class Tools:
    """The commands on a run's page.

    Args:
        expect_usable: raises a UserError where no command may begin in the folder.
        report: the address of the run's report.
    """

    def __init__(self, root: Path, expect_usable: Callable[[], None], report: str) -> None:
        self._root = root
        self._expect_usable = expect_usable
        self._report = report
        with ui.element("section").classes("card") as self.place:
            heading("With this adapter")
            prompt = ui.input("Prompt", placeholder="a validation prompt or a caption of the run").classes("w-full")
            prompt.props(f"outlined dense stack-label maxlength={_LONGEST_PROMPT}")
            words = (
                "Sample makes a video of the prompt, and one of the base beside it; it appears among the samples. Alignment map "
                "measures where in the picture the newest checkpoint agrees with the teacher, and opens the report with it."
            )
            ui.label(words).classes("help")
            buttons: list[ui.button] = []
            with ui.element("div").classes("row"):
                for title, arguments in (
                    ("Sample", lambda: ["sample", str(root), *([f"--prompt={prompt.value}"] if prompt.value else [])]),
                    ("Export", lambda: ["export", str(root)]),
                    ("Verify", lambda: ["verify", str(RunLayout(root).result_adapter)]),
                ):
                    buttons.append(ui.button(title, on_click=partial(self._command, arguments)).props("no-caps outline"))
                buttons.append(ui.button("Alignment map", on_click=self._map).props("no-caps outline"))
            self._words = Words()
            self._words.buttons = buttons

    async def _command(self, arguments: Callable[[], Sequence[str]]) -> Printed | None:
        return await self._words.of(lambda: _prepared(self._expect_usable, arguments()))

    async def _map(self) -> None:
        done = await self._command(lambda: ["report", str(self._root), "--map"])
        if done and not done.code and not self.place.is_deleted:
            ui.navigate.to(self._report)


class Hub:
    """Uploading the run's result, once it was said what goes where, and who sees it.

    Args:
        chosen: the run's repository and whether it is private.
        expect_usable: raises a UserError where no command may begin in the folder.
    """

    def __init__(self, root: Path, chosen: tuple[str, bool], expect_usable: Callable[[], None]) -> None:
        self._root = root
        self._expect_usable = expect_usable
        repo, private = chosen
        with ui.expansion("Hugging Face hub").classes("card").props("header-class=text-weight-medium") as self.place:
            self._repo = ui.input("Repository", value=printable(repo), placeholder="owner/name").classes("w-full")
            self._repo.props(f"outlined dense stack-label maxlength={_LONGEST_REPOSITORY}")
            self._private = ui.switch("Private, where the repository is made now", value=private)
            ui.label("Uploads the adapter, its videos and a model card; no clips, captions, config or checkpoints.").classes(
                "help"
            )
            button = ui.button("Push", on_click=self._ask).props("no-caps outline")
            self._words = Words()
            self._words.buttons.append(button)

    def _arguments(self, repo: str, *options: str) -> list[str]:
        return ["push", str(self._root), f"--repo={repo}", *options]

    async def _ask(self) -> None:
        repo, private = (self._repo.value or "").strip(), bool(self._private.value)
        if not repo:
            tell(UserError("no repository is given", "write owner/name"))
            return
        listed = await self._words.of(lambda: _prepared(self._expect_usable, self._arguments(repo, "--dry-run")))
        if not listed or listed.code or self.place.is_deleted:
            return
        seen = "private: only you see it" if private else "public: everybody sees it"
        with self.place, ui.dialog().props('aria-label="Push to the hub"') as dialog, ui.element("div").classes("card dialog"):
            heading(f"Upload to {printable(repo)}?")
            ui.label(f"A repository that does not exist yet is made, {seen}. One that exists stays as visible as it is.")
            ui.label(printable(listed.text)).classes("pre")
            with ui.element("div").classes("row"):
                ui.button("Upload", on_click=lambda: dialog.submit(True)).props("no-caps")
                ui.button("Cancel", on_click=dialog.close).props("no-caps outline autofocus")
        agreed = await dialog
        dialog.delete()
        if not agreed:
            self._words.show("Nothing was uploaded.")
            return
        who = "--private" if private else "--public"
        await self._words.of(lambda: _prepared(self._expect_usable, self._arguments(repo, who)))


def _prepared(expect_usable: Callable[[], None], arguments: Sequence[str]) -> Callable[[], Printed]:
    """What runs a command.

    Raises:
        UserError: no command may begin.
    """
    expect_usable()
    return partial(printed_by, arguments)
