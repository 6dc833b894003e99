"""The account of memory: the same on tensors with and without values, and what is said of it."""

import json
import sys

import pytest
import torch

from crepatrain import cli
from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.data.buckets import Bucket
from crepatrain.errors import UserError
from crepatrain.families import family_class, get_family
from crepatrain.families.random import write_random_pipeline
from crepatrain.memory import estimate as vram
from crepatrain.memory.account import StorageAccount, materialise
from crepatrain.running import rehearsal
from crepatrain.specs import FAMILIES
from crepatrain.training import build

SIZES = {"wan": (9, 64, 96), "ltxvideo": (17, 128, 192), "sanavideo": (9, 64, 96), "kandinsky5_video": (9, 64, 96)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("vram")

    def folder(family, name="tiny"):
        place = root / f"{family}-{name}"
        if not place.exists():
            place.mkdir()
            write_random_pipeline(family_class(family), place, family_class(family).tiny[name])
        return place

    return folder


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Tiny steps are not worth processes of their own, on however busy a machine."""
    monkeypatch.setattr(vram, "_SLOW_SECONDS", float("inf"))


@pytest.fixture
def plan_of(tiny, config_file):
    def plan(family="wan", name="tiny", **changes):
        frames, height, width = SIZES[family]
        folder = tiny(family, name)
        size = {"num_frames": frames, "height": height, "width": width}
        models = {"pretrained_model_name_or_path": str(folder), "crepa_encoder": str(folder / "encoder")}
        return read_plan(config_file(model_family=family, **models, **size | changes))

    return plan


def bucket_of(plan):
    frames, height, width = plan.size
    return Bucket(frames, height, width)


CONFIGS = [
    {"mixed_precision": "bf16"},
    {"mixed_precision": "bf16", "gradient_checkpointing": False, "train_batch_size": 2},
    {"model_type": "full", "gradient_accumulation_steps": 2, "use_ema": True},
    {"crepa_enabled": False},
]


def of_families(cases):
    """All of them for one family; for the others the first here, the rest in the long form."""
    return [
        pytest.param(family, changes, marks=[pytest.mark.slow] * (family != "wan" and number > 0), id=f"{family}-{number}")
        for family in FAMILIES
        for number, changes in enumerate(cases)
    ]


@pytest.mark.parametrize(("family", "changes"), of_families(CONFIGS))
def test_the_account_without_values_is_the_real_one_to_the_byte(plan_of, family, changes):
    plan = plan_of(family, **changes)
    fake, real = (vram.training_stage(plan, bucket_of(plan), fake=fake) for fake in (True, False))
    assert fake == real
    assert fake.op
    assert {"transformer", "activations", "optimizer", "batch"} <= fake.by_owner.keys()


def test_other_optimizers_hold_less(plan_of, monkeypatch):
    monkeypatch.setattr("crepatrain.config.checks.find_spec", lambda _: True)  # the estimate needs no bitsandbytes
    held = {}
    for optimizer in ("adamw", "adamw8bit", "adafactor"):
        plan = plan_of(model_type="full", optimizer=optimizer, crepa_enabled=False)
        held[optimizer] = vram.training_stage(plan, bucket_of(plan)).by_owner["optimizer"]
    # Tiny tensors are rounded up to 512 bytes each, so less is saved than of large ones.
    assert held["adamw8bit"] < 0.7 * held["adamw"]
    assert held["adafactor"] < 0.7 * held["adamw"]


@pytest.mark.parametrize("source", ["pixels", "latents", "backbone"])
def test_every_teacher_is_accounted_for(plan_of, source):
    plan = plan_of(crepa_feature_source=source, **{"crepa_teacher_block_index": 9} if source == "backbone" else {})
    fake, real = (vram.training_stage(plan, bucket_of(plan), fake=fake) for fake in (True, False))
    assert fake == real
    assert ("teacher" in fake.by_owner) == (source != "backbone")
    assert ("VAE" in fake.by_owner) == (source == "latents")


@pytest.mark.parametrize("family", ["wan", pytest.param("ltxvideo", marks=pytest.mark.slow)])
def test_a_validation_video_is_accounted_for(plan_of, family):
    plan = plan_of(family, validation_prompts=["a"], mixed_precision="bf16")
    fake, real = (vram.sampling_stage(plan, bucket_of(plan), fake=fake) for fake in (True, False))
    assert fake == real
    assert {"transformer", "adapter", "VAE", "optimizer", "activations"} <= fake.by_owner.keys()
    estimate = vram.estimate(plan_of(family, validation_prompts=["a"], crepa_enabled=False), [bucket_of(plan)])
    assert list(estimate.stages) == ["caching text", "caching clips", "training", "sampling"]


@pytest.mark.parametrize(("family", "name"), [("wan", "tiny-i2v"), ("wan", "tiny-i2v-a14b"), ("ltxvideo", "tiny")])
def test_a_first_frame_is_accounted_for(plan_of, family, name):
    expert = {"wan_expert": "low"} if "a14b" in name else {}
    plan = plan_of(family, name, task="i2v", **expert)
    fake, real = (vram.training_stage(plan, bucket_of(plan), fake=fake) for fake in (True, False))
    assert fake == real


def test_parts_weigh_what_they_weigh(plan_of):
    plan = plan_of(crepa_enabled=False, gradient_checkpointing=False)
    found = vram.training_stage(plan, bucket_of(plan)).by_owner
    family = build.build_family(plan)
    transformer = family.empty_transformer()
    build.adapt(plan, family, transformer)

    def weigh(tensors):
        return sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors)

    frozen = [p for p in transformer.parameters() if not p.requires_grad] + list(transformer.buffers())
    adapter = [p for p in transformer.parameters() if p.requires_grad]
    assert found["transformer"] == weigh(frozen)
    assert found["adapter"] == weigh(adapter)
    steps = 512 * (len(adapter) + 1)  # AdamW counts them, one number each, and is told whether to move
    assert found["optimizer"] == 2 * weigh(adapter) + steps


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_of_the_types_that_loading_gives(tiny, plan_of, family):
    plan = plan_of(family, mixed_precision="bf16")
    loaded = build.build_transformer(plan, build.build_family(plan), torch.device("cpu"))
    planned = vram._transformer(plan, build.build_family(plan))
    assert {n: p.dtype for n, p in planned.named_parameters()} == {n: p.dtype for n, p in loaded.named_parameters()}
    assert {n: b.dtype for n, b in planned.named_buffers()} == {n: b.dtype for n, b in loaded.named_buffers()}


def test_an_account_follows_what_lives():
    account = StorageAccount()
    with account:
        with account.of("a"):
            kept = torch.empty(1024)
        account.begin()
        with account.of("b"):
            gone = torch.empty(2048)
            view = gone[:10]
            del gone
            more = torch.empty(256)
            del view
        with account.of("c"):
            last = torch.empty(1)
        assert account.peak == 4096 + 8192 + 1024
        assert dict(account.peak_of) == {"a": 4096, "b": 9216}
        account.begin()
        assert account.peak == 4096 + 1024 + 512
        account.give(kept, "d")
        account.begin()
        assert account.peak_of["d"] == 4096
        assert account.peak_of["a"] == 0
    assert last.numel() + more.numel() == 257


def test_materialise_reaches_plain_attributes_and_keeps_ties():
    with torch.device("meta"):
        module = torch.nn.Linear(2, 3)
        module.register_buffer("buffer", torch.zeros(4))
        module.plain = torch.zeros(5, dtype=torch.float64)
        module.tied = torch.nn.Module()
        module.tied.weight = module.weight
    materialise(module)
    assert {t.device.type for t in (module.weight, module.bias, module.buffer, module.plain)} == {"cpu"}
    assert module.tied.weight is module.weight
    assert module.plain.dtype == torch.float64


def test_an_estimate_of_everything(plan_of):
    plan = plan_of(train_batch_size=2, gradient_checkpointing=False)
    estimate = vram.estimate(plan, [Bucket(5, 64, 96), bucket_of(plan), Bucket(9, 64, 64)])
    training = vram.training_stage(plan, bucket_of(plan))
    assert estimate.stages["training"] == training
    off = vram.training_stage(plan_of(train_batch_size=2, gradient_checkpointing=False, crepa_enabled=False), bucket_of(plan))
    assert estimate.crepa["cached"] == training.peak - off.peak
    assert list(estimate.crepa) == ["cached", "pixels", "latents", "backbone"]
    remedies = dict(estimate.remedies)
    assert {"gradient_checkpointing: true", "train_batch_size: 1", "num_frames: 5", "optimizer: adamw8bit"} <= remedies.keys()
    assert all(peak < training.peak for peak in remedies.values())
    assert list(remedies.values()) == sorted(remedies.values())
    half = vram.training_stage(plan_of(train_batch_size=1, gradient_checkpointing=False), bucket_of(plan))
    assert remedies["train_batch_size: 1"] == half.peak
    told = estimate.as_json()
    assert told["peak_gib"] == max(stage["peak_gib"] for stage in told["stages"].values() if stage)
    for stage in filter(None, told["stages"].values()):
        assert sum(stage["by_owner"].values()) == pytest.approx(stage["peak_gib"])
    assert told["calibrated"] is False


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


def test_what_does_not_fit_is_told_before_the_first_step(config_file, tmp_path, monkeypatch):
    def exhausted(*_args, **_kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(rehearsal, "training_loss", exhausted)
    with pytest.raises(UserError, match=r"(?s)largest clips, 9 x 64 x 96.*GiB.*num_frames: 5 \(.*GiB\).*nothing was trained"):
        fit(read_plan(config_file()), Screen(quiet=True), rehearsed=True)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_json_is_all_that_is_printed(plan_of, tmp_path, monkeypatch, capsys):
    plan_of(crepa_enabled=False)
    assert run(monkeypatch, "dry-run", tmp_path / "config.json", "--estimate-vram", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {"stages", "peak_gib", "calibrated", "remedies"} <= told.keys()
    assert told["stages"].keys() == {"caching", "training", "sampling"}
    parts = told["stages"]["caching"]["parts"]
    assert told["stages"]["caching"]["peak_gib"] == max(parts["text"]["peak_gib"], parts["clips"]["peak_gib"])


def test_nabla_has_no_estimate_and_says_so(plan_of, tmp_path, monkeypatch, capsys):
    plan = plan_of("kandinsky5_video", "tiny-nabla", height=128, width=128)
    with pytest.raises(UserError, match=r"no estimate for .*tiny-nabla: its step does not run"):
        vram.training_stage(plan, bucket_of(plan))
    assert run(monkeypatch, "dry-run", tmp_path / "config.json", "--fits", 24) == 2
    assert "no estimate" in capsys.readouterr().err


def test_a_model_can_be_assumed(plan_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vram, "_smaller", lambda *_: {})
    plan_of(num_frames=5, mixed_precision="bf16", crepa_enabled=False)
    command = ("dry-run", tmp_path / "config.json", "--assume-model", "wan2.1-1.3b", "--json")
    assert run(monkeypatch, *command) == 0
    told = json.loads(capsys.readouterr().out)["stages"]
    assert told["training"]["by_owner"]["transformer"] == pytest.approx(2.65, abs=0.01)
    assert told["caching"]["parts"]["text"]["by_owner"]["text encoder"] == pytest.approx(10.58, abs=0.01)
    assert run(monkeypatch, "dry-run", tmp_path / "config.json", "--assume-model", "wan2.1-1.3bb") == 2
    assert "did you mean wan2.1-1.3b?" in capsys.readouterr().err


def test_every_released_model_is_known_by_its_text_encoders():
    for spec in FAMILIES.values():
        family = get_family(spec.name, next(iter(spec.released.values())).checkpoint)
        assert spec.text_parameters > 2e9
        assert family.text_shapes()["prompt_embeds"][0] == spec.text_length
