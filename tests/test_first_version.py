"""A run folder and caches that version 0.1 wrote, with the base and the clips that it was made from: all of it stays usable.

`first_version/continued.json` holds the lines that version 0.1 itself logged when it went on from there to step 8.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from crepatrain import cli

KEPT = Path(__file__).parent / "first_version"


@pytest.fixture
def crepatrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a command in a copy of the folder."""
    shutil.copytree(KEPT, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["crepatrain", *words])
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return command


def entries() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path("cache").rglob("*.safetensors"))}


def test_it_goes_on_to_the_same_numbers(crepatrain):
    before = entries()
    assert crepatrain("fit", "run/config.json", "--max_train_steps", "8") == 0
    after = entries()
    assert before.items() <= after.items()
    # Version 0.1 may have cached other frames than the file shows, so what is made of pixels is made again; texts are not.
    made = sorted(Path(name).parts[1] for name in after.keys() - before.keys())
    assert made == sorted(Path(name).parts[1] for name in before if Path(name).parts[1] != "text")
    assert "text" not in made
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = json.loads(Path("continued.json").read_text(encoding="utf-8"))
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [3, 4, 6, 8]
    for line, wanted in zip(lines, expected, strict=True):
        for key, value in wanted.items():
            near = pytest.approx(value, rel=1e-3) if isinstance(value, (float, dict)) else value
            assert line[key] == near, (line["step"], key)
    assert json.loads(Path("run/status.json").read_text(encoding="utf-8"))["status"] == "completed"


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_it_is_exported(crepatrain, weights: str):
    assert crepatrain("export", "run", "--weights", weights, "--output", "out.safetensors") == 0
    kept = load_file("run/pytorch_lora_weights.safetensors")  # of the average
    assert load_file("out.safetensors").keys() == kept.keys()
    same = all((load_file("out.safetensors")[name] == kept[name]).all() for name in kept)
    assert same == (weights == "ema")
    assert crepatrain("verify", "out.safetensors", "--base", "base") == 0


def test_its_state_and_its_report_are_read(crepatrain, capsys):
    assert crepatrain("status", "run") == 0
    assert "completed" in capsys.readouterr().out
    assert crepatrain("report", "run", "--map") == 0
    html = Path("run/report.html").read_text(encoding="utf-8")
    assert "crepa_alignment_score" in html


def test_it_is_sampled(crepatrain):
    assert crepatrain("sample", "run", "--steps", "2", "--output", "video.mp4") == 0
    assert Path("video.mp4").stat().st_size
    assert crepatrain("sample", "run/adapters/squares-000002.safetensors", "--base", "base", "--prompt", "a", "--steps", "2") == 0


def test_it_is_described_for_the_hub(crepatrain, capsys):
    assert crepatrain("push", "run", "--repo", "me/squares", "--dry-run") == 0
    assert "pytorch_lora_weights.safetensors" in capsys.readouterr().out
