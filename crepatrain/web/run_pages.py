"""The list of runs, and the page of one: where it stands, its curves, its videos, its log."""

import json
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, urlencode

from nicegui import run, ui

from crepatrain.errors import UserError
from crepatrain.records.layout import RunLayout
from crepatrain.records.reading import RunRecord, no_run, read_lines
from crepatrain.records.standing import standing
from crepatrain.reporting.charts import Chart, figure_charts, sections
from crepatrain.web.echarts import options_of
from crepatrain.web.frame import Site, facts, framed, heading, printable, tell
from crepatrain.web.runs import Row, written_at
from crepatrain.web.tools import Hub, Tools

# Seconds between two looks at the files; nothing is looked at while no page is open.
_LIST_SECONDS, _RUN_SECONDS = 5.0, 2.0
_VIDEOS_SHOWN = 12

_RUN_CELL = '<q-td :props="props"><a :href="props.row.address">{{ props.row.name }}</a></q-td>'
# A checkbox of a table has no name of its own.
_CHOOSE_CELL = '<q-td auto-width><q-checkbox v-model="props.selected" dense :aria-label="`Choose ${props.row.name}`" /></q-td>'
_CHOOSE_ALL = '<q-checkbox v-model="props.selected" dense aria-label="Choose all" />'
_STATE_CELL = (
    '<q-td :props="props"><span :class="`state state-${props.row.state}`">{{ props.row.state }}</span>'
    '<div class="help" v-if="props.row.words !== props.row.state">{{ props.row.words }}</div></q-td>'
)


async def runs_page(site: Site) -> None:
    """The list of runs."""
    rows = await run.io_bound(site.runs.rows) or []
    with framed("Runs", "/"):
        ui.label(f"In {printable(str(site.folders.runs))}").classes("help")
        columns = [
            {"name": name, "label": label, "field": name, "align": "left", "sortable": True}
            for name, label in (("name", "Run"), ("state", "State"), ("progress", "Progress"), ("numbers", "Last numbers"))
        ]
        table = ui.table(columns=columns, rows=_plain(rows), row_key="name", pagination=25, selection="multiple")
        table.classes("card runs w-full").props("flat wrap-cells").add_slot("body-cell-name", _RUN_CELL)
        table.add_slot("body-cell-state", _STATE_CELL)
        table.add_slot("body-selection", _CHOOSE_CELL)
        table.add_slot("header-selection", _CHOOSE_ALL)

        def compare() -> None:
            if not table.selected:
                tell(UserError("no run is chosen", "choose some in the list"))
                return
            chosen = urlencode([("run", row["name"]) for row in table.selected])
            ui.navigate.to(f"/report?{chosen}", new_tab=True)

        ui.button("Compare the chosen runs", on_click=compare).props("no-caps outline").set_visibility(len(rows) > 1)
        with table.add_slot("no-data"):
            ui.link("No run yet: begin a new one", "/new/model")

        async def refresh() -> None:
            found = _plain(await run.io_bound(site.runs.rows) or [])
            if found != table.rows:
                table.rows = found

        ui.timer(_LIST_SECONDS, refresh, immediate=False)


def _plain(rows: list[Row]) -> list[dict[str, str]]:
    return [
        {
            "name": printable(row.name),
            "address": f"/run/{quote(row.name, errors='surrogateescape')}",
            "state": printable(row.state)[:40],
            "words": printable(row.words),
            "progress": printable(row.progress),
            "numbers": printable(row.numbers),
        }
        for row in rows
    ]


async def run_page(site: Site, name: str) -> None:
    """One run."""
    view = _RunView(site, name)
    await view.read()
    with framed(printable(name), "/"):
        view.build()
        view.show()
        ui.timer(_RUN_SECONDS, view.refresh, immediate=False)


class _RunView:
    """What is shown of one run, and when it is drawn again."""

    def __init__(self, site: Site, name: str) -> None:
        self._site = site
        self._name = name
        self._root = site.folders.runs / name
        self._record: RunRecord | None = None
        self._problem = ""
        self._charts: list[tuple[str, list[Chart]]] = []
        self._rows: list[tuple[str, str]] = []
        self._log = ""
        self._drawn: dict[str, ui.echart] = {}
        self._parts: dict[str, object] = {}
        self._report_address = f"/report?{urlencode({'run': name}, errors='surrogateescape')}"

    async def read(self) -> None:
        """Read what has changed, without holding up other pages."""
        await run.io_bound(self._read)

    def _read(self) -> None:
        before = self._record
        try:
            self._record = self._site.runs.read(self._name)
            self._rows, self._problem = standing(self._record), ""
            if self._record is not before:
                figures = [read_lines(self._record.layout.figures)]
                measured = figure_charts(figures, [self._record])
                found = sections([self._record])
                self._charts = [*found, ("Validation", measured)] if measured else found
        except UserError as error:
            pending = self._name in self._site.processes.pending()
            self._record, self._charts = None, []
            self._rows = [("state", "its clips are read and encoded" if self._at_work() else "it has ended")] if pending else []
            self._problem = "" if pending else printable(str(error))
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:  # whatever the files of a damaged run hold
            self._record, self._charts, self._rows = None, [], []
            self._problem = f"damaged: {type(error).__name__}: {error}"
        self._log = printable(self._site.processes.log(self._root)) if self._is_known() else ""

    def _is_known(self) -> bool:
        """Whether the name is that of a run, rather than anything that an address may hold."""
        return self._record is not None or self._name in self._site.processes.pending()

    def _at_work(self) -> bool:
        return self._site.processes.is_at_work(self._root)

    def build(self) -> None:
        """The places of everything that changes."""
        self._wrong = ui.label().classes("problem").props("role=alert")
        with ui.element("section").classes("card"):
            self._facts = ui.element("div")
        with ui.element("div").classes("row"):
            self._stop = ui.button("Stop", on_click=self._stop_it).props("no-caps outline")
            self._further = ui.button("Go on", on_click=self._go_on).props("no-caps outline")
            self._length = ui.input("up to step").props("dense outlined stack-label inputmode=numeric").style("width: 120px")
            self._again = ui.button("New run from this config", on_click=self._begin_from).props("no-caps flat")
            self._report = ui.link("Report", self._report_address, new_tab=True)
        self._tools = Tools(self._root, self._expect_usable, self._report_address)
        self._hub = Hub(self._root, self._hub_keys(), self._expect_usable)
        self._chart_place = ui.element("div")
        self._video_place = ui.element("div")
        # The end of the log stays in sight.
        with ui.expansion("Log").classes("card") as self._log_place, ui.element("div").classes("pre log"):
            self._log_text = ui.label()
        with ui.expansion("Config").classes("card"):
            self._config_text = ui.label().classes("pre")

    def _hub_keys(self) -> tuple[str, bool]:
        config = self._record.config if self._record else {}
        repo, private = config.get("hub_model_id"), config.get("hub_private_repo")
        return repo if isinstance(repo, str) else "", private is not False

    async def refresh(self) -> None:
        """Show what has changed."""
        await self.read()
        self.show()

    def show(self) -> None:
        """Bring the page up to date; nothing is sent for what is as before."""
        self._wrong.set_text(self._problem)
        self._wrong.set_visibility(bool(self._problem))
        self._changed("facts", self._rows, self._show_facts)
        at_work = self._is_known() and self._at_work()
        self._stop.set_visibility(at_work)
        for element in (self._further, self._length):
            element.set_visibility(self._is_known() and not at_work)
        for element in (self._report, self._again):
            element.set_visibility(self._record is not None and bool(self._record.lines))
        has_adapter = self._record is not None and self._record.layout.result_adapter.is_file()
        for part in (self._tools, self._hub):
            part.place.set_visibility(has_adapter and not at_work)
        self._show_charts()
        videos = self._videos() if self._record else []
        self._changed("videos", [(words, written_at(path)) for words, path in videos], lambda: self._show_videos(videos))
        self._changed(
            "log",
            self._log,
            lambda: self._log_text.set_text(self._log or "It was not started from this page: its log is where it was."),
        )
        config = self._record.config if self._record else {}
        self._changed(
            "config", config, lambda: self._config_text.set_text(printable(json.dumps(config, indent=2, ensure_ascii=False)))
        )
        if self._record is None and self._log:  # there is nothing else to see; who closes it then leaves it closed
            self._changed("opened", now=True, draw=self._log_place.open)

    def _changed(self, part: str, now: object, draw: Callable[[], object]) -> None:
        if part not in self._parts or self._parts[part] != now:
            self._parts[part] = now
            draw()

    def _show_facts(self) -> None:
        self._facts.clear()
        with self._facts:
            facts(self._rows)

    def _show_charts(self) -> None:
        keys = [chart.key for _, charts in self._charts for chart in charts]
        if keys != list(self._drawn):
            self._chart_place.clear()
            self._drawn = {}
            with self._chart_place:
                for title, charts in self._charts:
                    with ui.element("div").classes("part"):
                        heading(title)
                    with ui.element("div").classes("charts"):
                        for chart in charts:
                            self._drawn[chart.key] = _chart(chart)
        elif self._parts.get("record") is not self._record:
            for _, charts in self._charts:
                for chart in charts:
                    drawn = self._drawn[chart.key]
                    drawn.options.clear()
                    drawn.options.update(options_of(chart))
                    drawn.update()
        self._parts["record"] = self._record

    def _videos(self) -> list[tuple[str, Path]]:
        """What is shown under which words: what was asked for, the newest steps, and the base's to compare them with."""
        assert self._record is not None
        made = [(f"step {step}", path) for step, path in self._record.videos if step > 0][:_VIDEOS_SHOWN]
        of_base = [("the base", path) for step, path in self._record.videos if step == 0]
        asked = [(path.name, path) for path in self._record.layout.asked_videos()][:_VIDEOS_SHOWN]
        return asked + made + of_base

    def _show_videos(self, videos: list[tuple[str, Path]]) -> None:
        self._video_place.clear()
        if not videos:
            return
        with self._video_place:
            with ui.element("div").classes("part"):
                heading("Samples")
            with ui.element("div").classes("videos"):
                for words, path in videos:
                    # The time is in the address, as a sample of the same name may be made again.
                    known = {"run": self._name, "file": path.name, "made": written_at(path)}
                    with ui.element("figure"):
                        video = ui.element("video").props("controls loop muted playsinline preload=metadata")
                        video.props["src"] = f"/video?{urlencode(known, errors='surrogateescape')}"
                        video.props["aria-label"] = printable(words)
                        ui.label(printable(words)).classes("help")

    def _stop_it(self) -> None:
        if self._is_known():
            _tried(lambda: self._site.processes.stop(self._root), "The run finishes its step, saves it, and ends.")

    def _go_on(self) -> None:
        text = (self._length.value or "").strip()
        if text and not (text.isdecimal() and 0 < int(text[:20]) < 10**12):
            tell(UserError(f"up to step {text}: no number of steps", "write a whole number, or leave it empty"))
            return

        def begin() -> None:
            self._expect_usable()
            self._site.processes.go_on(self._root, int(text) if text else None)

        _tried(begin, "The run goes on.")

    def _begin_from(self) -> None:
        if self._is_known() and _tried(lambda: self._site.draft.open(RunLayout(self._root).config_file)):
            ui.navigate.to("/new/review")

    def _expect_usable(self) -> None:
        """Make sure that a command may begin in the run's folder.

        Raises:
            UserError: there is no run, one is at work in it, or its config names something outside of the page's folders.
        """
        if not self._is_known():
            raise no_run(self._root)
        if self._at_work():
            raise UserError("the run is at work", "stop it first, or wait for its end")
        config = self._record.config if self._record else {}
        problems = self._site.folders.problems_of({key: value for key, value in config.items() if key != "output_dir"})
        if problems:
            raise UserError.of(problems)


def _tried(action: Callable[[], None], words: str = "") -> bool:
    """Do something, and say that it was done, or why not."""
    try:
        action()
    except UserError as error:
        tell(error)
        return False
    if words:
        ui.notify(words)
    return True


def _chart(chart: Chart) -> ui.echart:
    with ui.element("figure").classes("card"):
        ui.label(chart.title).classes("text-weight-medium")
        ui.label(chart.note).classes("help")
        return ui.echart(options_of(chart)).classes("chart").props(f'role=img aria-label="{chart.title}"')
