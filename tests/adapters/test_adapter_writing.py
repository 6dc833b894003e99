"""Adapters as files: what their header says, and what programs do with them."""

import json
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from common import tiny_family
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from written_adapters import header, predict, randomised

from crepatrain.adapters.checks import expect_same_adapter
from crepatrain.adapters.writing import write_adapter
from crepatrain.commands.export import export
from crepatrain.commands.fit import fit
from crepatrain.commands.verify import verify
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.specs import FAMILIES
from crepatrain.training.lora import ADAPTER, add_lora, live_adapter, target_modules

HEADER = {"format": "pt"}


@pytest.fixture(scope="module")
def opened(tiny_checkpoint):
    """A family with its pipeline, opened once."""
    known = {}

    def open_(name, size="tiny", expert=None):
        if (name, size) not in known:
            folder = tiny_checkpoint(name, size)
            family = tiny_family(name, size, expert=expert)
            pipeline = getattr(diffusers, family.pipeline).from_pretrained(folder)
            known[name, size] = SimpleNamespace(family=family, folder=folder, pipeline=pipeline)
        return known[name, size]

    return open_


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
    assert found.keys() - expected.keys() == {"modelspec.date", "crepatrain.version", "crepatrain.recipe", "crepatrain.digest"}
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
        "text_quant": None,
        "vae_tiling": False,
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
    for found in (after, before):
        assert found.pop("crepatrain.digest").startswith("blake2b:")
    assert after == before


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
