"""A run's report, from real tiny runs: its numbers, its one file, its picture in a browser."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import context_of, render_clip

from crepatrain import cli
from crepatrain.alignment.crepa import Crepa
from crepatrain.commands.fit import fit
from crepatrain.commands.report import report
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.data.cache import CacheStore, unpack_features
from crepatrain.data.loader import keyed_generator
from crepatrain.errors import UserError
from crepatrain.geometry import TokenGrid
from crepatrain.records.events import Ended, Logged, Subscriber, VideosMade
from crepatrain.records.reading import read_run
from crepatrain.reporting import page
from crepatrain.reporting.charts import Curve, curve_chart, smoothed, thinned
from crepatrain.reporting.report import live_report, refresh_report
from crepatrain.running import loop
from crepatrain.running.events import BatchReady
from crepatrain.tensors import Batch, PatchFeatures
from crepatrain.training import build
from crepatrain.training.checkpoint import read_tensors
from crepatrain.training.lora import load_trained_state

PART, WHOLE = 4, 8
TIMES = re.compile(r".*_seconds|samples_per_second")


def lines_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not TIMES.fullmatch(key)} for line in lines]


@pytest.fixture(scope="module")
def train(wan: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains the tiny Wan in a folder of that name, or goes on there."""
    root = tmp_path_factory.mktemp("runs")

    def trained(name: str, subscribers: Sequence[Subscriber] = (), **changes: Any) -> Path:
        config = {
            "model_family": "wan",
            "pretrained_model_name_or_path": str(wan),
            "train_data": str(clips),
            "output_dir": str(root / name),
            "cache_dir": str(tmp_path_factory.getbasetemp() / "cache"),
            "height": 64,
            "width": 96,
            "num_frames": 9,
            "max_train_steps": PART,
            "mixed_precision": "no",
            "dataloader_num_workers": 0,
            "gradient_accumulation_steps": 2,
            "lora_rank": 4,
            "learning_rate": 1e-3,
            "crepa_enabled": True,
            "crepa_similarity_threshold": 0.9,
            "crepa_encoder": str(wan / "encoder"),
            "crepa_encoder_image_size": "grid",
        }
        file = root / f"{name}.json"
        file.write_text(json.dumps(config | changes), encoding="utf-8")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        fit(read_plan(file), Screen(quiet=True), subscribers=subscribers)
        torch.set_num_threads(threads)
        return root / name

    return trained


@pytest.fixture(scope="module")
def recorded() -> list[tuple[list[float], list[float]]]:
    """Per micro-batch of the first run its samples' diffusion losses and noise levels."""
    return []


@pytest.fixture(scope="module")
def first(train: Callable[..., Path], recorded: list[Any]) -> Path:
    """A run in two parts."""

    def training_loss(*args: Any) -> Any:
        losses = true_loss(*args)
        recorded.append((losses.diffusion.tolist(), batches[-1].sigma.tolist()))
        return losses

    def note(event: object) -> None:
        if isinstance(event, BatchReady):
            batches.append(event.batch)

    batches: list[Batch] = []
    with pytest.MonkeyPatch.context() as patch:
        true_loss = loop.training_loss
        patch.setattr(loop, "training_loss", training_loss)
        train("first", subscribers=[note])
        return train("first", subscribers=[note], max_train_steps=WHOLE)


@pytest.fixture(scope="module")
def second(train: Callable[..., Path]) -> Path:
    return train("second", crepa_lambda=0.1, logging_steps=2)


@pytest.fixture(scope="module")
def averaged(train: Callable[..., Path]) -> Path:
    """A run whose average is far from its last weights."""
    return train("averaged", max_train_steps=WHOLE, learning_rate=5e-2, use_ema=True, ema_decay=0.9)


@pytest.fixture
def copied(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "copied"))


def charts_in(html: Path) -> dict[str, dict[str, Any]]:
    text = html.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', text, re.DOTALL)
    assert found
    return {chart["key"]: chart for chart in json.loads(found.group(1))}


def run_cli(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["crepatrain", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


# What is logged for it


def test_losses_by_noise_level_are_those_of_the_samples(first: Path, recorded: list[Any]):
    for index, line in enumerate(lines_of(first)):
        expected: dict[str, list[float]] = {}
        for losses, sigmas in recorded[2 * index : 2 * index + 2]:
            for loss, sigma in zip(losses, sigmas, strict=True):
                place = min(int(sigma * 5), 4)
                expected.setdefault(f"0.{2 * place}-{(place + 1) / 5:.1f}", []).append(loss)
        assert line["sigma_loss"] == {name: pytest.approx(sum(found) / len(found)) for name, found in expected.items()}


def test_the_parts_are_parts_of_the_step(first: Path):
    for line in lines_of(first):
        parts = [line[f"{part}_seconds"] for part in ("data", "forward", "crepa", "backward", "optimizer")]
        assert all(part > 0 for part in parts)
        assert 0.5 * line["step_seconds"] < sum(parts) <= line["step_seconds"]


def test_timing_changes_no_number(train: Callable[..., Path], first: Path, monkeypatch: pytest.MonkeyPatch):
    class NoClock:
        def __init__(self, device: torch.device) -> None: ...

        @contextmanager
        def part(self, name: str) -> Iterator[None]:
            yield

        waiting = part

        def seconds(self) -> dict[str, float]:
            return dict.fromkeys(("data", "forward", "crepa", "backward", "optimizer"), 0.0)

    monkeypatch.setattr(loop, "StepClock", NoClock)
    assert timeless(lines_of(train("untimed", max_train_steps=2))) == timeless(lines_of(first)[:2])


# The file


def test_fit_ends_with_a_report_of_its_own(first: Path):
    charts = charts_in(first / "report.html")
    assert {"loss", "diffusion_loss", "crepa_loss", "crepa_alignment_score", "crepa_similarity_self", "crepa_weight"} <= set(
        charts
    )
    assert {"learning_rate", "grad_norm", "step_parts", "sigma_loss", "sigma_bars"} <= set(charts)
    assert "layersync_loss" not in charts, "what was not logged has no chart"
    for key in ("loss", "crepa_similarity_self", "grad_norm", "learning_rate"):
        logged = charts[key]["series"][0]
        assert logged["x"] == list(range(1, WHOLE + 1))
        assert logged["y"] == [line[key] for line in lines_of(first)]
    score = charts["crepa_alignment_score"]
    assert [level["at"] for level in score["levels"]] == [0.9]
    ema = next(one for one in score["series"] if one["name"] == "EMA")
    assert ema["y"] == [line["crepa_alignment_score_ema"] for line in lines_of(first)]


def test_the_step_is_stacked_from_its_parts(first: Path):
    series = charts_in(first / "report.html")["step_parts"]["series"]
    assert [one["name"] for one in series] == ["data", "forward", "crepa", "backward", "optimizer", "other"]
    assert sum(one["y"][0] for one in series) == pytest.approx(lines_of(first)[0]["step_seconds"])


def test_the_file_asks_for_nothing_else(first: Path):
    text = (first / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?!data:)[^"'> ]+""", text)
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) == {"http://www.w3.org/2000/svg"}


def test_changed_keys_come_first_and_the_dataset_is_described(first: Path):
    text = (first / "report.html").read_text(encoding="utf-8")
    assert (
        text.index("<code>crepa_enabled</code>")
        < text.index("keys at their default")
        < text.index("<code>crepa_adjacent_tau</code>")
    )
    assert "9 x 64 x 96" in text
    assert "a square moves, number 2" in text
    assert json.loads((first / "dataset.json").read_text(encoding="utf-8"))["clips"] == 3


def test_several_runs_are_drawn_over_each_other(first: Path, second: Path, tmp_path: Path):
    out = tmp_path / "both.html"
    report([first, second], out, Screen(quiet=True))
    charts = charts_in(out)
    assert {one["name"] for one in charts["loss"]["series"]} == {"first", "second"}
    assert len({one["color"] for one in charts["loss"]["series"]}) == 2
    assert [one["name"] for one in charts["sigma_bars"]["series"]] == ["first", "second"]
    assert charts["step_parts"]["categories"] == ["first", "second"]
    text = out.read_text(encoding="utf-8")
    assert '<tr class="differs"><td><code>crepa_lambda</code>' in text
    assert '<tr class="differs"><td><code>learning_rate</code>' not in text


def test_a_run_that_is_given_twice_is_refused(first: Path, second: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(first)
    with pytest.raises(UserError, match=r"(?s)link was given twice\n.*give each run once"):
        report([first, second, tmp_path / "link"], tmp_path / "out.html", Screen(quiet=True))


def test_runs_of_one_name_get_their_parents_names_as_well(first: Path, tmp_path: Path):
    roots = [Path(shutil.copytree(first, tmp_path / name / "run")) for name in ("a/deep", "b/deep", "c")]
    out = tmp_path / "all.html"
    report([*roots, first], out, Screen(quiet=True))
    charts = charts_in(out)
    names = ["a/deep/run", "b/deep/run", "c/run", "first"]
    assert list(dict.fromkeys(one["name"] for one in charts["loss"]["series"])) == names
    assert len({one["color"] for one in charts["loss"]["series"]}) == 4
    assert charts["step_parts"]["categories"] == names
    text = out.read_text(encoding="utf-8")
    assert all(f"<h2>Dataset of {name}</h2>" in text for name in names)


def test_the_best_checkpoint_is_marked(copied: Path, second: Path, tmp_path: Path):
    with (copied / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(f'{{"step": {step}, "eval_loss": {loss}}}\n' for step, loss in ((4, 0.25), (8, 0.5)))
    (copied / "best.json").write_text('{"step": 4, "eval_loss": 0.25}', encoding="utf-8")
    refresh_report(copied)
    [mark] = charts_in(copied / "report.html")["eval_loss"]["marks"]
    assert (mark["name"], mark["at"]) == ("best at step 4", 4)
    out = tmp_path / "both.html"
    report([second, copied], out, Screen(quiet=True))
    [mark] = charts_in(out)["eval_loss"]["marks"]
    assert (mark["name"], mark["at"], mark["color"]) == ("copied: best at step 4", 4, "c1")


def test_held_out_numbers_videos_and_figures_are_shown_where_they_are(copied: Path, monkeypatch: pytest.MonkeyPatch):
    with (copied / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 8, "eval_loss": 0.5, "eval_alignment": null, "eval_sigma_loss": {"0.1": 0.75}}\n')
    samples = copied / "samples"
    samples.mkdir()
    for step in (5, 8):
        render_clip(samples / f"step-{step:06d}-0.mp4", frames=4, seed=step)
    figures = [{"step": step, "prompt": "p", "flicker": 1 / step, "consistency": 0.9} for step in (5, 5, 8)]
    (samples / "figures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in figures), encoding="utf-8")
    refresh_report(copied)
    charts = charts_in(copied / "report.html")
    assert (charts["eval_loss"]["series"][0]["x"], charts["eval_loss"]["series"][0]["y"]) == ([8], [0.5])
    assert charts["flicker"]["series"][0]["y"] == [0.2, 0.125]
    assert charts["eval_sigma_loss"]["series"][0]["y"] == [0.75]
    assert "eval_alignment" not in charts
    assert (copied / "report.html").read_text(encoding="utf-8").count("data:video/mp4;base64,") == 2
    monkeypatch.setattr(page, "_VIDEO_BYTES", (samples / "step-000008-0.mp4").stat().st_size)
    refresh_report(copied)
    text = (copied / "report.html").read_text(encoding="utf-8")
    assert text.count("data:video/mp4;base64,") == 1, "the newest is kept"
    assert "step-000008-0.mp4" in text
    assert "1 older or larger videos are left out" in text


def test_words_of_the_user_are_words_alone(copied: Path):
    dataset = json.loads((copied / "dataset.json").read_text(encoding="utf-8"))
    dataset["captions"][0]["caption"] = "</script><script>alert(1)</script>"
    (copied / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    renamed = copied.rename(copied.with_name("<b>run & <!--"))
    refresh_report(renamed)
    text = (renamed / "report.html").read_text(encoding="utf-8")
    assert "alert(1)</script>" not in text
    assert "<b>run" not in text


def test_a_line_that_is_being_written_is_left_out(copied: Path):
    with (copied / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 9, "lo')
    refresh_report(copied)
    assert charts_in(copied / "report.html")["loss"]["series"][0]["x"][-1] == WHOLE


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "no step is logged there"),
        (lambda file: file.write_text("", encoding="utf-8"), "no step is logged there"),
        (lambda file: file.write_text('{"step": 1}\n{"st\n{"step": 3}\n', encoding="utf-8"), "line 2: it is damaged"),
        (lambda file: file.write_text('{"loss": 1}\n', encoding="utf-8"), "line 1: it is damaged"),
        (lambda file: file.write_bytes(b"\xff\xfe\n"), "line 1: it is damaged"),
    ],
    ids=["gone", "empty", "cut", "no step", "bytes"],
)
def test_damaged_metrics_are_one_message(copied: Path, monkeypatch, capsys, damage: Callable[[Path], Any], message: str):
    damage(copied / "metrics.jsonl")
    before = (copied / "report.html").read_bytes()
    assert run_cli(monkeypatch, "report", copied) == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert errors.count("error:") == 1
    assert message in errors
    assert (copied / "report.html").read_bytes() == before


def test_a_folder_without_a_run_is_refused(tmp_path: Path, first: Path):
    with pytest.raises(UserError, match="it holds no run"):
        report([tmp_path], None, Screen(quiet=True))
    with pytest.raises(UserError, match="no such folder"):
        report([tmp_path / "nowhere"], None, Screen(quiet=True))
    with pytest.raises(UserError, match="compare 8 at most"):
        report([first] * 9, None, Screen(quiet=True))


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
@pytest.mark.parametrize("runs", [["first"], ["first", "second"]])
def test_a_browser_draws_it_without_a_complaint(first: Path, second: Path, tmp_path: Path, runs: list[str]):
    out = tmp_path / "report.html"
    report([{"first": first, "second": second}[name] for name in runs], out, Screen(quiet=True))
    ended = subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *(
                "--enable-logging=stderr",
                "--virtual-time-budget=3000",
                "--window-size=1280,1600",
                f"--user-data-dir={tmp_path / 'profile'}",
            ),
            *("--dump-dom", out.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in ended.stderr
    figures = re.findall(r"<figure data-chart.*?</figure>", ended.stdout, re.DOTALL)
    assert len(figures) == len(charts_in(out))
    assert all(re.search(r"<path d=\"M|<rect [^>]*fill=|<circle", figure) for figure in figures)
    assert "NaN" not in "".join(figures)


def test_a_live_report_follows_the_run(tmp_path: Path):
    """It is drawn anew with videos and at the end; damage is left for whoever asks for a report."""
    root = tmp_path / "run"
    root.mkdir()
    noted: list[str] = []
    refresh = live_report(root, noted.append)
    refresh(Ended("failed", 0, "before its first step"))
    assert not (root / "report.html").exists(), "nothing is logged yet"
    (root / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n', encoding="utf-8")
    refresh(Logged({"step": 1, "loss": 1.0}))
    assert not (root / "report.html").exists()
    refresh(VideosMade(1, {}, root / "samples" / "step-000001.mp4"))
    assert charts_in(root / "report.html")["loss"]["series"][0]["y"] == [1.0]
    with (root / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "loss": 0.5}\n')
    refresh(Ended("completed", 2))
    before = (root / "report.html").read_bytes()
    assert charts_in(root / "report.html")["loss"]["series"][0]["y"] == [1.0, 0.5]
    (root / "metrics.jsonl").write_text("rubbish\n", encoding="utf-8")
    refresh(Ended("completed", 2))
    assert (root / "report.html").read_bytes() == before


# Curves


def test_a_constant_stays_itself_when_smoothed():
    assert smoothed([2.0] * 9, 4) == pytest.approx([2.0] * 9)
    assert smoothed([1.0, 3.0], 2) == pytest.approx([1.0, 1.0 / 3 + 2.0])


def test_a_long_curve_keeps_its_ends_and_its_spikes():
    values = [0.0] * 50_000
    values[31_234] = 9.0
    steps, kept = thinned(list(range(50_000)), values)
    assert len(kept) <= 1000
    assert (steps[0], steps[-1]) == (0, 49_999)
    assert kept[steps.index(31_234)] == 9.0


def test_a_spike_does_not_flatten_the_curve(tmp_path: Path):
    root = tmp_path / "run"
    root.mkdir()
    lines = [{"step": step, "loss": 1.0, "grad_norm": 1e6 if step == 70 else 1.0 + step % 3} for step in range(1, 201)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    chart = curve_chart(Curve("grad_norm", "", noisy=True), [read_run(root)])
    assert chart is not None
    assert chart.series[0].y[69] == 1e6
    assert chart.high < 3e5


# The map


@pytest.mark.parametrize(
    ("options", "teacher_grid", "met"),
    [
        ({}, (4, 6), (4, 6)),
        ({}, (3, 3), (3, 3)),
        ({}, (5, 8), (4, 6)),
        ({"projector": "conv"}, (3, 3), (3, 3)),
        ({"spatial_align": False}, (4, 6), (1, 1)),
    ],
)
def test_patches_average_to_the_self_similarity(options: dict[str, Any], teacher_grid: tuple[int, int], met: tuple[int, int]):
    torch.manual_seed(0)
    crepa = Crepa(16, 12, **options)
    grid = TokenGrid(3, 4, 6, ((0, 1), (1, 5), (5, 9)))
    tokens, teacher = (
        torch.randn(2, grid.tokens, 16),
        PatchFeatures(torch.randn(2, 3, teacher_grid[0] * teacher_grid[1], 12), teacher_grid),
    )
    similar = crepa.patch_similarity(tokens, teacher, grid)
    assert similar.shape == (2, 3, *met)
    assert torch.allclose(similar.flatten(1).mean(dim=1), crepa(tokens, teacher, grid).self_similarity, atol=1e-6)


@pytest.mark.parametrize(("run", "weights"), [("first", "adapter"), ("averaged", "ema")])
def test_the_map_holds_the_cosine_of_every_patch(request, tmp_path, monkeypatch: pytest.MonkeyPatch, run: str, weights: str):
    copied = Path(shutil.copytree(request.getfixturevalue(run), tmp_path / "copied"))
    assert run_cli(monkeypatch, "report", copied, "--map") == 0
    found = json.loads((copied / "alignment_map.json").read_text(encoding="utf-8"))
    assert (found["step"], found["block"], found["sigma"]) == (WHOLE, 8, 0.5)
    assert [clip["name"] for clip in found["clips"]] == [f"clip-{index}.mp4 frames 0-8" for index in range(3)]
    text = (copied / "report.html").read_text(encoding="utf-8")
    assert text.count('<img class="map"') == 9
    assert "Alignment map" in text

    # The second clip once more, step by step.
    plan = read_plan(copied / "config.json", ["--output_dir", str(copied)])
    family = build.build_family(plan)
    transformer = build.load_transformer(plan, family, torch.device("cpu"))
    build.adapt(plan, family, transformer)
    transformer.eval()
    checkpoint = copied / "checkpoints" / f"step-{WHOLE:06d}"
    load_trained_state(transformer, read_tensors(checkpoint, weights))
    projector = read_tensors(checkpoint, "projector")
    clip = found["clips"][1]
    latents, text_embeds, features = entries_of(plan, clip["caption"], index=1)
    generator = keyed_generator(plan.config.loop.seed, 0, 1)
    build.build_process(plan).draw_sigma(generator)
    torch.rand((), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    states = {}
    transformer.blocks[8].register_forward_hook(lambda module, args, output: states.update(block=output))
    with torch.no_grad():
        transformer(
            hidden_states=(0.5 * latents + 0.5 * noise)[None],
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=text_embeds,
        )
    hidden = states["block"][0].view(3, 4, 6, -1)
    for frame in range(3):
        assert clip["frames"][frame]["frame"] == (0, 4, 8)[frame]
        for row in range(4):
            for column in range(6):
                token = F.layer_norm(
                    hidden[frame, row, column],
                    hidden.shape[-1:],
                    projector["projector.norm.weight"],
                    projector["projector.norm.bias"],
                )
                student = projector["projector.linear.weight"] @ token + projector["projector.linear.bias"]
                cosine = F.cosine_similarity(student, features[frame, 6 * row + column].float(), dim=0).item()
                assert clip["frames"][frame]["cosine"][row][column] == pytest.approx(cosine, abs=2e-4)


def entries_of(plan: Any, caption: str, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A window's latents, its caption as a batch of one, and its features, out of the cache."""
    from crepatrain.preparing.precompute import plan_caches
    from crepatrain.preparing.preflight import read_dataset

    context = context_of(plan)
    caches = plan_caches(context, read_dataset(context), teacher=True)
    sample = [one for one in caches.samples if one.name.endswith("frames 0-8")][index]
    store = CacheStore(Path(plan.config.data.cache_dir))
    text = build.build_family(plan).collate_text([store.read("text", caches.text[caption])])["prompt_embeds"]
    assert sample.teacher is not None
    return store.read("latents", sample.latents)["latents"], text, unpack_features(store.read("teacher", sample.teacher))


def test_a_map_needs_a_projector_and_a_checkpoint(copied: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    shutil.rmtree(copied / "checkpoints")
    assert run_cli(monkeypatch, "report", copied, "--map") == 2
    assert "it has no checkpoint yet" in " ".join(capsys.readouterr().err.split())
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    (copied / "config.json").write_text(json.dumps(config | {"crepa_enabled": False}), encoding="utf-8")
    assert run_cli(monkeypatch, "report", copied, "--map") == 2
    assert "trained without CREPA" in " ".join(capsys.readouterr().err.split())
