"""The pages of a new run: a form for each step, and the review that starts it."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from nicegui import run, ui
from nicegui.events import ValueChangeEventArguments

from crepatrain.errors import UserError
from crepatrain.web.data_page import clip_list
from crepatrain.web.fitting import fitting
from crepatrain.web.form import Form
from crepatrain.web.frame import Site, facts, framed, heading, printable, steps_row, tell, words_of
from crepatrain.web.loss_functions import loss_functions
from crepatrain.web.model_page import begin_from
from crepatrain.web.processes import Printed, dry_run
from crepatrain.web.steps import STEPS, Step
from crepatrain.web.words import Words

# The pages that say what fits the card; on the others nothing is estimated.
_ESTIMATED = {"model", "training", "memory"}


def address_of(step: Step) -> str:
    """Where a step is."""
    return f"/new/{step.name}"


async def step_page(site: Site, name: str) -> None:
    """One step of a new run; the first one for a name that is none."""
    step = next((step for step in STEPS if step.name == name), STEPS[0])
    checked = await run.io_bound(site.draft.check)
    assert checked is not None
    with framed("New run", "/new/model"):
        links = steps_row([(step.title, address_of(step)) for step in STEPS], address_of(step))
        form = Form(site, checked, {step: links[address_of(step)] for step in STEPS})
        if step.name == "model":
            begin_from(site)
        if step.name == "loss-functions":
            loss_functions(site, form, step)
        else:
            form.groups(step.groups)
        if step.name == "data":
            await clip_list(site, form)
            _command(site, form, "Read the clips", "What training will use of them, and what is left out.", ())
        if step.name == "memory":
            words = "The step itself, on tensors without values: what it needs of a GPU, and which cards it fits."
            _command(site, form, "Estimate memory", words, ("--estimate-vram",))
        if step.name == "review":
            _review(site, form)
        begin_estimate = await fitting(site, form, address_of(step)) if step.name in _ESTIMATED else None
        _onward(step)
        form.mark()
        if begin_estimate:
            begin_estimate()


def _onward(step: Step) -> None:
    number = STEPS.index(step)
    with ui.element("div").classes("row"):
        if number:
            ui.link(f"Back: {STEPS[number - 1].title}", address_of(STEPS[number - 1]))
        if number + 1 < len(STEPS):
            ui.link(f"Next: {STEPS[number + 1].title}", address_of(STEPS[number + 1]))


def _command(site: Site, form: Form, title: str, words: str, options: tuple[str, ...]) -> None:
    """A dry run with what it prints; the last one is shown as long as the config is the same."""

    def known() -> str:
        return site.dry_runs.get((site.draft.text(), *options)) or ""

    def prepare() -> Callable[[], Printed]:
        values = dict(site.draft.values)
        if problems := site.folders.problems_of(values):
            raise UserError.of(problems)
        return lambda: dry_run(site.folders, values, options)

    async def begin() -> None:
        text = site.draft.text()
        if printed := await shown.of(prepare):
            site.dry_runs.put((text, *options), printed.text)
            shown.show(known())  # the draft may be another one by now

    with ui.element("section").classes("card"):
        heading(title)
        ui.label(words).classes("help")
        button = ui.button(title, on_click=begin).props("no-caps outline")
        shown = Words()
        shown.buttons.append(button)
    shown.show(known())
    form.listeners.append(lambda: shown.show(known()))


def _review(site: Site, form: Form) -> None:
    with ui.element("section").classes("card"):
        heading("What will happen")
        for problem in form.checked.problems:
            step = next((step for step in STEPS if step.keys & set(problem.keys)), None)
            with ui.element("div"):
                ui.label(words_of([problem])).classes("problem")
                if step:
                    ui.link(f"Open {step.title}", address_of(step)).classes("help")
        facts(form.checked.summary)
        for note in form.checked.notes:
            ui.label(f"note: {printable(note)}").classes("help")
    _config_file(site)
    with ui.element("section").classes("card"):
        heading("Start")
        with contextlib.suppress(UserError):
            config = site.processes.config_file(site.folders.runs / _run_name(site))
            ui.label("The same in a terminal, in the folder where this page was started, once the config is saved:").classes(
                "help"
            )
            ui.label(printable(f"crepatrain fit {config}")).classes("pre")
        ui.label("The run is a process of its own: it goes on when this page is closed.").classes("help")
        button = ui.button("Start training", on_click=lambda: _start(site, button)).props("no-caps")
        if form.checked.problems:
            button.disable()


def _run_name(site: Site) -> str:
    """The run's path below the folder of runs.

    Raises:
        UserError: the draft has none there.
    """
    output_dir = site.draft.path("output_dir")
    name = None if output_dir is None else site.folders.name_of(output_dir)
    if name is None:
        raise UserError(f"output_dir={output_dir}: no place for a run", f"give a folder in {site.folders.runs}")
    return name


async def _start(site: Site, button: ui.button) -> None:
    button.disable()  # a second click while the first one is at work
    try:
        checked = await run.io_bound(site.draft.check)
        assert checked is not None
        if checked.problems:
            raise UserError.of(list(checked.problems))
        name = _run_name(site)
        site.processes.start(site.folders.runs / name, site.draft.values)
    except UserError as error:
        tell(error)
        button.enable()
    else:
        ui.navigate.to(f"/run/{name}")


def _config_file(site: Site) -> None:
    def apply(action: Callable[[], None]) -> None:
        try:
            action()
        except UserError as error:
            tell(error)
        else:
            ui.navigate.to("/new/review")

    def save() -> None:
        try:
            path = site.processes.save(site.folders.runs / _run_name(site), site.draft.values)
        except UserError as error:
            tell(error)
        else:
            ui.notify(f"saved as {printable(str(path))}")

    def opened(event: ValueChangeEventArguments[str]) -> None:
        if event.value:
            apply(lambda: site.draft.open(Path(event.value)))

    with ui.element("section").classes("card"):
        heading("Config file")
        text = ui.textarea("Config", value=site.draft.text()).props("outlined autogrow input-class=pre").classes("w-full")
        with ui.element("div").classes("row"):
            ui.button("Use this text", on_click=lambda: apply(lambda: site.draft.read_text(text.value or ""))).props(
                "no-caps outline"
            )
            ui.button("Save", on_click=save).props("no-caps outline")
            ui.button("Download", on_click=lambda: ui.download.content(site.draft.text(), "config.json")).props("no-caps outline")
            ui.button("Begin anew", on_click=lambda: apply(site.draft.clear)).props("no-caps flat")
        paths = [printable(str(path)) for path in site.folders.configs()]
        ui.select(paths, label="Open a config", on_change=opened, with_input=True).props("outlined").classes("w-full")
