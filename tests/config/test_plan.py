"""A config against its checkpoint: every wrong one is refused with what, value and remedy."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from crepatrain.config import memory_checks
from crepatrain.config.plan import read_plan
from crepatrain.config.summary import summarize
from crepatrain.errors import Problem
from crepatrain.specs import FAMILIES

TINY_DEPTH = 10


BACKBONE = {"crepa_feature_source": "backbone"}


CONV = {"crepa_projector": "conv", "crepa_spatial_align": False}


LAYERSYNC = {"layersync_enabled": True}


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        # sizes: of the family
        ({"num_frames": 50}, ["num_frames=50", "4k+1"], ["49", "53"]),
        ({"num_frames": 80}, ["num_frames=80"], ["77", "81"]),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-7, "crepa_enabled": False}, ["learning_rate=1e-07"], ["more"]),
        ({"num_frames": 2}, ["num_frames=2"], ["1 or 5"]),
        ({"height": 100}, ["height=100", "16"], ["96", "112"]),
        ({"width": 100}, ["width=100", "16"], ["96", "112"]),
        ({"height": 17}, ["height=17"], ["16 or 32"]),
        ({"width": 4095}, ["width=4095"], ["4080", "4096"]),
        # blocks
        ({"crepa_block_index": 10}, ["crepa_block_index=10", "10 blocks"], ["0 to 9"]),
        ({"crepa_block_index": 99}, ["crepa_block_index=99", "10 blocks"], ["0 to 9"]),
        ({"crepa_block_index": -1}, ["crepa_block_index=-1"], ["0"]),
        (BACKBONE, ["crepa_teacher_block_index", "missing"], ["9"]),
        ({"crepa_use_backbone_features": True}, ["crepa_teacher_block_index", "missing"], ["9"]),
        (BACKBONE | {"crepa_teacher_block_index": 8}, ["crepa_teacher_block_index=8", "crepa_block_index=8"], ["9"]),
        (BACKBONE | {"crepa_block_index": 5, "crepa_teacher_block_index": 3}, ["=3", "not deeper", "=5"], ["6 to 9"]),
        (BACKBONE | {"crepa_teacher_block_index": 10}, ["crepa_teacher_block_index=10", "10 blocks"], ["9"]),
        (BACKBONE | {"crepa_block_index": 9, "crepa_teacher_block_index": 9}, ["not deeper"], ["lower crepa_block_index"]),
        (LAYERSYNC | {"layersync_teacher_block": 3}, ["layersync_student_block", "missing"], ["0"]),
        (LAYERSYNC | {"layersync_student_block": 3}, ["layersync_teacher_block", "missing"], ["9"]),
        (LAYERSYNC | {"layersync_student_block": 40, "layersync_teacher_block": 4}, ["=40", "10 blocks"], ["0 to 9"]),
        (LAYERSYNC | {"layersync_student_block": 4, "layersync_teacher_block": 4}, ["not deeper"], ["5 to 9"]),
        (LAYERSYNC | {"layersync_student_block": 4, "layersync_teacher_block": 40}, ["=40", "10 blocks"], ["9"]),
        # spellings of the teacher's source
        (
            {"crepa_use_backbone_features": True, "crepa_feature_source": "cached", "crepa_teacher_block_index": 9},
            ["crepa_feature_source=cached", "crepa_use_backbone_features=true", "disagree"],
            ["crepa_feature_source"],
        ),
        (
            {"crepa_use_backbone_features": False, "crepa_teacher_block_index": 9} | BACKBONE,
            ["crepa_feature_source=backbone", "crepa_use_backbone_features=false", "disagree"],
            ["crepa_feature_source"],
        ),
        ({"crepa_use_backbone_features": True, "crepa_feature_source": "cached"}, ["disagree"], ["crepa_feature_source"]),
        ({"crepa_use_backbone_features": False} | BACKBONE, ["disagree"], ["crepa_feature_source"]),
        # the score: 9 frames are 3 token frames, so 1 + 4/3 * 1/e
        ({"crepa_similarity_threshold": 1.7}, ["crepa_similarity_threshold=1.7", "1.491"], ["1.491"]),
        ({"crepa_similarity_threshold": 1.5, "crepa_adjacent_tau": 0.5}, ["=1.5", "1.180"], ["1.180"]),
        ({"crepa_similarity_threshold": 1.1, "crepa_adjacent_distance": 0}, ["=1.1", "1.000"], ["1.000"]),
        ({"crepa_similarity_threshold": 1.1, "crepa_threshold_metric": "self"}, ["=1.1", "1.000"], ["1.000"]),
        ({"crepa_similarity_threshold": 1.1, "crepa_normalize_neighbour_sum": True}, ["=1.1", "1.000"], ["1.000"]),
        ({"crepa_similarity_threshold": 1.1, "num_frames": 1}, ["=1.1", "1.000"], ["1.000"]),
        # the encoder
        ({"crepa_encoder": "dinov2_vitb15"}, ["crepa_encoder=dinov2_vitb15"], ["did you mean dinov2_vitb14?"]),
        ({"crepa_encoder": "resnet"}, ["crepa_encoder=resnet"], ["dinov2_vitg14", "folder", "hub id"]),
        ({"crepa_encoder": "/nowhere/dino"}, ["crepa_encoder=/nowhere/dino", "no such folder"], ["folder", "owner/name"]),
        ({"crepa_encoder": "./nowhere"}, ["crepa_encoder=./nowhere", "no such folder"], ["folder"]),
        ({"crepa_encoder_image_size": 520}, ["crepa_encoder_image_size=520", "14"], ["518", "532", "grid"]),
        ({"crepa_encoder_image_size": 15}, ["crepa_encoder_image_size=15", "14"], ["14", "28"]),
        (CONV, ["crepa_projector=conv", "crepa_spatial_align=false"], ["set"]),
        # the checkpoint
        ({"pretrained_model_name_or_path": "/nowhere/wan"}, ["=/nowhere/wan", "no such folder"], ["folder", "owner/name"]),
        ({"pretrained_model_name_or_path": "wan"}, ["pretrained_model_name_or_path=wan", "no such folder"], ["owner/name"]),
        (
            {"pretrained_model_name_or_path": "some/thing"},
            ["=some/thing", "not on this machine"],
            ["hf auth login", "hf download"],
        ),
        # paths
        ({"train_data": "/nowhere/clips"}, ["train_data=/nowhere/clips", "not exist"], ["folder of clips"]),
        ({"train_data": __file__}, [f"train_data={__file__}"], ["folder"]),
        ({"output_dir": __file__}, [f"output_dir={__file__}", "it is a file"], ["folder"]),
        ({"output_dir": f"{__file__}/run"}, [f"output_dir={__file__}/run"], ["folder"]),
        ({"cache_dir": __file__}, [f"cache_dir={__file__}", "it is a file"], ["folder"]),
        # length
        ({"num_train_epochs": 2}, ["max_train_steps", "num_train_epochs", "both"], ["one of them"]),
        ({"max_train_steps": ...}, ["max_train_steps", "num_train_epochs", "neither"], ["one of them"]),
        ({"max_train_steps": 0}, ["max_train_steps=0"], ["1 or more"]),
    ],
)
def test_one_wrong_value_is_one_message(problems, changes, what, fix):
    found = problems(**changes)
    assert len(found) == 1
    for word in what:
        assert word in found[0].what
    for word in fix:
        assert word in found[0].fix


def test_no_block_is_deeper_than_one_that_is_not_known(problems):
    student, teacher = problems(**LAYERSYNC)
    assert (student.what, student.fix) == ("layersync_student_block is missing", "use 0 to 9")
    assert teacher.what.startswith("layersync_teacher_block is missing")
    assert teacher.fix == "use 1 to 9"
    _, teacher = problems(**LAYERSYNC, layersync_teacher_block=0)
    assert teacher.what == "layersync_teacher_block=0 is not deeper than any other block"
    assert teacher.fix == "use 1 to 9"


def test_a_boundary_is_legal(plan):
    assert plan(crepa_block_index=TINY_DEPTH - 1).config.crepa.crepa_block_index == 9
    assert plan(num_frames=1).grid.t == 1
    assert plan(height=16, width=16).grid.patches == 1
    assert plan(crepa_similarity_threshold=1.49).config.crepa.crepa_similarity_threshold == 1.49
    assert plan(crepa_encoder_image_size=14).teacher_grid(plan().grid) == (1, 1)
    assert plan(crepa_feature_source="backbone", crepa_teacher_block_index=9).encoder is None
    assert plan(crepa_use_backbone_features=True, crepa_teacher_block_index=9, crepa_feature_source="backbone").encoder is None


def test_an_empty_dataset_is_refused(problems, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    [problem] = problems(train_data=str(empty))
    assert problem.what == f"train_data={empty}: the folder is empty"
    assert "NAME.txt" in problem.fix


@pytest.mark.parametrize(
    ("optimizer", "package", "extra"), [("adamw8bit", "bitsandbytes", "8bit"), ("prodigy", "prodigyopt", "prodigy")]
)
def test_a_missing_optimizer_package_is_named_with_its_extra(problems, monkeypatch, optimizer, package, extra):
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to say: not installed
    [problem] = problems(optimizer=optimizer)
    assert problem.what == f"optimizer={optimizer}: {package} is not installed"
    assert f"[{extra}]" in problem.fix


@pytest.mark.parametrize("key", ["output_dir", "cache_dir"])
def test_a_folder_that_can_not_be_written_to_is_refused(problems, monkeypatch, tmp_path, key):
    locked = tmp_path / "locked"
    locked.mkdir()
    # Permissions don't stop root, as whom CI may run.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != locked)
    [problem] = problems(**{key: str(locked / "deep" / "run")})
    assert problem.what == f"{key}={locked}/deep/run: {locked} can't be written to"
    assert "permissions" in problem.fix


@pytest.mark.parametrize("key", ["output_dir", "cache_dir", "train_data", "pretrained_model_name_or_path", "crepa_encoder"])
def test_a_path_that_no_system_takes_is_refused(problems, key):
    [problem] = problems(**{key: "x" * 300})
    assert problem.what.startswith(f"{key}=")


def ends_and_wholes(family: str) -> list[str]:
    spec = FAMILIES[family]
    return [*spec.lora_targets, *spec.linears, f"{spec.blocks}.3.{spec.linears[0]}"]


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_targets_are_ends_of_names_a_regex_or_all(plan, tiny, family):
    spec, of = FAMILIES[family], tiny(family)
    assert plan(**of).config.lora.lora_targets == list(spec.lora_targets)
    for targets in (
        "all-linear",
        ends_and_wholes(family),
        rf"{spec.blocks}\.[0-3]\..*",
        rf".*\.({'|'.join(spec.lora_targets)})".replace("to_out.0", r"to_out\.0"),
    ):
        assert plan(**of, lora_targets=targets).config.lora.lora_targets == targets


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "target", ["to_z", "o_q", "proj_out", "norm2", "patch_embedding", "blocks", "{blocks}.99.{linear}", r".*\.{linear}"]
)
def test_a_target_that_is_no_linear_of_a_block_is_refused(problems, tiny, family, target):
    spec = FAMILIES[family]
    target = target.format(blocks=spec.blocks, linear=spec.linears[0])
    [problem] = problems(**tiny(family), lora_targets=[spec.linears[1], target])
    assert problem.what == f"lora_targets: {target!r} is not a Linear layer of a block"
    for end in (*spec.linears, "all-linear"):
        assert end in problem.fix


def test_every_wrong_target_is_reported(problems):
    found = problems(lora_targets=["to_q", "to_y", "to_z"])
    assert [problem.what.split("'")[1] for problem in found] == ["to_y", "to_z"]


@pytest.mark.parametrize(
    "regex", ["to_q", r"blocks\.10\..*", r"block\..*to_q", "transformer.*", r"blocks\.\d\.norm2", "all_linear"]
)
def test_a_regex_that_matches_no_whole_name_is_refused(problems, regex):
    [problem] = problems(lora_targets=regex)
    assert problem.what.startswith(f"lora_targets={regex}: ")
    assert "whole name" in problem.what
    assert "blocks.0.attn1.to_q" in problem.fix
    assert "list" in problem.fix


def test_a_regex_that_is_none_is_refused(problems):
    [problem] = problems(lora_targets=r"blocks\.(\d+")
    assert problem.what.startswith("lora_targets=")
    assert "list of names" in problem.fix


def test_targets_are_read_from_the_command_line(config_file, problems):
    def targets(text: str) -> Any:
        return read_plan(config_file(), ["--lora_targets", text], online=False).config.lora.lora_targets

    assert targets("to_q,ffn.net.0.proj") == ["to_q", "ffn.net.0.proj"]
    assert targets(r"blocks\..*to_q") == r"blocks\..*to_q"
    assert targets("all-linear") == "all-linear"
    [problem] = problems("--lora_targets", "to_q,to_z")
    assert "'to_z'" in problem.what
    [problem] = problems("--lora_targets", r"blocks\..*to_z")
    assert "whole name" in problem.what


def test_targets_are_of_no_interest_where_every_weight_is_trained(plan):
    assert plan(model_type="full", lora_targets=["to_z"]).config.model.model_type == "full"


def test_no_encoder_is_asked_for_where_none_is_used(plan):
    assert plan(crepa_enabled=False, crepa_encoder="resnet").encoder is None
    assert plan(crepa_feature_source="backbone", crepa_teacher_block_index=9, crepa_encoder="resnet").encoder is None


def test_ltx_takes_8k_plus_1_frames_and_multiples_of_32(plan, problems, tiny):
    of = tiny("ltxvideo")
    assert plan(**of, num_frames=9).grid.t == 2
    assert plan(**of, num_frames=1).grid.t == 1
    assert plan(**of, height=32, width=64).grid.patches == 2
    [problem] = problems(**of, num_frames=13)
    assert "8k+1" in problem.what
    assert problem.fix == "use 9 or 17"
    [problem] = problems(**of, height=80)
    assert "height=80: this model takes multiples of 32" in problem.what
    assert problem.fix == "use 64 or 96"
    [problem] = problems(**of, width=48)
    assert problem.fix == "use 32 or 64"


def test_nabla_attention_takes_multiples_of_128(plan, problems, tiny):
    of, dense = tiny("kandinsky5_video", "tiny-nabla") | {"compile": True}, tiny("kandinsky5_video")
    assert plan(**of, height=128, width=256).grid.patches == 8 * 16
    assert plan(**of, height=128, width=256, num_frames=1).grid.t == 1
    [height, width] = problems(**of, height=144, width=64)
    assert "height=144: this model takes multiples of 128" in height.what
    assert height.fix == "use 128 or 256"
    assert width.fix == "use 128"
    assert plan(**dense, height=144, width=64).grid.patches == 9 * 4
    [problem] = problems(**dense, height=136)
    assert "multiples of 16" in problem.what


def test_attention_in_a_compiled_block_can_not_be_kept(problems):
    [problem] = problems(gradient_checkpointing="selective", compile=True)
    assert "attentions inside a compiled block" in problem.what
    assert problem.keys == ("gradient_checkpointing", "compile")


def test_what_is_computed_again_needs_gradient_checkpointing(plan, problems):
    assert plan(checkpoint_offload=True, gradient_checkpointing="selective").config.loop.checkpoint_offload
    assert plan(checkpoint_offload=True, nested_checkpointing=True, model_type="full").config.loop.nested_checkpointing
    [problem] = problems(checkpoint_offload=True, gradient_checkpointing=False)
    assert problem.keys == ("checkpoint_offload", "gradient_checkpointing")
    for how in (False, "selective"):
        [problem] = problems(nested_checkpointing=True, gradient_checkpointing=how)
        assert f"gradient_checkpointing={str(how).lower()}: it is for blocks of which nothing is kept" in problem.what
        assert problem.keys == ("nested_checkpointing", "gradient_checkpointing")
    assert plan(checkpoint_offload=True, compile=True).config.loop.compile
    [problem] = problems(nested_checkpointing=True, compile=True)
    assert problem.keys == ("nested_checkpointing", "compile")


def test_blocks_in_host_memory_are_frozen_and_computed_again(plan, problems):
    assert plan().config.loop.block_offload == 0
    assert plan(block_offload="auto", gradient_checkpointing="selective").config.loop.block_offload == "auto"
    depth = plan().geometry.depth
    assert plan(block_offload=depth).config.loop.block_offload == depth
    [problem] = problems(block_offload=depth + 1)
    assert problem.what == f"block_offload={depth + 1}: the transformer has {depth} blocks"
    assert problem.fix == f"use {depth} or less"
    [problem] = problems(block_offload="auto", gradient_checkpointing=False)
    assert "needs all blocks' weights at once" in problem.what
    assert problem.keys == ("block_offload", "gradient_checkpointing")
    [problem] = problems(block_offload=4, model_type="full")
    assert "model_type=full trains all of them" in problem.what
    assert problem.keys == ("block_offload", "model_type")


def test_how_encoders_are_held_is_said_where_it_is_not_the_default(plan, problems, monkeypatch):
    assert plan().config.loop.text_encoder_offload == "auto"
    assert "encoders" not in dict(summarize(plan()))
    changed = plan(text_encoder_offload=True, text_encoder_quantization="int8", vae_tiling=True)
    for words in ("blocks in int8", "blocks in host memory", "VAE in tiles"):
        assert words in dict(summarize(changed))["encoders"]
    monkeypatch.setattr(memory_checks, "find_spec", lambda _name: None)
    [problem] = problems(text_encoder_quantization="nf4")
    assert "bitsandbytes is not installed" in problem.what
    assert problem.keys == ("text_encoder_quantization",)


def test_a_ring_that_saves_nothing_is_noted(plan):
    [note] = [note for note in plan(block_offload=2).warnings if "block_offload" in note]
    assert "saves no memory" in note
    assert not [note for note in plan(block_offload=3).warnings if "block_offload" in note]


def test_nabla_attention_is_compiled(plan, problems, tiny):
    of = tiny("kandinsky5_video", "tiny-nabla") | {"height": 128, "width": 128}
    [problem] = problems(**of)
    assert "compile=false" in problem.what
    assert "NABLA" in problem.what
    assert problem.fix == "set compile to true"
    assert plan(**of, compile=True).config.loop.compile
    assert not plan(**tiny("kandinsky5_video")).config.loop.compile, "dense attention needs it not"


def test_ti2v_takes_multiples_of_32(plan, problems, tiny):
    assert plan(**tiny("wan", "tiny-ti2v")).grid.patches == 2 * 3
    [problem] = problems(**tiny("wan", "tiny-ti2v"), height=80)
    assert problem.fix == "use 64 or 96"


@pytest.mark.parametrize("size", ["tiny-i2v", "tiny-i2v-a14b"])
def test_image_to_video_channels_need_frames_behind_the_first(plan, problems, tiny, size):
    """As images are refused there: of a clip of one frame nothing is given that the transformer must be given."""
    of = tiny("wan", size) | ({"wan_expert": "high"} if "a14b" in size else {})
    assert plan(**of, num_frames=5).grid.t == 2
    [problem] = problems(**of, num_frames=1)
    assert "num_frames=1" in problem.what
    assert "5" in problem.fix


def keys_of(found: list[Problem]) -> set[str]:
    return {problem.what.split("=")[0].split(":")[0].split(" ")[0] for problem in found}


def test_every_problem_is_in_one_report(problems):
    found = problems(
        num_frames=50,
        height=100,
        width=90,
        crepa_block_index=10,
        crepa_encoder_image_size=520,
        train_data="/nowhere",
        output_dir=__file__,
        num_train_epochs=1,
    )
    assert len(found) == 8
    assert keys_of(found) == {
        "num_frames",
        "height",
        "width",
        "crepa_block_index",
        "crepa_encoder_image_size",
        "train_data",
        "output_dir",
        "max_train_steps,",
    }


def test_a_misspelt_key_does_not_hide_the_rest(problems):
    found = problems("--crepa_shceduler", "cosine", "stray", crepa_lamda=0.3, network_dim=8, num_frames=50, learning_rate="1e-4")
    text = "\n".join(map(str, found))
    assert len(found) == 6
    for words in (
        "'stray' is not an option",
        "did you mean crepa_scheduler?",
        "did you mean crepa_lambda?",
        "here it is called lora_rank",
        'learning_rate="1e-4"',
        "num_frames=50",
    ):
        assert words in text


def test_a_wrong_value_does_not_hide_the_rest(problems):
    found = problems(seed="x", height=100, train_data="/nowhere/seed")
    assert keys_of(found) == {"seed", "height", "train_data"}, "a path that happens to hold a wrong key's name is still shown"


def test_a_threshold_is_checked_beside_a_wrong_height(problems):
    assert keys_of(problems(height=100, crepa_similarity_threshold=1.7)) == {"height", "crepa_similarity_threshold"}


@pytest.mark.parametrize("key", ["train_data", "output_dir", "pretrained_model_name_or_path"])
def test_a_missing_required_key_does_not_hide_the_rest(problems, key):
    found = problems(**{key: ..., f"{key[:-1]}": "x", "max_train_steps": ..., "crepa_encoder_image_size": 520})
    assert keys_of(found) == {key, key[:-1], "max_train_steps,", "crepa_encoder_image_size"}


def test_a_wrong_value_is_not_reported_twice(problems):
    assert len(problems(crepa_block_index="8", crepa_feature_source="backbone", crepa_teacher_block_index=9)) == 1
    assert len(problems(num_frames="50")) == 1
    assert len(problems(max_train_steps="many")) == 1
    assert len(problems(crepa_encoder_image_size="big")) == 1


def test_an_adapter_to_begin_with_is_one_by_its_header(problems, tmp_path):
    path = tmp_path / "adapter.safetensors"

    def shown(content: bytes) -> list[str]:
        path.write_bytes(content)
        return [problem.what for problem in problems(init_adapter=str(path))]

    header = json.dumps(
        {"proj_out.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"a": "lora"}}
    )
    for content in (
        b"",
        b"\x80\x02",
        b"PK\x03\x04 and more of an archive",
        (3).to_bytes(8, "little") + b"[1]",
        b"\x04" + bytes(7) + b"nil!",
    ):
        assert shown(content) == [f"init_adapter={path}: it is not a safetensors file, or not a complete one"]
    weights = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    assert shown(weights) == [f"init_adapter={path}: none of its 1 tensors belongs to a LoRA"]
    path.unlink()
    assert [problem.what for problem in problems(init_adapter=str(path))] == [f"init_adapter={path}: there is no such file"]
