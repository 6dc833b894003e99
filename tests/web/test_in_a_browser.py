"""The page clicked through as a user does, by what is written on it."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from common import render_clip
from recorded import DATASET, write_run
from web.browser import opened, served, until

from crepatrain.config.plan import read_plan
from crepatrain.records.reading import read_run
from crepatrain.web.steps import STEPS as STEPS_OF_A_RUN

pytestmark = pytest.mark.slow  # what the page is made of is tested without a browser

STEPS = 6


def choose(page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


def fill(page, label: str, text: str) -> None:
    page.get_by_label(label, exact=True).fill(text)
    page.get_by_label(label, exact=True).blur()


def step(page, title: str) -> None:
    page.get_by_role("navigation", name="Steps of a new run").get_by_role("link", name=title).click()
    page.get_by_role("heading", name="New run").wait_for()


def test_the_quick_start_from_an_empty_folder_to_an_adapter(tmp_path: Path, monkeypatch, wan, clips):
    roots = ("--data", str(wan), "--data", str(clips))
    run = tmp_path / "runs" / "my-run"
    with served(tmp_path, *roots) as (address, server), opened(address) as page:
        page.get_by_role("link", name="New run").click()
        choose(page, "Model family", "wan")
        fill(page, "Pretrained model name or path", str(wan))
        fill(page, "LoRA rank", "4")
        step(page, "Data")
        fill(page, "Train data", str(clips))
        for label, value in (("Height", "64"), ("Width", "96"), ("Number of frames", "9")):
            fill(page, label, value)
        step(page, "Training")
        fill(page, "Max train steps", str(STEPS))
        fill(page, "Learning rate", "1e-3")
        choose(page, "Mixed precision", "no")
        # The quick start's own words.
        step(page, "Loss functions")
        page.get_by_role("switch", name="Enable CREPA").click()
        fill(page, "CREPA Block Index", "99")
        page.get_by_text("crepa_block_index=99").wait_for()  # beside its field
        fill(page, "CREPA Block Index", "1")
        page.get_by_text("crepa_block_index=99").wait_for(state="hidden")
        assert page.get_by_label("Weight", exact=True).input_value() == "0.5"
        assert page.get_by_label("Adjacent Distance", exact=True).input_value() == "1"
        assert page.get_by_label("Temporal Decay", exact=True).input_value() == "1.0"
        assert page.get_by_label("Encoder", exact=True).input_value() == "dinov2_vitg14"
        assert page.get_by_label("Encoder image size", exact=True).input_value() == "518"
        fill(page, "Encoder", str(wan / "encoder"))
        fill(page, "Encoder image size", "grid")
        page.get_by_text(re.compile(r"can reach 1\.\d+ at most")).wait_for()
        step(page, "Review")
        page.get_by_text("block 1 of 0 to").wait_for()
        page.get_by_role("button", name="Start training").dblclick()
        page.wait_for_url("**/run/my-run")
        until(lambda: read_run(run).step if (run / "metrics.jsonl").is_file() else 0)
        os.kill(server.pid, signal.SIGKILL)
        until((run / "pytorch_lora_weights.safetensors").is_file)
        until(lambda: read_run(run).status["status"] == "completed")

    options = {
        "model_family": "wan",
        "pretrained_model_name_or_path": wan,
        "train_data": clips,
        "output_dir": "runs/my-run",
        "lora_rank": 4,
        "height": 64,
        "width": 96,
        "num_frames": 9,
        "max_train_steps": STEPS,
        "learning_rate": 1e-3,
        "mixed_precision": "no",
        "crepa_enabled": True,
        "crepa_block_index": 1,
        "crepa_encoder": wan / "encoder",
        "crepa_encoder_image_size": "grid",
    }
    (tmp_path / "empty.json").write_text("{}")
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    monkeypatch.chdir(tmp_path)
    expected = json.loads(json.dumps(read_plan(tmp_path / "empty.json", words).config.as_file()))
    assert json.loads((run / "config.json").read_text()) == expected
    assert read_run(run).column("crepa_loss")[0] == list(range(1, STEPS + 1))
    log = (tmp_path / "runs" / ".ui" / "runs" / "my-run" / "log.txt").read_text()
    assert log.count("crepatrain ") == 1  # two clicks, one run


def draft_of(folder: Path, **values) -> None:
    """What the page finds when it starts."""
    (folder / "runs" / ".ui").mkdir(parents=True, exist_ok=True)
    (folder / "runs" / ".ui" / "draft.json").write_text(json.dumps(values))


def test_a_run_is_stopped_and_goes_on(tmp_path: Path, values, wan, clips):
    run = tmp_path / "runs" / "long"
    draft_of(tmp_path, **values | {"output_dir": "runs/long", "max_train_steps": 2000, "cache_dir": None})
    with served(tmp_path, "--data", str(wan), "--data", str(clips)) as (address, _), opened(f"{address}/new/review") as page:
        page.get_by_role("button", name="Start training").click()
        page.wait_for_url("**/run/long")
        page.get_by_text("Diffusion loss", exact=True).wait_for(timeout=120_000)  # its first charts
        page.get_by_role("button", name="Stop").click()
        until(lambda: read_run(run).status["status"] == "stopped")
        done = read_run(run).step
        page.get_by_text("stopped:").first.wait_for()
        fill(page, "up to step", str(done + 2))
        page.get_by_role("button", name="Go on").click()
        until(lambda: read_run(run).status["status"] == "completed")
        assert read_run(run).step == done + 2
        page.get_by_text("completed", exact=True).wait_for()
        with page.expect_popup() as popup:
            page.get_by_role("link", name="Report").click()
        popup.value.get_by_role("heading", name="Summary").wait_for()


HOSTILE = "<img src=x onerror=alert(1)>\"'{{ 7 * 7 }}</script><script>alert(2)</script>"
NAME = HOSTILE.replace("/", "")


def test_no_text_of_a_file_becomes_part_of_the_page(tmp_path: Path, values, wan):
    (tmp_path / "runs").mkdir()
    run = write_run(tmp_path / "runs" / NAME, state="stopped", reason=HOSTILE, validation_prompts=[HOSTILE], output_name=HOSTILE)
    (run / "dataset.json").write_text(json.dumps(DATASET | {"captions": [{"file": HOSTILE, "windows": 1, "caption": HOSTILE}]}))
    damaged = write_run(tmp_path / "runs" / "damaged")
    (damaged / "metrics.jsonl").write_text(f"{HOSTILE}\n")
    log = tmp_path / "runs" / ".ui" / "runs" / NAME / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_text(HOSTILE)
    data = tmp_path / "data"
    data.mkdir()
    render_clip(data / f"{NAME}.mp4")
    (data / f"{NAME}.txt").write_text(HOSTILE)
    draft_of(
        tmp_path, **values | {"train_data": str(data), "crepa_encoder": HOSTILE, "output_dir": f"runs/{NAME}", HOSTILE: HOSTILE}
    )
    with served(tmp_path, "--data", str(data), "--data", str(wan)) as (address, _), opened(address) as page:
        page.get_by_role("link", name="damaged").wait_for()
        page.get_by_role("link", name=NAME).click()
        page.get_by_text(f"stopped: {HOSTILE}").wait_for()
        for title in ("Log", "Config"):
            page.get_by_text(title, exact=True).click()
        page.get_by_text(HOSTILE, exact=True).first.wait_for()
        page.goto(f"{address}/run/damaged")
        page.get_by_text("it is damaged").wait_for()
        for name in ("data", "loss-functions", "review"):
            page.goto(f"{address}/new/{name}")
            page.get_by_text(f"{HOSTILE}: unknown key" if name == "review" else "New run").first.wait_for()
            page.wait_for_timeout(500)
            assert page.locator("img[src=x]").count() == 0
        page.goto(f"{address}/new/data")
        assert page.get_by_label(f"Caption of {NAME}.mp4").input_value() == HOSTILE


def test_a_caption_is_written_into_its_file(tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    for index in range(2):
        render_clip(data / f"clip-{index}.mp4", seed=index)
    with served(tmp_path, "--data", str(data)) as (address, _), opened(f"{address}/new/data") as page:
        page.get_by_text("2 clips, 2 without a caption").wait_for()
        fill(page, "Caption of clip-1.mp4", "a square\nmoves")
        page.get_by_text("2 clips, 1 without a caption").wait_for()
    assert (data / "clip-1.txt").read_text() == "a square moves\n"
    assert not (data / "clip-0.txt").exists()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_every_control_has_a_name_and_nothing_is_wider_than_the_window(tmp_path: Path, trained, width, scheme):
    (tmp_path / "runs").mkdir()
    shutil.copytree(trained, tmp_path / "runs" / "run")
    nameless = """() => [...document.querySelectorAll("input, textarea, button, a, video, [role=switch], [role=combobox]")]
        .filter(one => one.offsetParent && !one.ariaLabel && !one.labels?.length && !one.textContent.trim()
            && !one.closest("label")?.textContent.trim() && one.getAttribute("aria-hidden") !== "true")
        .map(one => one.outerHTML.slice(0, 200))"""
    view = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    with served(tmp_path, "--data", "data") as (address, _), opened(address, **view) as page:
        for path in ("/", "/run/run", *(f"/new/{step.name}" for step in STEPS_OF_A_RUN)):
            page.goto(address + path)
            page.get_by_role("heading", level=1).wait_for()
            page.wait_for_timeout(500)
            assert page.evaluate(nameless) == [], path
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path


def test_from_another_address_only_with_the_token(tmp_path: Path):
    with served(tmp_path, "--data", "data", "--host", "127.0.0.1") as (address, _), opened(address) as page:
        page.get_by_role("heading", name="Runs").wait_for()
        assert "token" not in page.url
        page.get_by_role("link", name="New run", exact=True).click()
        page.get_by_label("Model family").wait_for()
        bare = address.split("?")[0]
        with pytest.raises(HTTPError, match="403"):
            urlopen(bare)


def test_a_run_whose_config_names_something_outside_begins_no_command(tmp_path: Path, trained):
    shutil.copytree(trained, tmp_path / "runs" / "run")
    with served(tmp_path, "--data", "data") as (address, _), opened(f"{address}/run/run") as page:
        refused = page.get_by_text(f"train_data={read_run(trained).config['train_data']}: outside")
        for name in ("Verify", "Go on"):
            page.get_by_role("button", name=name).click()
            refused.wait_for()
            page.reload()
    assert not (tmp_path / "runs" / ".ui" / "runs").exists()


def test_a_run_is_sampled_and_verified_and_compared_with_another(tmp_path: Path, trained, wan, clips, tmp_path_factory):
    for name in ("first", "second"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    # Beside model and clips, where the run's caches and held-out clips are.
    roots = [
        word for path in (wan, clips, tmp_path_factory.getbasetemp() / "cache", trained.parent) for word in ("--data", str(path))
    ]
    with served(tmp_path, *roots) as (address, _), opened(f"{address}/run/first") as page:
        page.get_by_role("button", name="Verify").click()
        page.get_by_text("pytorch_lora_weights.safetensors").last.wait_for(timeout=60_000)
        fill(page, "Prompt", "--a square; $(moves)")
        page.get_by_role("button", name="Sample").click()
        page.get_by_text("sample-42-beside-base.mp4", exact=True).wait_for(timeout=240_000)
        page.goto(address)
        for box in page.get_by_role("checkbox").all()[1:3]:
            box.click()
        with page.expect_popup() as popup:
            page.get_by_role("button", name="Compare the chosen runs").click()
        popup.value.get_by_role("heading", name="first, second").wait_for()


def test_a_run_is_pushed_only_when_asked_and_its_map_opens_in_the_report(
    tmp_path, trained, wan, clips, tmp_path_factory, monkeypatch
):
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nobody"))  # without a login
    shutil.copytree(trained, tmp_path / "runs" / "run")
    roots = [
        word for path in (wan, clips, tmp_path_factory.getbasetemp() / "cache", trained.parent) for word in ("--data", str(path))
    ]
    with served(tmp_path, *roots) as (address, _), opened(f"{address}/run/run") as page:
        page.get_by_text("Hugging Face hub").click()
        page.get_by_role("button", name="Push").click()
        page.get_by_text("no repository is given").wait_for()
        fill(page, "Repository", "me/adapter")
        for answer, words in (("Cancel", "Nothing was uploaded."), ("Upload", "the hub does not know who you are")):
            page.get_by_role("button", name="Push").click()
            asked = page.get_by_role("dialog")
            asked.get_by_text("pytorch_lora_weights.safetensors").wait_for(timeout=60_000)
            asked.get_by_text("private: only you see it").wait_for()
            asked.get_by_role("button", name=answer).click()
            page.get_by_text(words).wait_for(timeout=60_000)
        page.get_by_role("button", name="Alignment map").click()
        page.wait_for_url("**/report?run=run", timeout=120_000)
        page.get_by_role("heading", name="Alignment map").wait_for()


def test_what_fits_a_card_follows_the_draft_and_a_remedy_changes_it(tmp_path: Path, values, wan, clips):
    kept = {key: value for key, value in values.items() if key not in {"max_train_steps", "cache_dir"}}
    draft_of(tmp_path, **kept | {"output_dir": "runs/run"})
    with served(tmp_path, "--data", str(wan), "--data", str(clips)) as (address, _), opened(f"{address}/new/model") as page:
        page.get_by_text("estimating ...").wait_for()
        fill(page, "LoRA rank", "8")  # no field waits for the estimate
        page.get_by_text(re.compile("^Fits a card of 24 GB with")).wait_for(timeout=120_000)
        page.get_by_role("button", name="Use base_quantization: int8").click()
        draft = tmp_path / "runs" / ".ui" / "draft.json"
        until(lambda: json.loads(draft.read_text()).get("base_quantization") == "int8")
        assert json.loads(draft.read_text())["lora_rank"] == 8
        fill(page, "LoRA rank", "no number")
        page.get_by_text("It is estimated once nothing of the draft is missing or wrong.").wait_for()
