"""The list of runs stays up whatever one of them holds, and reads again only what has changed."""

import json
import os
from pathlib import Path

import pytest
from damage import flipped, some_bits
from recorded import write_run

from crepatrain.config.plan import read_plan
from crepatrain.reporting.charts import sections
from crepatrain.web.confinement import Folders
from crepatrain.web.echarts import options_of
from crepatrain.web.processes import Processes
from crepatrain.web.runs import Runs


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    for name in ("runs", "data"):
        (tmp_path / name).mkdir()
    return Folders(tmp_path / "runs", (tmp_path / "data",))


@pytest.fixture
def runs(folders: Folders) -> Runs:
    return Runs(folders, Processes(folders))


def test_a_run_stands_in_the_list_with_what_status_says(runs, folders):
    write_run(folders.runs / "run", state="stopped", reason="after step 40")
    (folders.runs / "group").mkdir()
    write_run(folders.runs / "group" / "other", state="completed")
    rows = {row.name: row for row in runs.rows()}
    assert rows.keys() == {"run", "group/other"}
    assert rows["run"].state == "stopped"
    assert rows["run"].words == "stopped: after step 40"
    assert rows["run"].progress.startswith("step 40 of 100 (40%), 2 s a step")
    assert "alignment 0.7500" in rows["run"].numbers


@pytest.mark.parametrize("file", ["config.json", "status.json", "metrics.jsonl", "dataset.json", "best.json", "changes.jsonl"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe\0", b'{"step": "many"}\n', b'{"status": 5, "pid": -1}\n', b"[" * 100_000 + b"\n"],
)
def test_a_damaged_run_is_one_row_and_hides_no_other(runs, folders, file, content):
    write_run(folders.runs / "damaged")
    write_run(folders.runs / "whole", state="completed")
    (folders.runs / "damaged" / file).write_bytes(content)
    rows = {row.name: row for row in runs.rows()}
    assert rows["whole"].state == "completed"
    assert rows["damaged"].words


@pytest.mark.parametrize("file", ["config.json", "status.json", "metrics.jsonl"])
def test_no_single_bit_takes_the_list_down(runs, folders, file):
    root = write_run(folders.runs / "run")
    for bit in some_bits(root / file, 60):
        with flipped(root / file, bit):
            [row] = runs.rows()
            assert row.words


def test_two_hundred_runs_are_read_once(runs, folders, monkeypatch):
    from crepatrain.web import runs as module

    for number in range(200):
        write_run(folders.runs / f"run-{number:03d}", steps=5)
    read = []
    monkeypatch.setattr(module, "read_run", lambda root, real=module.read_run: read.append(root) or real(root))
    assert len(runs.rows()) == 200
    assert len(runs.rows()) == 200
    assert len(read) == 200
    with (folders.runs / "run-007" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 0.1}) + "\n")
    runs.rows()
    assert [root.name for root in read[200:]] == ["run-007"]


def test_a_folder_that_can_not_be_listed_is_left_out(runs, folders):
    write_run(folders.runs / "run")
    (folders.runs / "circle").symlink_to(folders.runs / "circle")
    os.mkfifo(folders.runs / "pipe")
    assert [row.name for row in runs.rows()] == ["run"]


def test_every_chart_of_the_report_is_one_of_the_page(trained):
    from crepatrain.records.reading import read_run

    charts = [chart for _, found in sections([read_run(trained)]) for chart in found]
    keys = {chart.key for chart in charts}
    assert keys > {"loss", "diffusion_loss", "crepa_alignment_score", "crepa_similarity_self", "crepa_weight", "eval_loss"}
    for chart in charts:
        options = options_of(chart)
        json.dumps(options, allow_nan=False)
        assert len(options["series"]) == len(chart.series)
        assert options["tooltip"]["renderMode"] == "richText"  # no name becomes HTML


def test_what_status_prints_is_read_without_torch(tmp_path, config_file):
    plan = read_plan(config_file())
    assert plan.config.crepa.crepa_enabled
    import subprocess
    import sys

    words = (
        "import sys; import crepatrain.web.drafts, crepatrain.web.runs, crepatrain.web.clips, crepatrain.web.gate;"
        "assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", words], check=True)
