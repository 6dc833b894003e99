"""The page of CREPA and LayerSync: presets, the weight as a curve over the steps, and what the score can reach."""

from functools import partial

from nicegui import ui

from crepatrain.web.drafts import ASSUMED_STEPS
from crepatrain.web.echarts import weight_options
from crepatrain.web.form import Form
from crepatrain.web.frame import Site, heading
from crepatrain.web.steps import CREPA_PRESETS, Step


def loss_functions(site: Site, form: Form, step: Step) -> None:
    """The presets, the groups of the step, and the curve beside the group that makes it."""
    with ui.element("section").classes("card"):
        heading("Presets")
        with ui.element("div").classes("row"):
            for name in CREPA_PRESETS:
                ui.button(name, on_click=partial(_take, site, name)).props("no-caps outline")
        ui.label(
            "A preset sets when and how much CREPA weighs; the block, the neighbours and the encoder stay as they are."
        ).classes("help")
    form.remarks["crepa_similarity_threshold"] = lambda: _reachable(form)
    for group in step.groups:
        form.groups([group])
        if "crepa_scheduler" in group.keys:
            _curve(site, form)


def _take(site: Site, name: str) -> None:
    site.draft.preset(name)
    ui.navigate.to("/new/loss-functions")


def _curve(site: Site, form: Form) -> None:
    with ui.element("section").classes("card"):
        heading("Weight of CREPA over the run")
        words = ui.label().classes("help").props("aria-live=polite")
        chart = ui.echart({}).classes("w-full").style("height: 220px").props('role=img aria-label="Weight of CREPA over the run"')

    def draw() -> None:
        found = site.draft.weights()
        chart.set_visibility(found is not None)
        if found is None:
            words.set_text("CREPA is off, or a value above is not possible.")
            return
        steps, weights = found
        length = (
            ""
            if site.draft.values.get("max_train_steps")
            else f", for a run of {ASSUMED_STEPS} steps, as the length of this one is not set"
        )
        words.set_text(
            f"From {weights[0]:.3g} at step 0 over {max(weights):.3g} to {weights[-1]:.3g} at step {steps[-1]}{length}."
        )
        chart.options.clear()
        chart.options.update(weight_options(steps, weights))
        chart.update()

    draw()
    form.listeners.append(draw)


def _reachable(form: Form) -> str:
    """What the score can reach, which a threshold must lie below."""
    maximum = form.checked.maximum
    if maximum is None:
        return "What the score can reach is shown here once the model and the size of the clips are known."
    return f"The score of these clips can reach {maximum:.3f} at most: a threshold above that never turns CREPA off."
