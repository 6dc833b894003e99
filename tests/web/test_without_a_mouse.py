"""Every control has a name for those who do not see it, and the quick start needs no mouse."""

import shutil
from pathlib import Path

import pytest
from web.browser import opened, served, until

from crepatrain.records.reading import read_run
from crepatrain.web.steps import STEPS as STEPS_OF_A_RUN

pytestmark = pytest.mark.slow  # in a browser

CONTROLS = {
    "button", "link", "textbox", "combobox", "option", "switch", "checkbox", "radio", "spinbutton", "slider", "tab",
    "searchbox", "img", "image", "Video", "dialog",
}  # fmt: skip
# The name of what has the focus, as far as these pages name things.
FOCUSED = """() => {
    const one = document.activeElement, label = one.closest("label")?.querySelector(".q-field__label, .q-toggle__label");
    return (one.ariaLabel || one.labels?.[0]?.querySelector(".q-field__label")?.textContent || label?.textContent
        || one.textContent).trim();
}"""
# What a screen reader says of an open list, whose options don't get the focus.
ACTIVE_OPTION = "() => document.getElementById(document.activeElement.getAttribute('aria-activedescendant'))?.textContent.trim()"
CHARTS_WITHOUT_WORDS = "[...document.querySelectorAll('canvas')].filter(one => !one.closest('[role=img][aria-label]')).length"


def nameless(page) -> list[str]:
    """The controls, pictures and videos of a page's accessibility tree that have no name."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    seen = [(node["role"]["value"], node.get("name", {}).get("value", "").strip()) for node in nodes if not node["ignored"]]
    assert any(role in CONTROLS for role, _ in seen)
    return [role for role, name in seen if role in CONTROLS and not name]


def test_every_control_has_an_accessible_name(tmp_path: Path, trained, wan, clips):
    for name in ("run", "other"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    (tmp_path / "runs" / ".ui").mkdir()
    (tmp_path / "runs" / ".ui" / "draft.json").write_text('{"crepa_enabled": true}')  # the curve of its weight is drawn
    with served(tmp_path, "--data", str(clips), "--data", str(wan)) as (address, _), opened(address) as page:
        for path in ("/", "/run/run", *(f"/new/{step.name}" for step in STEPS_OF_A_RUN)):
            page.goto(address + path)
            page.get_by_role("heading", level=1).wait_for()
            page.wait_for_timeout(500)
            for folded in page.locator(".q-expansion-item--collapsed > div > .q-item").all()[::-1]:
                folded.click()
            page.wait_for_timeout(500)
            assert nameless(page) == [], path
            assert page.evaluate(CHARTS_WITHOUT_WORDS) == 0, path
            for selected in page.get_by_role("combobox").all()[:1]:
                selected.click()
                page.get_by_role("option").first.wait_for()
                assert nameless(page) == [], path
        page.evaluate("document.querySelector('main').append(document.createElement('button'))")
        assert nameless(page) == ["button"]  # the test sees one


def tab_to(page, name: str) -> None:
    """Press Tab until a control has the focus."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate(FOCUSED) == name:
            return
    raise AssertionError(f"Tab does not reach {name!r}")


def write(page, name: str, text: str) -> None:
    tab_to(page, name)
    page.keyboard.press("Control+A")
    page.keyboard.type(text)


def choose(page, name: str, option: str) -> None:
    """Open a list by the keyboard, and take one of its options."""
    tab_to(page, name)
    page.keyboard.press("Space")
    page.get_by_role("option", name=option, exact=True).wait_for()
    page.wait_for_timeout(300)
    for _ in range(20):
        page.keyboard.press("ArrowDown")
        page.wait_for_timeout(100)
        if page.evaluate(ACTIVE_OPTION) == option:
            break
    page.keyboard.press("Enter")
    page.get_by_role("option").first.wait_for(state="hidden")


def follow(page, name: str, address: str) -> None:
    tab_to(page, name)
    page.keyboard.press("Enter")
    page.wait_for_url(f"**{address}")
    page.get_by_role("heading", name="New run").wait_for()
    page.wait_for_timeout(500)


def test_the_quick_start_with_the_keyboard_alone(tmp_path: Path, wan, clips):
    run = tmp_path / "runs" / "my-run"
    with served(tmp_path, "--data", str(clips), "--data", str(wan)) as (address, _), opened(address) as page:
        follow(page, "New run", "/new/model")
        choose(page, "Model family", "wan")
        write(page, "Pretrained model name or path", str(wan))
        write(page, "LoRA rank", "4")
        follow(page, "Next: Data", "/new/data")
        write(page, "Train data", str(clips))
        for name, text in (("Height", "64"), ("Width", "96"), ("Number of frames", "9")):
            write(page, name, text)
        follow(page, "Next: Training", "/new/training")
        write(page, "Max train steps", "6")
        choose(page, "Mixed precision", "no")
        follow(page, "Next: Loss functions", "/new/loss-functions")
        tab_to(page, "Enable CREPA")
        page.keyboard.press("Space")
        write(page, "CREPA Block Index", "1")
        write(page, "Encoder", str(wan / "encoder"))
        write(page, "Encoder image size", "grid")
        follow(page, "Next: Validation", "/new/validation")
        follow(page, "Next: Memory", "/new/memory")
        follow(page, "Next: Review", "/new/review")
        page.get_by_text("block 1 of 0 to").wait_for()
        tab_to(page, "Start training")
        page.keyboard.press("Enter")
        page.wait_for_url("**/run/my-run")
        until(lambda: (run / "metrics.jsonl").is_file() and read_run(run).step)
        until(lambda: read_run(run).status["status"] == "completed")
    assert read_run(run).config["crepa_block_index"] == 1
