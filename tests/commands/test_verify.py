"""What diffusers and ComfyUI do with adapter files, reported before they do it."""

import json
import re

import pytest
import torch
from foreign_adapters import GOOD, WRONG, changed, diffusers_name, size_of
from safetensors.torch import save_file

from crepatrain import cli
from crepatrain.commands.verify import verify
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.specs import FAMILIES


@pytest.mark.parametrize("case", WRONG)
def test_what_would_be_ignored_or_is_wrong_is_reported_with_its_reason(case, foreign, tiny_checkpoint, tmp_path):
    family, make, reason = WRONG[case]
    tensors, metadata = make(foreign(family))
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    with pytest.raises(UserError) as error:
        verify(path, tiny_checkpoint(family, size_of(family)), Screen(quiet=True))
    assert re.search(reason, str(error.value)), str(error.value)


@pytest.mark.parametrize("case", GOOD)
def test_what_is_loaded_completely_is_loaded_as_reported(case, foreign, tiny_checkpoint, tmp_path, capsys):
    family, make, strength = GOOD[case]
    adapter = foreign(family)
    tensors, metadata = make(adapter)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    verify(path, tiny_checkpoint(family, size_of(family)), Screen())
    out = capsys.readouterr().out
    assert f"{len(adapter.pairs)} layers, {strength}" in out
    assert 'weight_name="lora.safetensors"' in out
    assert ("models/loras" in out) == (family != "sanavideo")


@pytest.mark.parametrize("family", ["wan", "kandinsky5_video"])
def test_a_family_is_recognised_by_its_names(family, foreign, tmp_path, capsys):
    adapter = foreign(family)
    path = tmp_path / "lora.safetensors"
    save_file(adapter.exported(), path)
    verify(path, None, Screen())
    assert adapter.family.spec.title in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "base", "pipeline"),
    [
        ({"task": "t2v"}, None, "LTXPipeline"),
        ({"task": "i2v"}, None, "LTXImageToVideoPipeline"),
        ({"task": "i2v", "train": {"prompt_template_id": "LTXConditionPipeline"}}, None, "LTXConditionPipeline"),
        ({"task": "i2v", "train": {"prompt_template_id": "OtherPipeline"}}, None, "LTXImageToVideoPipeline"),
        ({"task": "i2v", "train": ["LTXConditionPipeline"]}, None, "LTXImageToVideoPipeline"),
        ({"task": "i2v", "train": {"prompt_template_id": "LTXConditionPipeline"}}, "tiny", "LTXImageToVideoPipeline"),
        ({"task": "i2v"}, "tiny-0.9.5", "LTXConditionPipeline"),
    ],
)
def test_the_pipeline_is_that_of_the_base_or_of_the_training(foreign, tiny_checkpoint, tmp_path, capsys, recipe, base, pipeline):
    path = tmp_path / "lora.safetensors"
    metadata = {"crepatrain.recipe": json.dumps({"family": "ltxvideo", **recipe})}
    save_file(foreign("ltxvideo").exported(), path, metadata=metadata)
    verify(path, base and tiny_checkpoint("ltxvideo", base), Screen())
    assert f"pipeline = {pipeline}.from_pretrained" in capsys.readouterr().out


def test_a_damaged_layer_does_not_hide_whose_shapes_the_others_are(foreign, tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    save_file(changed(foreign("ltxvideo").exported(), "lora_A.weight", lambda t: t[:, :-1].contiguous()), path)
    with pytest.raises(UserError, match=r"1 layers don't fit.*\n.*\n.*diffusers refuses the file: RuntimeError"):
        verify(path, None, Screen())
    out = " ".join(capsys.readouterr().out.split())
    assert "refuses it: RuntimeError" in out
    assert "ComfyUI 99 layers, at 1 x lora_B lora_A; ignores 1" in out


def test_families_of_the_same_names_are_distinguished_by_shapes_or_not_at_all(foreign, tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    for title, width, prefix in (("LTX-Video", 2048, "diffusion_model"), ("SANA-Video", 2240, "transformer")):
        halves = {"lora_A.weight": torch.ones(2, width), "lora_B.weight": torch.ones(width, 2)}
        save_file({f"{prefix}.transformer_blocks.0.attn1.to_q.{end}": tensor for end, tensor in halves.items()}, path)
        verify(path, None, Screen())
        assert title in capsys.readouterr().out
    halves = {"lora_A.weight": torch.ones(2, 77), "lora_B.weight": torch.ones(77, 2)}
    save_file({f"transformer.transformer_blocks.0.attn1.to_q.{end}": tensor for end, tensor in halves.items()}, path)
    with pytest.raises(UserError, match=r"could be those of ltxvideo or sanavideo\n.*--base"):
        verify(path, None, Screen(quiet=True))


def test_one_of_two_experts_is_named_alike_everywhere(foreign, tiny_checkpoint, tmp_path):
    adapter = foreign("wan", "tiny-a14b")
    path = tmp_path / "style_low_noise.safetensors"
    save_file(adapter.exported(), path, metadata={"crepatrain.expert": "high"})
    with pytest.raises(UserError, match="named after the low-noise expert, and was trained for the high-noise one"):
        verify(path, None, Screen(quiet=True))
    save_file(adapter.exported(), path, metadata={"crepatrain.expert": "low"})
    with pytest.raises(UserError, match="low-noise expert of two, and wan-tiny has one transformer"):
        verify(path, tiny_checkpoint("wan", "tiny"), Screen(quiet=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": "ten"}, r'num_layers="ten" is not a whole number'),
        ({"patch_size": [1, 2]}, r"patch_size=\[1, 2\] is not a list of three whole numbers"),
    ],
)
def test_a_base_with_a_strange_config_is_refused(foreign, tiny_checkpoint, tmp_path, changes, words):
    path, base = tmp_path / "lora.safetensors", tmp_path / "transformer"
    save_file(foreign("wan", "tiny").exported(), path)
    base.mkdir()
    config = json.loads((tiny_checkpoint("wan", "tiny") / "transformer" / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    with pytest.raises(UserError, match=rf"--base .*transformer: .*\({words}.*\)\n.*give a Wan"):
        verify(path, base, Screen(quiet=True))


def test_the_low_noise_expert_is_loaded_into_the_second_transformer(foreign, tiny_checkpoint, tmp_path, capsys):
    path = tmp_path / "style_low_noise.safetensors"
    save_file(foreign("wan", "tiny-a14b").exported(), path, metadata={"crepatrain.expert": "low"})
    verify(path, tiny_checkpoint("wan", "tiny-a14b"), Screen())
    assert "load_into_transformer_2=True" in capsys.readouterr().out


def test_what_is_worth_knowing_is_noted(foreign, tiny_checkpoint, tmp_path, capsys):
    adapter = foreign("wan", "tiny-a14b")
    path = tmp_path / "my-checkpoint.safetensors"
    tensors = adapter.exported()
    save_file(changed(tensors, "lora_B.weight", torch.zeros_like), path)
    verify(path, tiny_checkpoint("wan", "tiny-a14b"), Screen())
    out = " ".join(capsys.readouterr().out.split())
    assert "has two experts, and neither the file's name nor its header says for which one" in out
    assert "ignores files with checkpoint in their name" in out
    assert f"lora_B is zero in 1 of {len(adapter.pairs)} layers" in out


def test_what_is_not_an_adapter_is_reported(wan, tmp_path):
    with pytest.raises(UserError, match="can't be read"):
        verify(wan / "model_index.json", None, Screen(quiet=True))
    with pytest.raises(UserError, match="can't be read"):
        verify(tmp_path / "none.safetensors", None, Screen(quiet=True))
    path = tmp_path / "other.safetensors"
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 4)}, path)
    with pytest.raises(UserError, match="no layer of " + ", ".join(FAMILIES) + r" has a name as in its keys"):
        verify(path, None, Screen(quiet=True))
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 4)}, path)
    with pytest.raises(UserError, match="its transformer is a AutoencoderKLWan"):
        verify(path, wan / "vae", Screen(quiet=True))


def test_the_command_exits_with_2_and_says_why(foreign, tmp_path, monkeypatch, capsys):
    path = tmp_path / "lora.safetensors"
    save_file(foreign("wan").named(diffusers_name), path)
    monkeypatch.setattr("sys.argv", ["crepatrain", "verify", str(path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert "sha256" in shown.out
    assert "name the keys as in diffusion_model.blocks." in shown.err
