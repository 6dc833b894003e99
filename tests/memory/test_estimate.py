"""The estimate of a whole run: its stages, its remedies, and what is printed of them."""

import json
import multiprocessing
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from plans import bucket_of, plans

from crepatrain import cli
from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.data.buckets import Bucket
from crepatrain.errors import UserError
from crepatrain.families import get_family
from crepatrain.memory import estimate as vram
from crepatrain.memory import stages
from crepatrain.running import rehearsal
from crepatrain.specs import ENCODERS, FAMILIES


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Tiny steps are not worth processes of their own, on however busy a machine."""
    monkeypatch.setattr(vram, "_SLOW_SECONDS", float("inf"))


@pytest.fixture
def plan_of(tiny_checkpoint, config_file):
    return plans(tiny_checkpoint, config_file)


def estimated(plan, buckets, **changes):
    return vram.estimate_memory(plan, buckets, Screen(quiet=True), what="estimating", **changes)


@pytest.mark.slow
def test_an_estimate_of_everything(plan_of):
    plan = plan_of(train_batch_size=2, gradient_checkpointing=False)
    estimate = estimated(plan, [Bucket(5, 64, 96), bucket_of(plan), Bucket(9, 64, 64)], everything=True)
    training = stages.training_stage(plan, bucket_of(plan))
    assert estimate.stages["training"] == training
    off = stages.training_stage(plan_of(train_batch_size=2, gradient_checkpointing=False, crepa_enabled=False), bucket_of(plan))
    assert estimate.crepa["cached"] == training.peak - off.peak
    assert list(estimate.crepa) == ["cached", "backbone", "pixels", "latents"]
    remedies = dict(estimate.remedies)
    assert {"gradient_checkpointing: true", "train_batch_size: 1", "num_frames: 5", "optimizer: adamw8bit"} <= remedies.keys()
    assert all(peak < training.peak for peak in remedies.values())
    assert list(remedies.values()) == sorted(remedies.values())
    half = stages.training_stage(plan_of(train_batch_size=1, gradient_checkpointing=False), bucket_of(plan))
    assert remedies["train_batch_size: 1"] == half.peak
    values = estimate.as_json()
    assert values["peak_gib"] == max(stage["peak_gib"] for stage in values["stages"].values() if stage)
    for stage in filter(None, values["stages"].values()):
        assert sum(stage["by_owner"].values()) == pytest.approx(stage["peak_gib"])
    assert values["calibrated"] is False


@pytest.mark.parametrize("family", ["wan", pytest.param("ltxvideo", marks=pytest.mark.slow)])
def test_videos_of_validation_are_a_stage(plan_of, family):
    plan = plan_of(family, validation_prompts=["a"], crepa_enabled=False)
    estimate = estimated(plan, [bucket_of(plan)])
    assert list(estimate.stages) == ["caching text", "caching clips", "training", "sampling"]


def test_an_8bit_adamw_holds_what_the_estimate_offers(plan_of, monkeypatch):
    """The remedy is the estimate of the config that takes it."""
    monkeypatch.setattr("crepatrain.config.checks.find_spec", lambda _: True)  # the estimate needs no bitsandbytes
    plan = plan_of(model_type="full")
    offered = dict(estimated(plan, [bucket_of(plan)]).remedies)["optimizer: adamw8bit"]
    taken = plan_of(model_type="full", optimizer="adamw8bit")
    found_inf = 2 * 512  # the fused AdamW of transformer and projector keeps a scalar that says whether it may move
    assert abs(offered - stages.training_stage(taken, bucket_of(taken)).peak) <= 1.03 * found_inf


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["crepatrain", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as left:
        return left.code or 0
    return 0


def test_the_table_tells_who_holds_what(plan_of, tmp_path, monkeypatch, capsys):
    plan_of()
    assert run(monkeypatch, "dry-run", tmp_path / "config.json", "--estimate-vram") == 0
    out = capsys.readouterr().out
    for word in ("transformer", "adapter", "projector", "optimizer", "activations", "margin", "CREPA, cached", "141 GB"):
        assert word in out


@pytest.mark.parametrize(("gigabytes", "code"), [(24, 0), (0.01, 5)])
def test_fits_is_an_exit_code(plan_of, tmp_path, monkeypatch, capsys, gigabytes, code):
    plan_of(crepa_enabled=False)
    assert run(monkeypatch, "dry-run", tmp_path / "config.json", "--fits", gigabytes) == code
    assert ("do not fit" in capsys.readouterr().out) == (code == 5)


def test_a_rehearsal_changes_no_number(config_file, tmp_path):
    """The largest clips are tried before the first step; losses are the same to the bit."""
    losses = []
    for rehearsed in (False, True):
        path = config_file(
            output_dir=str(tmp_path / f"run-{rehearsed}"), lora_dropout=0.2, aspect_buckets=True, max_train_steps=3
        )
        fit(read_plan(path), Screen(quiet=True), rehearsed=rehearsed)
        lines = (tmp_path / f"run-{rehearsed}" / "metrics.jsonl").read_text().splitlines()
        losses.append([(json.loads(line)["loss"], json.loads(line)["grad_norm"]) for line in lines])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_what_does_not_fit_is_reported_before_the_first_step(config_file, tmp_path, monkeypatch):
    def exhausted(*_args, **_kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(rehearsal, "training_loss", exhausted)
    with pytest.raises(UserError, match=r"(?s)largest clips, 9 x 64 x 96.*GiB.*num_frames: 5 \(.*GiB\).*nothing was trained"):
        fit(read_plan(config_file()), Screen(quiet=True), rehearsed=True)
    assert not (tmp_path / "run" / "checkpoints").exists()


class Said(Screen):
    """Keeps the notes and the progress."""

    def __init__(self):
        super().__init__(quiet=True)
        self.heard = []

    def note(self, text):
        self.heard.append(text)

    def progress(self, what, total):
        self.heard.append(what)
        return super().progress(what, total)


def test_out_of_memory_is_said_before_it_is_worked_out_what_would_fit(config_file, monkeypatch):
    def exhausted(*_args, **_kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(rehearsal, "training_loss", exhausted)
    screen = Said()
    with pytest.raises(UserError, match="largest clips"):
        fit(read_plan(config_file()), screen, rehearsed=True)
    first = next(n for n, text in enumerate(screen.heard) if text.startswith("out of GPU memory on the largest clips"))
    assert screen.heard[first + 1] == "working out what would fit"


def test_a_video_that_can_not_be_decoded_is_reported_before_the_first_step(config_file, monkeypatch):
    def exhausted(*_args, **_kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(rehearsal.build, "build_vae", exhausted)
    plan = read_plan(config_file(validation_prompts=["a"], validation_steps=100))
    context = SimpleNamespace(plan=plan, device=torch.device("cpu"), screen=Screen(quiet=True))
    run = SimpleNamespace(context=context, family=None)
    with pytest.raises(UserError, match=r"(?s)validation_prompts: out of GPU memory.*decoded.*vae_dtype.*nothing was trained"):
        rehearsal._rehearse_decoding(run)


def test_a_process_that_ends_costs_remedies_only(plan_of):
    """The other process works from the end; what this one needs it then works out itself."""
    plan = plan_of(train_batch_size=2, crepa_enabled=False)
    needed = {("caching", "caching"): (plan.config, bucket_of(plan))}
    wanted = {("remedy", name): job for name, job in vram.remedies_of(plan, bucket_of(plan)).items()}
    killed = []

    def kill():
        if not killed:
            killed.append(True)
            for child in multiprocessing.active_children():
                child.kill()

    found, lost = vram._run_all(needed, wanted, kill, beside=True)
    assert ("caching", "caching") in found
    assert len(found) + lost == 1 + len(wanted)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("source", ["pixels", "latents", "backbone"])
def test_what_the_method_can_do_without_is_among_the_remedies(plan_of, source):
    plan = plan_of(crepa_feature_source=source, **{"crepa_teacher_block_index": 9} if source == "backbone" else {})
    if plan.encoder:  # a tiny one is smaller than all that are known by name
        plan = replace(plan, encoder=ENCODERS["dinov2_vitg14"])
    offered = vram.remedies_of(plan, bucket_of(plan))
    expected = ["crepa_spatial_align: false", f"crepa_block_index: {plan.config.crepa.block // 2}"]
    expected += ["crepa_encoder: dinov2_vitl14"] if source != "backbone" else []
    assert set(expected) <= offered.keys()
    assert any(name.startswith("height: ") for name in offered)
    assert not any(name.startswith("crepa") for name in vram.remedies_of(plan_of(), bucket_of(plan)))


def test_json_is_all_that_is_printed(plan_of, tmp_path, monkeypatch, capsys):
    plan_of(crepa_enabled=False)
    assert run(monkeypatch, "dry-run", tmp_path / "config.json", "--estimate-vram", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert {"stages", "peak_gib", "calibrated", "remedies"} <= values.keys()
    assert values["stages"].keys() == {"caching", "training", "sampling"}
    parts = values["stages"]["caching"]["parts"]
    assert values["stages"]["caching"]["peak_gib"] == max(parts["text"]["peak_gib"], parts["clips"]["peak_gib"])


def test_a_model_without_an_estimate_has_an_exit_code(plan_of, tmp_path, monkeypatch, capsys):
    plan_of("kandinsky5_video", "tiny-nabla", height=128, width=128, compile=True)
    assert run(monkeypatch, "dry-run", tmp_path / "config.json", "--fits", 24) == 2
    assert "no estimate" in capsys.readouterr().err


def test_a_model_can_be_assumed(plan_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vram, "remedies_of", lambda *_, **__: {})
    plan_of(num_frames=5, mixed_precision="bf16", crepa_enabled=False)
    command = ("dry-run", tmp_path / "config.json", "--text_encoder_offload", "false", "--assume-model", "wan2.1-1.3b", "--json")
    assert run(monkeypatch, *command) == 0
    values = json.loads(capsys.readouterr().out)["stages"]
    assert values["training"]["by_owner"]["transformer"] == pytest.approx(2.65, abs=0.01)
    assert values["caching"]["parts"]["text"]["by_owner"]["text encoder"] == pytest.approx(10.58, abs=0.01)
    assert run(monkeypatch, "dry-run", tmp_path / "config.json", "--assume-model", "wan2.1-1.3bb") == 2
    assert "did you mean wan2.1-1.3b?" in capsys.readouterr().err


def test_every_released_model_is_known_by_its_text_encoders():
    for spec in FAMILIES.values():
        family = get_family(spec.name, next(iter(spec.released.values())).checkpoint)
        sizes = spec.text_parameters
        assert 2e9 < sizes.total < 1e10
        assert sizes.largest < sizes.total - sizes.outside < sizes.total
        assert family.text_shapes()["prompt_embeds"][0] == family.text_length
