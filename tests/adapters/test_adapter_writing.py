"""Adapters and transformers as files: what their header says, what programs do with them, and `crepatrain export`."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from common import tiny_family
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crepatrain.adapters.checks import expect_same_adapter
from crepatrain.adapters.writing import write_adapter, write_result
from crepatrain.commands.export import export
from crepatrain.commands.fit import fit
from crepatrain.commands.verify import verify
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.records.runfolder import RunFolder
from crepatrain.specs import FAMILIES
from crepatrain.tensors import Batch
from crepatrain.training import build
from crepatrain.training.checkpoint import write_checkpoint
from crepatrain.training.lora import ADAPTER, add_lora, live_adapter, target_modules, trained_state

HEADER = {"format": "pt"}


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def randomised(transformer, std=0.2):
    """An adapter that has learned something."""
    torch.manual_seed(0)
    with torch.no_grad():
        for down, up, _ in live_adapter(transformer).values():
            down.normal_(std=std)
            up.normal_(std=std)
    return transformer


@pytest.fixture(scope="module")
def opened(tiny_checkpoint):
    """A family with its pipeline, opened once."""
    known = {}

    def open_(name, size="tiny", expert=None):
        if (name, size) not in known:
            folder = tiny_checkpoint(name, size)
            family = tiny_family(name, size, expert=expert)
            pipeline = getattr(diffusers, family.spec.pipelines[family.task]).from_pretrained(folder)
            known[name, size] = SimpleNamespace(family=family, folder=folder, pipeline=pipeline)
        return known[name, size]

    return open_


@torch.no_grad()
def predict(family, transformer):
    """The transformer's output for a fixed random batch."""
    grid = family.geometry.token_grid(9, 64, 96)
    torch.manual_seed(1)
    latents = torch.randn(1, family.geometry.latent_channels, *family.geometry.latent_shape(9, 64, 96)[-3:])
    text = family.collate_text([{name: torch.randn(shape) for name, shape in family.text_shapes().items()}])
    batch = Batch(latents, latents, torch.tensor([0.7]), text, grid, 16.0, ("key",))
    return family.denoise(transformer, latents, torch.tensor([0.7]), batch)


def adapted(family, folder, how):
    """The live transformer with an adapter of a kind."""
    transformer = family.load_transformer(str(folder), torch.float32)
    targets = {"attention only": family.spec.lora_targets}.get(how, "all-linear")
    modules = target_modules(transformer, targets, family.spec)
    if how == "mixed ranks":
        patterns = {"rank_pattern": {modules[0]: 2, modules[5]: 7}, "alpha_pattern": {modules[0]: 3, modules[7]: 1}}
        transformer.requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=modules, **patterns), adapter_name=ADAPTER)
    else:
        alpha = {"all linear": 4, "attention only": 10, "alpha above rank": 10, "rsLoRA": 8}[how]
        add_lora(transformer, modules, rank=4, alpha=alpha, dropout=0.0, rslora=how == "rsLoRA")
    return randomised(transformer)


KINDS = ("alpha above rank", "rsLoRA", "mixed ranks", "attention only", "all linear")


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_pipeline_does_with_the_file_what_the_live_adapter_does(name, how, opened, tmp_path):
    one = opened(name)
    live = adapted(one.family, one.folder, how)
    write_adapter([tmp_path / "adapter.safetensors"], one.family, live, HEADER)
    base = predict(one.family, one.pipeline.transformer)
    one.pipeline.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    found, expected = predict(one.family, one.pipeline.transformer), predict(one.family, live)
    one.pipeline.unload_lora_weights()
    tolerance = 1e-4 if name == "kandinsky5_video" else 1e-5  # it rounds queries and keys to bf16
    assert (found - expected).abs().max() < tolerance * max(1.0, expected.abs().max().item())
    assert (expected - base).abs().max() > 0.05
    verify(tmp_path / "adapter.safetensors", one.folder, Screen(quiet=True))


def test_a_narrower_dtype_is_near_enough(opened, tmp_path):
    one = opened("wan")
    live = adapted(one.family, one.folder, "rsLoRA")
    for dtype in (torch.bfloat16, torch.float16):
        write_adapter([tmp_path / "adapter.safetensors"], one.family, live, HEADER, dtype)
        assert {tensor.dtype for tensor in load_file(tmp_path / "adapter.safetensors").values()} == {dtype}
    with torch.no_grad():
        next(iter(live_adapter(live).values()))[1].fill_(1e5)
    with pytest.raises(UserError, match=r"not finite\n.*one in a wider dtype"):
        write_adapter([tmp_path / "adapter.safetensors"], one.family, live, HEADER, torch.float16)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda t: {k: v for k, v in t.items() if ".blocks.3." not in k}, r"lacks \['blocks.3"),
        (lambda t: {k: v * 1.001 if "lora_B" in k else v for k, v in t.items()}, "does not have the effect of the adapter"),
        (lambda t: {k.replace("self_attn.q", "attn1.to_q"): v for k, v in t.items()}, "diffusers refuses"),
        (lambda t: {k.replace("blocks.9.", "blocks.10."): v for k, v in t.items()}, "has no such layer"),
        (lambda t: {k: v for k, v in t.items() if k != next(iter(t))}, "lack lora_A"),
    ],
)
def test_a_file_that_is_not_the_adapter_is_refused(wrong, reason, opened, tmp_path):
    one = opened("wan")
    live = adapted(one.family, one.folder, "attention only")
    path = tmp_path / "adapter.safetensors"
    write_adapter([path], one.family, live, HEADER)
    save_file(wrong(load_file(path)), path)
    with pytest.raises(UserError, match=reason):
        expect_same_adapter(path, one.family, live)


def test_what_is_wrong_leaves_the_file_before(opened, tmp_path, monkeypatch):
    one = opened("wan")
    live = adapted(one.family, one.folder, "attention only")
    path = tmp_path / "adapter.safetensors"
    write_adapter([path], one.family, live, HEADER)
    before = path.read_bytes()
    randomised(live, std=0.1)
    monkeypatch.setattr(one.family, "export_name", lambda module: f"transformer.{module}")
    with pytest.raises(UserError, match="ComfyUI ignores"):
        write_adapter([path], one.family, live, HEADER)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_kill_between_writing_aside_and_renaming_leaves_the_file_before(opened, tmp_path, monkeypatch):
    one = opened("wan")
    live = adapted(one.family, one.folder, "attention only")
    path = tmp_path / "adapter.safetensors"
    write_adapter([path], one.family, live, HEADER)
    before = path.read_bytes()
    randomised(live, std=0.1)

    class Killed(BaseException):
        pass

    def kill(_self, _target):
        raise Killed

    monkeypatch.setattr(Path, "replace", kill)
    with pytest.raises(Killed):
        write_adapter([path], one.family, live, HEADER)
    assert path.read_bytes() == before


class FakeRun:
    """A run's folder as `fit` leaves it, of random weights."""

    def __init__(self, plan, limit=None):
        self.plan, self.family = plan, build.build_family(plan)
        self.folder = RunFolder(plan.config)
        self.folder.claim(0)
        self.fingerprint = {
            "models": {part: f"digest of {part}" for part in plan.variant.parts},
            "samples": "digest",
            "unit": 2,
            "windows": 3,
            "total": 9,
            "versions": {"crepatrain": "0", "torch": "0"},
        }

    def checkpoint(self, step, *, keep=True):
        torch.manual_seed(step)
        transformer = build.load_transformer(self.plan, self.family)
        build.adapt(self.plan, self.family, transformer)
        if self.plan.config.model.model_type == "lora":
            randomised(transformer, std=0.1 * step)
        write_result(self.folder, self.family, self.fingerprint, transformer, step)
        if keep:
            name = {"lora": "adapter", "full": "transformer"}[self.plan.config.model.model_type]
            tensors = {name: trained_state(transformer)}
            write_checkpoint(
                self.folder.checkpoints / f"step-{step:06d}", tensors, trees={}, plain={"fingerprint": self.fingerprint}
            )
        return transformer


@pytest.fixture
def fake_run(config_file, tiny_checkpoint):
    def make(family="wan", size="tiny", **changes):
        sizes = {"num_frames": 9, "height": 128, "width": 192} if family != "wan" else {}
        path = config_file(
            model_family=family,
            pretrained_model_name_or_path=str(tiny_checkpoint(family, size)),
            **sizes,
            **changes,
        )
        return FakeRun(read_plan(path))

    return make


def test_an_exported_adapter_says_how_it_was_trained(fake_run):
    run = fake_run(trigger_word="sks", lora_alpha=10.0, lora_use_rslora=True, timestep_sampling="shifted", output_name="cat")
    run.checkpoint(7)
    found = header(run.folder.root / "pytorch_lora_weights.safetensors")
    assert found == header(run.folder.adapters / "cat-000007.safetensors")
    expected = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_base_model_version": "wan2.1",
        "ss_steps": "7",
        "ss_epoch": "4",
        "ss_learning_rate": "0.001",
        "ss_seed": "42",
        "ss_discrete_flow_shift": "3.0",
        "ss_timestep_sampling": "shifted",
        "ss_output_name": "cat",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "wan2.1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "cat",
        "modelspec.resolution": "96x64",
        "modelspec.prediction_type": "flow",
        "modelspec.timestep_range": "0,1000",
        "modelspec.trigger_phrase": "sks",
        "crepatrain.format": "1",
        "crepatrain.step": "7",
        "crepatrain.scale": "baked",
    }
    assert found.items() >= expected.items()
    assert found.keys() - expected.keys() == {"modelspec.date", "crepatrain.version", "crepatrain.recipe"}
    recipe = json.loads(found["crepatrain.recipe"])
    assert recipe["base"] == {"repo": "wan-tiny", "revision": None, "sha256": "digest of transformer"}
    assert (recipe["rank"], recipe["alpha_trained"], recipe["rslora"], recipe["scale_baked"]) == (4, 10.0, True, True)
    assert recipe["targets"] == sorted(f"{a}.{t}" for a in ("attn1", "attn2") for t in ("to_q", "to_k", "to_v", "to_out.0"))
    assert recipe["train"] == {
        "shift": 3.0,
        "timestep_sampling": "shifted",
        "t_range": [0.0, 1.0],
        "base_dtype": "float32",
        "resolutions": [[64, 96]],
        "quant": None,
        "prompt_template_id": "WanPipeline",
        "aspect_buckets": False,
        "frames": 9,
        "fps": 16.0,
        "caption_max_tokens": 512,
        "trigger": "sks",
    }
    assert recipe["crepa"]["encoder"] == "encoder"
    sample = recipe["sample"]
    assert (sample["scheduler_class"], sample["shift"], sample["steps"]) == ("UniPCMultistepScheduler", 3.0, 50)
    assert (sample["guidance"], sample["guidance_2"], sample["boundary_ratio"]) == (5.0, None, None)
    assert sample["negative_prompt"].startswith("Bright tones, overexposed")
    assert (recipe["step"], recipe["schema"]) == (7, 1)


@pytest.mark.parametrize(
    ("family", "size", "changes", "expected"),
    [
        ("wan", "tiny-a14b", {"wan_expert": "low"}, {"guidance": 4.0, "guidance_2": 3.0, "boundary_ratio": 0.875}),
        ("wan", "tiny-i2v-a14b", {"wan_expert": "high"}, {"guidance": 3.5, "guidance_2": 3.5}),
        ("ltxvideo", "tiny", {}, {"guidance": 3.0, "decode": {}}),
        ("ltxvideo", "tiny-timestep-vae", {}, {"decode": {"decode_timestep": 0.05, "decode_noise_scale": 0.025}}),
        ("sanavideo", "tiny", {}, {"guidance": 6.0, "shift": 8.0}),
        (
            "kandinsky5_video",
            "tiny",
            {},
            {
                "guidance": 5.0,
                "shift": 5.0,
                "steps": 50,
            },
        ),
    ],
)
def test_every_family_says_how_it_is_sampled(family, size, changes, expected, fake_run, tiny_checkpoint):
    run = fake_run(family, size, **changes)
    run.checkpoint(1)
    name = f"adapter_{changes['wan_expert']}_noise" if changes else "adapter"
    path = run.folder.adapters / f"{name}-000001.safetensors"
    found = header(path)
    recipe = json.loads(found["crepatrain.recipe"])
    assert recipe["sample"].items() >= expected.items()
    assert found.get("crepatrain.expert") == recipe["expert"] == changes.get("wan_expert")
    if changes.get("wan_expert") == "low":
        assert found["modelspec.timestep_range"] == "0,875"
        assert recipe["base"]["sha256"] == "digest of transformer_2"
    verify(path, tiny_checkpoint(family, size), Screen(quiet=True))
    verify(path, None, Screen(quiet=True))


def test_no_caption_and_no_path_of_the_machine_is_in_a_file(config_file, values, tmp_path, clips):
    plan = read_plan(config_file(output_name="private", max_train_steps=1))
    fit(plan, Screen(quiet=True))
    root = Path(values["output_dir"])
    for path in (root / "pytorch_lora_weights.safetensors", root / "adapters" / "private-000001.safetensors"):
        with path.open("rb") as file:
            text = file.read(int.from_bytes(file.read(8), "little")).decode()
        assert "crepatrain.recipe" in text
        for secret in (str(tmp_path), str(clips), str(Path.home()), "/tmp", "a square moves", values["train_data"]):
            assert secret not in text
    export(root, None, None, None, Screen(quiet=True))
    again = root / "exports" / "private-000001-float32.safetensors"
    first, second = load_file(root / "pytorch_lora_weights.safetensors"), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    after, before = header(again), header(root / "pytorch_lora_weights.safetensors")
    assert after.pop("modelspec.date") >= before.pop("modelspec.date")
    assert after == before


def test_an_adapter_is_exported_anew_from_its_checkpoint_or_from_its_file(fake_run, capsys):
    run = fake_run(lora_alpha=8.0)
    run.checkpoint(1, keep=False)
    run.checkpoint(2)
    live = run.checkpoint(3)
    root = run.folder.root

    export(root, None, None, None, Screen())
    out = capsys.readouterr().out
    assert 'weight_name="adapter-000003-float32.safetensors"' in out
    expect_same_adapter(root / "exports" / "adapter-000003-float32.safetensors", run.family, live)

    export(root, 2, "bfloat16", root / "mine.safetensors", Screen(quiet=True))
    assert header(root / "mine.safetensors")["crepatrain.step"] == "2"
    assert {tensor.dtype for tensor in load_file(root / "mine.safetensors").values()} == {torch.bfloat16}

    with pytest.raises(UserError, match=r"mine.safetensors: there is something already"):
        export(root, 2, None, root / "mine.safetensors", Screen(quiet=True))

    export(root, 1, None, None, Screen())
    assert "was removed, as newer ones took its place" in capsys.readouterr().out
    before, again = (
        root / folder for folder in ("adapters/adapter-000001.safetensors", "exports/adapter-000001-float32.safetensors")
    )
    assert header(before) == header(again)
    first, second = load_file(before), load_file(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_average_and_the_last_weights_have_names_of_their_own(config_file, tmp_path):
    fit(read_plan(config_file(use_ema=True, ema_decay=0.5, max_train_steps=2, learning_rate=0.05)), Screen(quiet=True))
    root = tmp_path / "run"
    for weights, used in ((None, True), ("raw", False)):
        export(root, None, None, None, Screen(quiet=True), weights=weights)
        path = root / "exports" / f"adapter-000002-{'ema' if used else 'raw'}-float32.safetensors"
        assert json.loads(header(path)["crepatrain.recipe"])["ema"] == {"used": used, "decay": 0.5 if used else None}
    ema, raw = (load_file(root / "exports" / f"adapter-000002-{name}-float32.safetensors") for name in ("ema", "raw"))
    assert any(not torch.equal(ema[key], raw[key]) for key in ema)
    assert json.loads(header(root / "pytorch_lora_weights.safetensors")["crepatrain.recipe"])["ema"]["used"] is True


def test_no_export_takes_the_place_of_somebodys_files(fake_run, wan, tmp_path):
    """Such as a pipeline's own transformer."""
    run = fake_run(model_type="full")
    run.checkpoint(1)
    base = tmp_path / "base"
    shutil.copytree(wan, base)
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"--output .*base: there is something already\n.*new name"):
        export(run.folder.root, None, None, base, Screen(quiet=True))
    assert before == {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}


def test_what_is_written_can_be_read_by_others(fake_run, tmp_path):
    """By a server that runs as somebody else."""
    lora, full = fake_run(), fake_run(model_type="full", output_dir=str(tmp_path / "full"))
    for run in (lora, full):
        run.checkpoint(1)
        export(run.folder.root, None, None, None, Screen(quiet=True))
    plain = tmp_path / "plain"
    plain.touch()
    found = [path for run in (lora, full) for path in run.folder.root.rglob("*.safetensors") if "checkpoints" not in path.parts]
    assert len(found) == 6
    assert {path.stat().st_mode for path in found} == {plain.stat().st_mode}


def test_what_cant_be_exported_is_reported(fake_run, tmp_path):
    run = fake_run()
    quiet = Screen(quiet=True)
    with pytest.raises(UserError, match=r"it holds no checkpoint\n.*train first"):
        export(run.folder.root, None, None, None, quiet)
    run.checkpoint(2)
    with pytest.raises(UserError, match=r"no checkpoint of step 3\n.*use one of 2"):
        export(run.folder.root, 3, None, None, quiet)
    with pytest.raises(UserError, match=r"is a \.safetensors file"):
        export(run.folder.root, None, None, tmp_path / "folder", quiet)
    with pytest.raises(UserError, match=r"can't be read .*\n.*output_dir"):
        export(tmp_path / "nowhere", None, None, None, quiet)


@pytest.mark.parametrize(("family", "size"), [("wan", "tiny"), ("wan", "tiny-i2v"), ("ltxvideo", "tiny")])
def test_a_whole_transformer_is_one_file_that_reads_back(family, size, fake_run):
    run = fake_run(family, size, model_type="full")
    live = run.checkpoint(2)
    export(run.folder.root, None, "float32", None, Screen(quiet=True))
    folder = run.folder.root / "exports" / "adapter-000002-float32"
    path = folder / "adapter-000002.safetensors"
    kind = {"wan": WanTransformer3DModel, "ltxvideo": LTXVideoTransformer3DModel}[family]
    single = kind.from_single_file(path, config=str(folder), subfolder="transformer", local_files_only=True)
    whole = kind.from_pretrained(folder / "transformer")
    for name, tensor in live.state_dict().items():
        assert torch.equal(single.state_dict()[name], tensor)
        assert torch.equal(whole.state_dict()[name], tensor)
    if run.family.task == "t2v":
        for model in (single, live):  # mapped from a file, weights may lie where the CPU's kernels round otherwise
            model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
        torch.testing.assert_close(predict(run.family, single), predict(run.family, live), rtol=0, atol=0)
    names = set(load_file(path))
    probe = {"wan": "head.modulation", "ltxvideo": "adaln_single.emb.timestep_embedder.linear_1.bias"}[family]
    assert probe in names
    assert not [name for name in names if name.startswith(("transformer.", "diffusion_model.", "model."))]
    if family == "ltxvideo":
        assert json.loads(header(path)["config"])["transformer"]["causal_temporal_positioning"] is False


def test_kandinsky_keeps_its_names(fake_run):
    run = fake_run("kandinsky5_video", model_type="full")
    live = run.checkpoint(1)
    export(run.folder.root, None, None, None, Screen(quiet=True))
    tensors = load_file(run.folder.root / "exports" / "adapter-000001-float32" / "adapter-000001.safetensors")
    assert tensors.keys() == live.state_dict().keys()
    assert "visual_transformer_blocks.0.cross_attention.key_norm.weight" in tensors


def test_sana_has_no_single_file(fake_run, capsys):
    run = fake_run("sanavideo", model_type="full")
    run.checkpoint(1)
    export(run.folder.root, None, None, None, Screen())
    assert "no single file beside it" in capsys.readouterr().out
    assert [file.name for file in (run.folder.root / "exports" / "adapter-000001-float32").iterdir()] == ["transformer"]


def test_a_run_begins_with_an_adapter(config_file, tmp_path):
    """What the file does, the fresh run's adapter does before its first step; alpha and rsLoRA are another run's affair."""
    first = config_file(output_dir=str(tmp_path / "first"), learning_rate=0.05, max_train_steps=2)
    fit(read_plan(first), Screen(quiet=True))
    file = tmp_path / "first" / "pytorch_lora_weights.safetensors"
    plan = read_plan(
        config_file(init_adapter=str(file), lora_alpha=9.0, lora_use_rslora=True, learning_rate=1e-9, max_train_steps=1)
    )
    fit(plan, Screen(quiet=True))
    before, after = (load_file(path) for path in (file, tmp_path / "run" / "pytorch_lora_weights.safetensors"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-7)
    for changes, message in (
        ({"lora_rank": 2}, "has rank 4, and this run's 2"),
        ({"lora_targets": ["to_q"]}, "is not in this run's lora_targets"),
        ({"lora_targets": "all-linear"}, "is not in the file"),
        ({"init_adapter": "gone.safetensors"}, "init_adapter=gone.safetensors: there is no such file"),
    ):
        wrong = {"init_adapter": str(file), "output_dir": str(tmp_path / "wrong"), "max_train_steps": 1} | changes
        with pytest.raises(UserError, match=message):
            fit(read_plan(config_file(**wrong)), Screen(quiet=True))


def test_an_initial_adapter_is_checked_before_anything_is_cached(config_file, tmp_path):
    file, fresh = tmp_path / "first" / "pytorch_lora_weights.safetensors", tmp_path / "wrong"
    fit(read_plan(config_file(output_dir=str(tmp_path / "first"), learning_rate=0.05, max_train_steps=1)), Screen(quiet=True))
    tensors = load_file(file)
    key = next(iter(tensors))
    path = tmp_path / "other.safetensors"
    ltx = {f"transformer.transformer_blocks.0.attn1.to_q.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    for changed, metadata, message in (
        (tensors | {key: tensors[key] * torch.nan}, {}, "1 tensors such as .* not finite"),
        (ltx, {}, "it is not an adapter of Wan 2.1 text-to-video, but of another model\n  -> give an adapter of this model"),
        (
            tensors,
            {"crepatrain.recipe": '{"family": "ltxvideo"}'},
            "it is not an adapter of .*, but of LTX-Video",
        ),
        (tensors | {f"{key}.lora_A.weight": torch.ones(4, 4)}, {}, "1 of 81 layers, such as .* are not in"),
        (tensors, {"lora_adapter_metadata": "{}"}, "its strength is unknown, .* diffusers refuses it: KeyError"),
    ):
        save_file(changed, path, metadata=metadata)
        with pytest.raises(UserError, match=f"init_adapter={path}: {message}"):
            fit(
                read_plan(config_file(init_adapter=str(path), output_dir=str(fresh), cache_dir=str(tmp_path / "cache"))),
                Screen(quiet=True),
            )
        assert {file.name for file in (tmp_path / "cache").iterdir()} <= {"digests.json", "index"}


def test_a_run_begins_with_the_strength_that_diffusers_applies(config_file, tmp_path):
    """lora_adapter_metadata scales lora_B, and so does the run's own alpha."""
    fit(read_plan(config_file(output_dir=str(tmp_path / "first"), learning_rate=0.05, max_train_steps=2)), Screen(quiet=True))
    before = load_file(tmp_path / "first" / "pytorch_lora_weights.safetensors")
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": ["to_q"]}
    save_file(before, tmp_path / "scaled.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)})
    changes = {"init_adapter": str(tmp_path / "scaled.safetensors"), "lora_alpha": 9.0, "learning_rate": 1e-9}
    fit(read_plan(config_file(**changes, max_train_steps=1)), Screen(quiet=True))
    after = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor * (2 if "lora_B" in name else 1), rtol=1e-5, atol=1e-7)
