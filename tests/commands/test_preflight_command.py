"""`crepatrain preflight` and `crepatrain check`, as a user runs them."""

import base64
import csv
import io
import json
import re
from pathlib import Path

import pytest
from common import render_clip
from PIL import Image
from typer.testing import CliRunner

from crepatrain import cli
from crepatrain.reporting import contact_sheet

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    for name, frames in (("one", 20), ("two", 9), ("short", 4)):
        render_clip(root / f"{name}.mp4", frames=frames)
    (root / "one.txt").write_text(f'a "quoted" & {SCRIPT}', encoding="utf-8")
    (root / "broken.mp4").write_bytes(b"no video")
    return root


def run(*words: object):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture
def config(config_file, folder: Path) -> Path:
    return config_file(train_data=str(folder), height=64, width=96, num_frames=9, fps=16)


def test_json_has_a_row_for_each_window_and_refuses_nothing(config: Path, folder: Path):
    result = run("preflight", config, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(Path(row["clip"]).name, row["first"], row["frames"]) for row in found["windows"]] == [
        ("one.mp4", 0, 9),
        ("one.mp4", 9, 9),
        ("two.mp4", 0, 9),
    ]
    assert {Path(left["file"]).name for left in found["left_out"]} == {"short.mp4", "broken.mp4"}
    assert found["windows"][2]["warnings"] == ["no caption"]


def test_missing_captions_become_a_list_to_fill_in(config: Path, folder: Path, tmp_path: Path):
    assert run("preflight", config, "--write-missing", tmp_path / "captions.csv").exit_code == 0
    with (tmp_path / "captions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["video"] for row in rows} == {str(folder / name) for name in ("two.mp4", "short.mp4", "broken.mp4")}
    assert {row["caption"] for row in rows} == {""}
    filled = [row | {"caption": "now it has one"} for row in rows if "two" in row["video"]]
    with (tmp_path / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("video", "caption"))
        writer.writeheader()
        writer.writerows(filled)
    result = run("preflight", config, "--train_data", tmp_path / "captions.csv", "--json")
    assert [row["caption"] for row in json.loads(result.stdout)["windows"]] == ["now it has one"]


def test_the_page_holds_every_window_and_escapes_what_is_not_its_own(config: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    result = run("preflight", config, "--html", page)
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert text.count("<article") == 3
    assert SCRIPT not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "short.mp4: left out" in text
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", text), "it asks the network for nothing"
    pictures = re.findall(r"data:image/(jpeg|webp);base64,([A-Za-z0-9+/=]+)", text)
    assert [kind for kind, _ in pictures].count("webp") == 3
    for kind, content in pictures:
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            image.load()
            assert getattr(image, "n_frames", 1) == (9 if kind == "webp" else 1)


def test_images_of_many_windows_stand_beside_the_page(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contact_sheet, "_INLINE", 2)
    page = tmp_path / "page.html"
    assert run("preflight", config, "--html", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "base64" not in text
    assert len(re.findall(r'src="page-windows/\d+\.jpg"', text)) == 3
    assert len(list((tmp_path / "page-windows").iterdir())) == 6


def test_a_page_inside_the_dataset_would_be_a_clip_of_it(config: Path, folder: Path):
    result = run("preflight", config, "--html", folder / "page.html")
    assert isinstance(result.exception, Exception)
    assert "inside a dataset" in str(result.exception)


def test_check_ends_in_one_verdict(config: Path):
    arguments = ["--missing_captions", "empty", "--unusable_clips", "skip"]
    result = run("check", config, *arguments, "--fits", 80)
    assert result.exit_code == 0, result.output
    for words in ("windows to look at", "steps per epoch", "GPU memory at its fullest", "ready: `crepatrain fit` starts it"):
        assert words in result.output
    assert run("check", config, *arguments, "--fits", 0.01).exit_code == 5
