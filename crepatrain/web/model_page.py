"""Where a new run may begin: at one of the released models."""

from nicegui import ui
from nicegui.events import ValueChangeEventArguments

from crepatrain.config.load import options_of_released_model, parse_options
from crepatrain.specs import FAMILIES
from crepatrain.web.frame import Site, heading


def begin_from(site: Site) -> None:
    """A choice of the released models, which fills in what names one."""
    models = {name: f"{name} ({spec.released[name].repo})" for spec in FAMILIES.values() for name in spec.released}

    def take(event: ValueChangeEventArguments[str]) -> None:
        kept = {key: value for key, value in site.draft.values.items() if key not in {"wan_expert", "revision", "task"}}
        site.draft.replace(kept | parse_options(options_of_released_model(event.value), []))
        ui.navigate.to("/new/model")

    with ui.element("section").classes("card"):
        heading("Released models")
        ui.select(models, label="Begin from a released model", on_change=take, with_input=True).props("outlined dense").classes(
            "w-full"
        )
        ui.label("Its weights are downloaded when the run starts, where they are not in the cache yet.").classes("help")
