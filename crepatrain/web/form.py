"""Fields on a page: each writes into the draft, and has what is wrong with it beside it."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from nicegui import run, ui
from nicegui.events import ValueChangeEventArguments

from crepatrain.errors import UserError
from crepatrain.web.drafts import Checked
from crepatrain.web.fields import UNSET, Field, fields
from crepatrain.web.frame import Site, heading, printable, tell, words_of
from crepatrain.web.steps import Group, Step

# Keys whose fields suggest the folders that the page may read.
_FOLDERS = {"train_data", "eval_data", "pretrained_model_name_or_path"}


class Form:
    """The fields of a page.

    Args:
        checked: what was said of the draft when the page was made.
        links: to each step, which are marked where its fields have problems.

    Attributes:
        checked: what is said of the draft now.
        remarks: what is to be said beside a field, by key; set before the field is made.
        listeners: called after every change, once the draft was checked.
    """

    def __init__(self, site: Site, checked: Checked, links: Mapping[Step, ui.link]) -> None:
        self._site = site
        self.checked = checked
        self._links = links
        self._problems: dict[str, ui.label] = {}
        self._inputs: dict[str, ui.input | ui.textarea] = {}
        self.remarks: dict[str, Callable[[], str]] = {}
        self._remarks: dict[str, ui.label] = {}
        self.listeners: list[Callable[[], Awaitable[None] | None]] = []

    def groups(self, groups: Sequence[Group]) -> None:
        """The fields of some groups, each under its heading."""
        for group in groups:
            if group.folded:
                with ui.expansion(group.title).classes("card").props("header-class=text-weight-medium") as folded:
                    self._fields(group.keys)
                if any(key in self._site.draft.values or self.checked.of(key) for key in group.keys):
                    folded.open()
            else:
                with ui.element("section").classes("card"):
                    heading(group.title)
                    self._fields(group.keys)

    def _fields(self, keys: Sequence[str]) -> None:
        with ui.element("div").classes("fields"):
            for key in keys:
                self.field(key)

    def field(self, key: str) -> None:
        """One field with its description and the problems of its key."""
        known = fields()[key]
        with ui.element("div").classes("field"):
            if known.kind == "switch":
                ui.switch(known.label, value=self._value(known) is True, on_change=lambda event: self._chosen(key, event))
            elif known.kind in {"choice", "choices"}:
                self._select(known)
            else:
                self._text(known)
            self._problems[key] = ui.label().classes("problem").props("role=alert")
            if key in self.remarks:
                self._remarks[key] = ui.label().classes("remark").props("aria-live=polite")
            ui.label(known.description + (f" Range: {known.range}." if known.range else "")).classes("help")
            ui.label(key).classes("key")

    def _value(self, known: Field) -> Any:
        return self._site.draft.values.get(known.key, known.default)

    def _select(self, known: Field) -> None:
        value = self._value(known)
        options = dict(known.choices)
        if known.kind == "choice":
            value = UNSET if value is None and UNSET in options else value
            if value is not None and (not isinstance(value, (str, bool)) or value not in options):
                options[str(value)] = str(value)  # a config that was opened may hold anything
                value = str(value)
            select = ui.select(options, label=known.label, value=value, on_change=lambda event: self._chosen(known.key, event))
        else:
            chosen = [one for one in value if one in options] if isinstance(value, list) else []
            select = ui.select(
                options, label=known.label, value=chosen, multiple=True, on_change=lambda event: self._chosen(known.key, event)
            )
        select.props("outlined dense stack-label options-dense")

    def _text(self, known: Field) -> None:
        key, value = known.key, printable(self._site.draft.shown(known.key))
        if known.kind == "lines":
            field = ui.textarea(known.label, value=value).props("outlined dense stack-label autogrow")
        else:
            folders = [printable(str(path)) for path in self._site.folders.data_folders()] if key in _FOLDERS else None
            field = ui.input(known.label, value=value, autocomplete=folders).props("outlined dense stack-label")
            field.on("keydown.enter", lambda: self._written(key))
        field.on("blur", lambda: self._written(key))
        self._inputs[key] = field

    async def _chosen(self, key: str, event: ValueChangeEventArguments[Any]) -> None:
        await self._take(lambda: self._site.draft.choose(key, None if event.value == UNSET else event.value))

    async def _written(self, key: str) -> None:
        field, draft = self._inputs[key], self._site.draft
        if (field.value or "") == draft.shown(key):
            return
        await self._take(lambda: draft.write(key, field.value or ""))
        field.value = printable(draft.shown(key))

    async def _take(self, change: Callable[[], None]) -> None:
        """Change the draft, and say what is to be said of it then."""
        try:
            change()
        except UserError as error:  # a full disk: the draft is changed all the same, but not kept
            tell(error)
        checked = await run.io_bound(self._site.draft.check)
        if checked is None:  # the server is about to end
            return
        self.checked = checked
        self.mark()
        for listener in self.listeners:
            if (waited := listener()) is not None:
                await waited

    def mark(self) -> None:
        """Put every problem beside its field, and what a key left out means into its field."""
        for key, label in self._problems.items():
            found = self.checked.of(key)
            missing = bool(found) and all(problem.what == f"{key} is missing" for problem in found)
            label.set_text("Required." if missing else words_of(found))
            label.classes(add="todo" if missing else "", remove="" if missing else "todo")
            label.set_visibility(bool(found))
        for key, label in self._remarks.items():
            label.set_text(self.remarks[key]())
        for key, field in self._inputs.items():
            meant = self.checked.plan.config.value(key) if self.checked.plan else None
            known = fields()[key]
            empty = "" if known.default is not None or meant is None else printable(known.shown(meant))
            field.props["placeholder"] = empty
            field.update()
        for step, link in self._links.items():
            wrong = any(self.checked.of(key) for key in step.keys)
            link.classes(add="open" if wrong else "", remove="" if wrong else "open")
