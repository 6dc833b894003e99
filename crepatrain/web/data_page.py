"""The clips on the page of the data, a few at a time, with their captions to be written."""

from urllib.parse import urlencode

from nicegui import run, ui

from crepatrain.data.pictures import IMAGE_SUFFIXES
from crepatrain.errors import UserError
from crepatrain.web.clips import Clips, Shown, read_clips, write_caption
from crepatrain.web.form import Form
from crepatrain.web.frame import Site, heading, printable, tell

_AT_ONCE = 12
_MOST_NOTES = 20


class _ClipList:
    """The clips of the draft's dataset."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._first = 0
        self._shown_of: object = None
        with ui.element("section").classes("card"):
            heading("Clips and captions")
            self._words = ui.label().classes("help").props("aria-live=polite")
            self._notes = ui.element("div")
            self._place = ui.element("div").classes("videos")
            with ui.element("div").classes("row") as self._ways:
                ui.button("Earlier clips", on_click=lambda: self._move(-_AT_ONCE)).props("no-caps flat")
                ui.button("Later clips", on_click=lambda: self._move(_AT_ONCE)).props("no-caps flat")

    async def read(self) -> None:
        """List the dataset again, where another one is named."""
        train_data = self._site.draft.path("train_data")
        if train_data is None or train_data == self._shown_of:
            return
        self._shown_of, self._first = train_data, 0
        try:
            self._site.clips = await run.io_bound(read_clips, self._site.folders, train_data) or Clips((), ())
        except (UserError, OSError) as error:
            self._site.clips = Clips((), (str(error),))
        self._draw()

    def _move(self, by: int) -> None:
        self._first = max(min(self._first + by, len(self._site.clips.clips) - 1), 0)
        self._draw()

    def _draw(self) -> None:
        found = self._site.clips
        shown = found.clips[self._first : self._first + _AT_ONCE]
        missing = f", {len(found.without_caption)} without a caption" if found.without_caption else ""
        self._words.set_text(
            f"{len(found.clips)} clips{missing}; {self._first + 1} to {self._first + len(shown)} are shown."
            if shown
            else "No clips."
        )
        self._ways.set_visibility(len(found.clips) > _AT_ONCE)
        self._notes.clear()
        with self._notes:
            for note in found.notes[:_MOST_NOTES]:
                ui.label(printable(note)).classes("problem")
        self._place.clear()
        with self._place:
            for number, clip in enumerate(shown, start=self._first):
                self._clip(number, clip)

    def _clip(self, number: int, clip: Shown) -> None:
        name = printable(clip.name)
        with ui.element("div").classes("field"):
            kind = "img" if clip.path.suffix.lower() in IMAGE_SUFFIXES else "video"
            picture = ui.element(kind).classes("thumbnail")
            if kind == "video":
                picture.props("muted playsinline controls preload=metadata")
            # The name is in the address so that a browser keeps no other clip's picture.
            picture.props["src"] = f"/clip?{urlencode({'number': number, 'name': name})}"
            picture.props["alt" if kind == "img" else "aria-label"] = name
            text = ui.textarea(f"Caption of {name}", value=printable(clip.caption or "")).props(
                "outlined dense autogrow stack-label"
            )
            if clip.file is None:
                text.props("readonly hint='it stands in a list'")
            text.on("blur", lambda: self._write(clip, text))

    def _write(self, clip: Shown, text: ui.textarea) -> None:
        written = " ".join((text.value or "").split())
        if written == (clip.caption or "") or clip.file is None:
            return
        try:
            write_caption(self._site.folders, clip, written)
        except UserError as error:
            tell(error)
            return
        ui.notify(f"written into {printable(clip.file.name)}")
        self._site.clips = self._site.clips.with_caption(clip, written)
        # What is drawn holds the clip as it was.
        self._draw()


async def clip_list(site: Site, form: Form) -> None:
    """The clips of the draft's dataset, listed again where its field changes."""
    shown = _ClipList(site)
    await shown.read()
    form.listeners.append(shown.read)
