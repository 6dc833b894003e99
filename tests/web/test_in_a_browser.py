"""The page clicked through as a user does, by what is written on it."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from web.browser import opened, served, until

from crepatrain.config.plan import read_plan
from crepatrain.records.reading import read_run

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
