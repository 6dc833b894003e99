"""A run's files as somebody or something has left them: status and report either show them or say in one message what to fix."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded import DATASET, write_run

from crepatrain.commands.status import status
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.reporting.report import write_report

SIGMAS = {"0.0-0.2": 0.5, "0.2-0.4": 0.25}
NUMBERS = ("loss", "diffusion_loss", "crepa_loss", "layersync_loss", "crepa_alignment_score", "crepa_similarity_self")
MORE = ("crepa_weight", "crepa_alignment_score_ema", "learning_rate", "grad_norm", "step_seconds", "forward_seconds")
STEP = dict.fromkeys((*NUMBERS, *MORE, "peak_memory_gib"), 0.5) | {"sigma_loss": SIGMAS}
LINES = [
    {"step": 1, "crepa_cutoff": False} | STEP,
    {"step": 2, "crepa_cutoff": True} | STEP,
    {"step": 2, "eval_loss": 0.5, "eval_alignment": 0.25, "eval_sigma_loss": SIGMAS},
]
FIGURES = [{"step": 2, "prompt": prompt, "flicker": 0.1, "consistency": 0.9} for prompt in ("a", "b")]
FILES: dict[str, list[dict[str, Any]]] = {
    "metrics.jsonl": LINES,
    "samples/figures.jsonl": FIGURES,
    "status.json": [{"status": "running", "step": 2, "reason": ""}],
    "dataset.json": [DATASET],
    "best.json": [{"step": 2, "eval_loss": 0.5}],
    "config.json": [
        {"max_train_steps": 100, "logging_steps": 1, "crepa_similarity_threshold": 0.8, "crepa_threshold_metric": "alignment"}
    ],
}


def write(root: Path, files: dict[str, list[Any]]) -> None:
    """Every file as it should be, but for some; what is no text is written as JSON."""
    for name, lines in (FILES | files).items():
        texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (root / name).write_bytes(b"".join(text + b"\n" for text in texts))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs, of which a test may write the first one's files."""
    root = tmp_path_factory.mktemp("mangled")
    first, second = write_run(root / "first"), write_run(root / "second")
    write(second, {})
    return first, second


def read_everything(runs: tuple[Path, Path]) -> None:
    """Everything that is read of a run."""
    status(runs[0], Screen())
    for roots in (runs[:1], runs):
        write_report(roots, runs[0] / "report.html")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=3) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def mangled(draw: st.DrawFn) -> dict[str, list[Any]]:
    """A file with a value of a line exchanged or left out, or a whole line, which may be no JSON."""
    name = draw(st.sampled_from(sorted(FILES)))
    lines: list[Any] = list(FILES[name])
    at = draw(st.integers(0, len(lines) - 1))
    key = draw(st.sampled_from(sorted(lines[at])))
    lines[at] = draw(
        st.builds(lambda value: lines[at] | {key: value}, JSON)
        | st.just({other: value for other, value in lines[at].items() if other != key})
        | JSON
        | st.binary(max_size=8)
        | st.just(b"[" * 10_000)
    )
    return {name: lines}


def test_whole_files_are_shown(runs):
    write(runs[0], {})
    read_everything(runs)


def test_names_that_are_no_text_are_shown(runs, capsys):
    """As Python gives the bytes of a file's name that are no UTF-8."""
    clips = [{"file": "clip-\udcff.mp4", "windows": 6, "caption": "a"}]
    config = FILES["config.json"][0] | {"train_data": "\udcff"}
    status_file = {"status": "failed", "step": 2, "reason": "\udcff can't be read"}
    write(runs[0], {"dataset.json": [DATASET | {"captions": clips}], "config.json": [config], "status.json": [status_file]})
    read_everything(runs)
    assert "failed: ? can't be read" in capsys.readouterr().out
    assert "clip-?.mp4" in (runs[0] / "report.html").read_text(encoding="utf-8")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mangled())
def test_any_content_is_shown_or_refused_in_one_message(runs, files):
    write(runs[0], files)
    try:
        read_everything(runs)
    except UserError as error:
        [name] = files
        [problem] = error.problems
        assert problem.what.startswith(str(runs[0] / name))
        assert ("another folder" if name == "config.json" else "remove") in problem.fix


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("metrics.jsonl", {"sigma_loss": [1.0]}),
        ("metrics.jsonl", {"sigma_loss": {"0.0-0.2": None}}),
        ("metrics.jsonl", {"eval_sigma_loss": 0.5}),
        ("metrics.jsonl", {"loss": "0.5"}),
        ("metrics.jsonl", {"loss": float("nan")}),
        ("metrics.jsonl", {"step_seconds": 10**400}),
        ("metrics.jsonl", {"step": True}),
        ("metrics.jsonl", {"step": -1}),
        ("samples/figures.jsonl", {"flicker": "a"}),
        ("samples/figures.jsonl", {"prompt": ["a"]}),
    ],
)
def test_a_line_of_wrong_kinds_is_named(runs, name, change):
    lines: list[Any] = list(FILES[name])
    lines[1] = lines[1] | change
    write(runs[0], {name: lines})
    with pytest.raises(UserError) as caught:
        read_everything(runs)
    [problem] = caught.value.problems
    assert problem.what.startswith(f"{runs[0] / name}, line 2: it is damaged (")
    assert problem.fix == "remove that line"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("status.json", {"step": "2"}, "step: Input should be a valid integer"),
        ("dataset.json", {}, "train_data: Field required"),
        ("dataset.json", DATASET | {"buckets": [{}]}, "buckets.0.bucket: Field required"),
        ("dataset.json", DATASET | {"steps_per_epoch": 0}, "steps_per_epoch: Input should be greater than or equal to 1"),
        ("best.json", {"step": 2}, "eval_loss: Field required"),
        ("config.json", {"logging_steps": "1"}, "logging_steps: Input should be a valid integer"),
        ("config.json", [], "Input should be a valid dictionary"),
    ],
)
def test_a_file_of_wrong_kinds_is_named_with_its_key(runs, name, content, message):
    write(runs[0], {name: [content]})
    with pytest.raises(UserError) as caught:
        read_everything(runs)
    [problem] = caught.value.problems
    assert problem.what.startswith(f"{runs[0] / name}: {message}")
    assert problem.fix == ("fix it, or give another folder" if name == "config.json" else "fix or remove it")


@pytest.mark.parametrize("key", ["sigma_loss", "step_seconds", "forward_seconds", "loss", "crepa_cutoff", "eval_sigma_loss"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_number_that_is_merely_absent_is_left_out(runs, key, gone):
    lines = [{name: value for name, value in line.items() if name != key} | ({} if gone else {key: None}) for line in LINES]
    write(runs[0], {"metrics.jsonl": [*LINES[:1], *lines[1:]]})
    read_everything(runs)


PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def alignment_map(**changes: Any) -> dict[str, Any]:
    frame = {"frame": 0, "picture": PIXEL, "cosine": [[0.5, 0.25]]} | changes
    clip = {"name": "a.mp4", "caption": "<a> cat", "mean": 0.375, "frames": [frame]}
    return {"block": 8, "step": 1, "sigma": 0.5, "clips": [clip]}


def test_a_whole_map_is_drawn(tmp_path):
    root = write_run(tmp_path / "run")
    (root / "alignment_map.json").write_text(json.dumps(alignment_map()), encoding="utf-8")
    write_report([root], root / "report.html")
    text = (root / "report.html").read_text(encoding="utf-8")
    assert "aspect-ratio:1/1" in text
    assert "&lt;a&gt; cat; mean 0.3750" in text


@pytest.mark.parametrize("bug", [ValueError, TypeError, LookupError])
def test_a_bug_in_drawing_a_map_is_not_blamed_on_its_file(tmp_path, monkeypatch, bug):
    def broken(*_):
        raise bug("ours")

    root = write_run(tmp_path / "run")
    (root / "alignment_map.json").write_text(json.dumps(alignment_map()), encoding="utf-8")
    monkeypatch.setattr("crepatrain.reporting.heatmap._png", broken)
    with pytest.raises(bug, match="ours"):
        write_report([root], root / "report.html")


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"clips": []},
        {"clips": [{"frames": [{"cosine": [[10**400]]}]}]},
        {"block": 8, "step": 1, "sigma": 0.5, "clips": [{"frames": [{"frame": 0, "picture": 5, "cosine": [[0.5]]}]}]},
        alignment_map(picture="https://example.org/a.jpg"),
        alignment_map(picture="data:image/jpeg;base64,AAAA"),
        alignment_map(picture="data:image/jpeg;base64,A"),
        alignment_map(cosine=[[0.5], [0.5, 0.5]]),
        alignment_map(cosine=[[]]),
        alignment_map(cosine=[]),
        alignment_map(cosine=[[float("nan")]]),
        alignment_map(cosine=[["0.5"]]),
        alignment_map(cosine=[[5.0]]),
        alignment_map(frame="<b>"),
    ],
)
def test_a_damaged_map_is_refused_in_one_message(tmp_path, content):
    root = write_run(tmp_path / "run")
    (root / "alignment_map.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"(?s)alignment_map\.json can't be read.*--map"):
        write_report([root], root / "report.html")
