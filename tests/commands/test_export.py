"""`crepatrain export`: adapters and transformers of a run as files."""

import json
import shutil

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from safetensors.torch import load_file
from written_adapters import header, predict

from crepatrain.adapters.checks import expect_same_adapter
from crepatrain.commands.export import export
from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.errors import UserError


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

    with pytest.raises(UserError, match=r"mine.safetensors: it already exists"):
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
    with pytest.raises(UserError, match=r"--output .*base: it already exists\n.*new name"):
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
    with pytest.raises(UserError, match=r"nowhere: no such folder\n.*output_dir"):
        export(tmp_path / "nowhere", None, None, None, quiet)


@pytest.mark.parametrize(
    ("family", "size"), [("wan", "tiny"), ("wan", "tiny-i2v"), ("ltxvideo", "tiny"), ("ltxvideo", "tiny-0.9.5")]
)
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
        causal = json.loads(header(path)["config"])["transformer"]["causal_temporal_positioning"]
        assert causal is (size == "tiny-0.9.5")  # the base's own, by which ComfyUI places frames in time


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
