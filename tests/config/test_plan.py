"""A config against its checkpoint: every wrong one is refused with what, value and remedy; a good one is told in words."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from crepatrain.config.specs import FAMILIES

from crepatrain.config.plan import Plan, read_plan
from crepatrain.config.sources import fetch
from crepatrain.config.summary import summarize
from crepatrain.errors import Problem, UserError

TINY_DEPTH = 10
BACKBONE = {"crepa_feature_source": "backbone"}
CONV = {"crepa_projector": "conv", "crepa_spatial_align": False}
LAYERSYNC = {"layersync_enabled": True}
REPOS = [(family, model.repo) for family, spec in FAMILIES.items() for model in spec.released.values()]


@pytest.fixture
def plan(config_file) -> Callable[..., Plan]:
    return lambda **changes: read_plan(config_file(**changes), online=False)


@pytest.fixture
def problems(config_file) -> Callable[..., list[Problem]]:
    def read(*options: str, **changes: Any) -> list[Problem]:
        with pytest.raises(UserError) as caught:
            read_plan(config_file(**changes), options, online=False)
        return caught.value.problems

    return read


@pytest.fixture
def copied(tiny_checkpoint, tmp_path) -> Callable[..., Path]:
    """Gives a copy of a tiny checkpoint, to be spoilt; its files are links."""

    def copy(*which: str) -> Path:
        return Path(
            shutil.copytree(tiny_checkpoint(*which), tmp_path / "spoilt", copy_function=lambda a, b: Path(b).symlink_to(a))
        )

    return copy


@pytest.fixture
def checkpoint(copied) -> Path:
    """A copy of the tiny Wan, to be spoilt."""
    return copied("wan", "tiny")


@pytest.fixture
def tiny(tiny_checkpoint) -> Callable[..., dict[str, str]]:
    """The keys of a config that name a tiny checkpoint."""
    return lambda family, size="tiny": {
        "model_family": family,
        "pretrained_model_name_or_path": str(tiny_checkpoint(family, size)),
    }


def rewrite(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.unlink()
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}), encoding="utf-8")


def summary(plan: Plan) -> dict[str, str]:
    return dict(summarize(plan))


# One wrong thing, one message


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
    assert plan(crepa_block_index=TINY_DEPTH - 1).config.crepa_block_index == 9
    assert plan(num_frames=1).grid.t == 1
    assert plan(height=16, width=16).grid.patches == 1
    assert plan(crepa_similarity_threshold=1.49).config.crepa_similarity_threshold == 1.49
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


# Checkpoints


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("model_index.json", "model_index.json"),
        ("transformer", "transformer/"),
        ("vae", "vae/"),
        ("text_encoder", "text_encoder/"),
        ("tokenizer", "tokenizer/"),
        ("scheduler", "scheduler/"),
        ("transformer/config.json", "transformer/config.json"),
        ("vae/config.json", "vae/config.json"),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json"),
        ("transformer/diffusion_pytorch_model.safetensors", "transformer/*.safetensors"),
        ("vae/diffusion_pytorch_model.safetensors", "vae/*.safetensors"),
    ],
)
def test_a_checkpoint_without_a_part_is_refused(problems, checkpoint, gone, named):
    path = checkpoint / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    [problem] = problems(pretrained_model_name_or_path=str(checkpoint))
    assert problem.what.startswith(f"pretrained_model_name_or_path={checkpoint}: ")
    assert named in problem.what


def test_every_missing_part_is_told_at_once(problems, clips):
    [problem] = problems(pretrained_model_name_or_path=str(clips))
    for part in ("model_index.json", "transformer/", "vae/", "scheduler/"):
        assert part in problem.what
    assert "-Diffusers" in problem.fix
    assert "make-random" in problem.fix


def test_every_missing_part_of_a_variant_is_told_at_once(problems, copied):
    folder = copied("wan", "tiny-i2v")
    for part in ("text_encoder", "tokenizer", "image_processor"):
        shutil.rmtree(folder / part)
    (folder / "image_encoder" / "model.safetensors").unlink()
    [problem] = problems(pretrained_model_name_or_path=str(folder))
    for part in ("text_encoder/", "tokenizer/", "image_processor/", "image_encoder/*.safetensors"):
        assert part in problem.what


@pytest.mark.parametrize(
    "file", ["model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize("text", ["{", "[]", "\ud800"])
def test_a_checkpoint_with_a_broken_file_is_refused(problems, checkpoint, file, text):
    (checkpoint / file).unlink()
    (checkpoint / file).write_bytes(text.encode("utf-16", "surrogatepass") if text == "\ud800" else text.encode())
    [problem] = problems(pretrained_model_name_or_path=str(checkpoint))
    assert f"={checkpoint}: {file} " in problem.what
    assert problem.fix == "download it again"


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("transformer/config.json", "num_layers", ...),
        ("transformer/config.json", "num_layers", "ten"),
        ("transformer/config.json", "in_channels", ...),
        ("transformer/config.json", "patch_size", 2),
        ("transformer/config.json", "attention_head_dim", None),
        ("vae/config.json", "z_dim", ...),
    ],
)
def test_a_checkpoint_with_a_strange_config_is_refused(problems, checkpoint, file, key, value):
    rewrite(checkpoint / file, **{key: value})
    [problem] = problems(pretrained_model_name_or_path=str(checkpoint))
    assert problem.what.startswith(f"pretrained_model_name_or_path={checkpoint}")
    if value is ...:
        assert key in problem.what


def test_another_familys_checkpoint_is_refused(problems, checkpoint):
    rewrite(checkpoint / "transformer/config.json", _class_name="LTXVideoTransformer3DModel")
    [problem] = problems(pretrained_model_name_or_path=str(checkpoint))
    for word in ("pretrained_model_name_or_path", "LTXVideoTransformer3DModel", "model_family=wan", "WanTransformer3DModel"):
        assert word in problem.what
    assert "model_family" in problem.fix


TWO_EXPERTS = {"transformer_2": ["diffusers", "WanTransformer3DModel"]}


@pytest.mark.parametrize(
    ("family", "file", "changes", "words"),
    [
        ("wan", "transformer/config.json", {"pos_embed_seq_len": 514}, ["first and last frames"]),
        ("wan", "transformer/config.json", {"in_channels": 17}, ["17 channels", "16 are latents"]),
        ("wan", "transformer/config.json", {"in_channels": 32}, ["32 channels"]),
        ("wan", "transformer/config.json", {"in_channels": 52}, ["52 channels"]),
        ("wan", "model_index.json", TWO_EXPERTS, ["two experts", "boundary_ratio=None"]),
        ("wan", "model_index.json", TWO_EXPERTS | {"boundary_ratio": None}, ["boundary_ratio=None"]),
        ("wan", "model_index.json", TWO_EXPERTS | {"boundary_ratio": 0}, ["boundary_ratio=0"]),
        ("wan", "model_index.json", TWO_EXPERTS | {"boundary_ratio": 1.0}, ["boundary_ratio=1.0"]),
        ("wan", "model_index.json", TWO_EXPERTS | {"boundary_ratio": "0.9"}, ["boundary_ratio=0.9"]),
        ("ltxvideo", "transformer/config.json", {"patch_size": 2}, ["patches of several latents"]),
        ("ltxvideo", "transformer/config.json", {"patch_size_t": 2}, ["patches of several latents"]),
        ("sanavideo", "transformer/config.json", {"guidance_embeds": True}, ["guidance"]),
        ("sanavideo", "vae/config.json", {"_class_name": "AutoencoderDC", "z_dim": ...}, ["AutoencoderDC"]),
    ],
)
def test_a_checkpoint_that_can_not_be_trained_is_refused_with_the_reason(problems, copied, family, file, changes, words):
    checkpoint = copied(family)
    rewrite(checkpoint / file, **changes)
    [problem] = problems(model_family=family, pretrained_model_name_or_path=str(checkpoint))
    assert problem.what.startswith(f"pretrained_model_name_or_path={checkpoint}: ")
    for word in words:
        assert word in problem.what
    assert problem.fix == f"use a {FAMILIES[family].title} checkpoint"


def test_an_image_to_video_kandinsky_whose_transformer_takes_no_image_is_refused(problems, copied):
    checkpoint = copied("kandinsky5_video")
    rewrite(checkpoint / "model_index.json", _class_name="Kandinsky5I2VPipeline")
    rewrite(checkpoint / "transformer/config.json", visual_cond=False)
    [problem] = problems(model_family="kandinsky5_video", pretrained_model_name_or_path=str(checkpoint))
    assert "takes no image" in problem.what


# Tasks and experts


@pytest.mark.parametrize(
    ("family", "size", "tasks"),
    [
        ("wan", "tiny", ["t2v"]),
        ("wan", "tiny-i2v", ["i2v"]),
        ("wan", "tiny-ti2v", ["t2v", "i2v"]),
        ("wan", "tiny-a14b", ["t2v"]),
        ("wan", "tiny-i2v-a14b", ["i2v"]),
        ("ltxvideo", "tiny", ["t2v", "i2v"]),
        ("ltxvideo", "tiny-timestep-vae", ["t2v", "i2v"]),
        ("sanavideo", "tiny", ["t2v", "i2v"]),
        ("kandinsky5_video", "tiny", ["t2v", "i2v"]),
    ],
)
def test_a_checkpoint_is_trained_for_what_it_can_do_its_own_task_first(plan, problems, tiny, family, size, tasks):
    of = tiny(family, size) | ({"wan_expert": "high"} if "a14b" in size else {})
    assert plan(**of).config.task == plan(**of).task == tasks[0]
    for task in ("t2v", "i2v"):
        if task in tasks:
            assert plan(**of, task=task).task == task
        else:
            [problem] = problems(**of, task=task)
            assert problem.what.startswith(f"task={task}: ")
            assert f"for {tasks[0]} alone" in problem.what
            assert f"set task to {tasks[0]}" in problem.fix


def test_the_kandinsky_pipeline_says_which_task_is_its_own(plan, problems, copied):
    checkpoint = copied("kandinsky5_video")
    of = {"model_family": "kandinsky5_video", "pretrained_model_name_or_path": str(checkpoint)}
    rewrite(checkpoint / "model_index.json", _class_name="Kandinsky5I2VPipeline")
    assert plan(**of).task == "i2v"
    assert plan(**of, task="t2v").task == "t2v"
    rewrite(checkpoint / "model_index.json", _class_name="Kandinsky5T2VPipeline")
    rewrite(checkpoint / "transformer/config.json", visual_cond=False)
    assert plan(**of).task == "t2v"
    [problem] = problems(**of, task="i2v")
    assert "for t2v alone" in problem.what


@pytest.mark.parametrize("size", ["tiny-a14b", "tiny-i2v-a14b"])
def test_one_of_two_experts_has_to_be_chosen(plan, problems, tiny, size):
    [problem] = problems(**tiny("wan", size))
    assert problem.what.startswith("wan_expert is missing: ")
    assert "high or low" in problem.fix
    boundary = 0.875
    high, low = (plan(**tiny("wan", size), wan_expert=expert).variant for expert in ("high", "low"))
    assert (high.transformer, high.sigmas, high.expert) == ("transformer", (boundary, 1.0), "high")
    assert (low.transformer, low.sigmas, low.expert) == ("transformer_2", (0.0, boundary), "low")
    assert "transformer_2" not in high.parts
    assert "transformer" not in low.parts


@pytest.mark.parametrize("size", ["tiny", "tiny-i2v", "tiny-ti2v"])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_an_expert_of_a_checkpoint_with_one_transformer_is_refused(problems, tiny, size, expert):
    [problem] = problems(**tiny("wan", size), wan_expert=expert)
    assert problem.what.startswith(f"wan_expert={expert}: ")
    assert "one transformer" in problem.what
    assert problem.fix == "leave it out"


def test_an_expert_of_another_family_is_refused(problems, tiny):
    [problem] = problems(**tiny("ltxvideo"), wan_expert="low")
    assert problem.what.startswith("wan_expert=low: ")


def test_the_low_expert_is_read_from_its_own_config(plan, problems, copied):
    checkpoint = copied("wan", "tiny-a14b")
    rewrite(checkpoint / "transformer_2/config.json", num_layers=9, attention_head_dim=12)
    of = {"pretrained_model_name_or_path": str(checkpoint)}
    high, low = (plan(**of, wan_expert=expert).geometry for expert in ("high", "low"))
    assert (high.depth, high.width) == (10, 48)
    assert (low.depth, low.width) == (9, 24)
    [problem] = problems(**of, wan_expert="low", crepa_block_index=9)
    assert "9 blocks" in problem.what


@pytest.mark.parametrize("expert", ["high", "low"])
def test_only_the_folder_of_the_trained_expert_is_needed(plan, problems, copied, expert):
    checkpoint = copied("wan", "tiny-a14b")
    other, own = ("transformer_2", "transformer") if expert == "high" else ("transformer", "transformer_2")
    of = {"pretrained_model_name_or_path": str(checkpoint), "wan_expert": expert}
    (checkpoint / other / "diffusion_pytorch_model.safetensors").unlink()
    assert plan(**of).variant.transformer == own
    (checkpoint / own / "diffusion_pytorch_model.safetensors").unlink()
    [problem] = problems(**of)
    assert f"{own}/*.safetensors" in problem.what


@pytest.mark.parametrize("expert", ["high", "low"])
def test_the_other_experts_folder_may_be_gone(plan, copied, expert):
    checkpoint = copied("wan", "tiny-a14b")
    shutil.rmtree(checkpoint / ("transformer_2" if expert == "high" else "transformer"))
    assert plan(pretrained_model_name_or_path=str(checkpoint), wan_expert=expert).variant.expert == expert


def test_a_second_transformer_that_is_named_but_not_there_is_none(plan, copied):
    """As the released TI2V-5B has it: {"transformer_2": [null, null], "boundary_ratio": null}."""
    checkpoint = copied("wan", "tiny-ti2v")
    rewrite(checkpoint / "model_index.json", transformer_2=[None, None], boundary_ratio=None)
    assert plan(pretrained_model_name_or_path=str(checkpoint)).variant.expert is None


# Adapters


def ends_and_wholes(family: str) -> list[str]:
    spec = FAMILIES[family]
    return [*spec.lora_targets, *spec.linears, f"{spec.blocks}.3.{spec.linears[0]}"]


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_targets_are_ends_of_names_a_regex_or_all(plan, tiny, family):
    spec, of = FAMILIES[family], tiny(family)
    assert plan(**of).config.lora_targets == list(spec.lora_targets)
    for targets in (
        "all-linear",
        ends_and_wholes(family),
        rf"{spec.blocks}\.[0-3]\..*",
        rf".*\.({'|'.join(spec.lora_targets)})".replace("to_out.0", r"to_out\.0"),
    ):
        assert plan(**of, lora_targets=targets).config.lora_targets == targets


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "target", ["to_z", "o_q", "proj_out", "norm2", "patch_embedding", "blocks", "{blocks}.99.{linear}", r".*\.{linear}"]
)
def test_a_target_that_is_no_linear_of_a_block_is_refused(problems, tiny, family, target):
    spec = FAMILIES[family]
    target = target.format(blocks=spec.blocks, linear=spec.linears[0])
    [problem] = problems(**tiny(family), lora_targets=[spec.linears[1], target])
    assert problem.what == f"lora_targets: {target!r} is no Linear of a block"
    for end in (*spec.linears, "all-linear"):
        assert end in problem.fix


def test_every_wrong_target_is_told(problems):
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
        return read_plan(config_file(), ["--lora_targets", text], online=False).config.lora_targets

    assert targets("to_q,ffn.net.0.proj") == ["to_q", "ffn.net.0.proj"]
    assert targets(r"blocks\..*to_q") == r"blocks\..*to_q"
    assert targets("all-linear") == "all-linear"
    [problem] = problems("--lora_targets", "to_q,to_z")
    assert "'to_z'" in problem.what
    [problem] = problems("--lora_targets", r"blocks\..*to_z")
    assert "whole name" in problem.what


def test_targets_are_of_no_interest_where_every_weight_is_trained(plan):
    assert plan(model_type="full", lora_targets=["to_z"]).config.model_type == "full"


@pytest.mark.parametrize(
    ("error", "what", "fix"),
    [
        ("GatedRepoError", "terms", "hf auth login"),
        ("RepositoryNotFoundError", "no such repository", "hf auth login"),
        ("RevisionNotFoundError", "revision dev", "revision"),
        ("LocalEntryNotFoundError", "not on this machine", "hf download"),
        ("HfHubHTTPError", "answered", "later"),
    ],
)
def test_a_hub_that_does_not_let_us_is_told_which_way(problems, monkeypatch, error, what, fix):
    import huggingface_hub

    kind = getattr(huggingface_hub.errors, error)

    def snapshot_download(*_args, **_kwargs):
        answer = SimpleNamespace(headers={}, request=None, status_code=403)
        raise kind("no", response=answer) if issubclass(kind, huggingface_hub.errors.HfHubHTTPError) else kind("no")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    [problem] = problems(pretrained_model_name_or_path="some/thing", revision="dev")
    assert problem.what.startswith("pretrained_model_name_or_path=some/thing: ")
    assert what in problem.what
    assert fix in problem.fix


MAY_BE_A_FOLDER = "If a local folder is meant, it is not there yet"


def test_a_path_of_two_names_may_be_a_folder_that_is_not_there_yet(problems):
    [problem] = problems(pretrained_model_name_or_path="not-there/checkpoint")
    assert problem.fix.endswith(f"{MAY_BE_A_FOLDER}; `crepatrain make-random` writes one with random weights")
    [problem] = problems(crepa_encoder="not-there/encoder")
    assert problem.fix.endswith(MAY_BE_A_FOLDER), "make-random writes a pipeline"
    with pytest.raises(UserError) as caught:
        fetch("pretrained_model_name_or_path", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", None, ("model_index.json",))
    assert MAY_BE_A_FOLDER not in str(caught.value), "the package knows it"
    [problem] = problems(crepa_encoder="facebook/dinov2-small")
    assert MAY_BE_A_FOLDER not in problem.fix


SIZELESS = {"height": ..., "width": ..., "num_frames": ...}
# Of each released model: blocks, width, token grid at its own size, its tasks, and the shift it is sampled with.
RELEASED = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (30, 1536, (21, 30, 52), "t2v", 3),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (40, 5120, (21, 30, 52), "t2v", 3),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": (40, 5120, (21, 30, 52), "i2v", 3),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (30, 3072, (31, 22, 40), "t2v", 5),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (40, 5120, (21, 30, 52), "t2v", 3),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": (40, 5120, (21, 30, 52), "i2v", 3),
    "Lightricks/LTX-Video": (28, 2048, (16, 16, 22), "t2v", 13.464),
    "Lightricks/LTX-Video-0.9.7-dev": (48, 4096, (16, 16, 22), "t2v", 13.464),
    "Efficient-Large-Model/SANA-Video_2B_480p_diffusers": (20, 2240, (21, 30, 52), "t2v", 8),
    "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers": (32, 1792, (31, 32, 48), "t2v", 5),
    "kandinskylab/Kandinsky-5.0-I2V-Lite-5s-Diffusers": (32, 1792, (31, 32, 48), "i2v", 5),
    "kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers": (60, 4096, (31, 32, 48), "t2v", 5),
    "kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers": (60, 4096, (31, 32, 48), "i2v", 5),
}


def test_every_released_model_is_tried():
    assert {repo for _, repo in REPOS} == RELEASED.keys()


@pytest.mark.parametrize(("family", "repo"), REPOS)
def test_a_released_model_is_known_offline(plan, problems, family, repo):
    depth, width, grid, task, shift = RELEASED[repo]
    experts = {"wan_expert": "low"} if "A14B" in repo else {}
    released = {"model_family": family, "pretrained_model_name_or_path": repo, **SIZELESS, **experts}
    found = plan(**released)
    assert found.checkpoint.origin == "package"
    assert (found.geometry.depth, found.geometry.width) == (depth, width)
    assert (found.grid.t, found.grid.h, found.grid.w) == grid
    assert found.task == task
    assert found.config.flow_shift == pytest.approx(shift, rel=1e-3)
    assert "not on this machine yet" in summary(found)["model"]
    stride = found.geometry.temporal_stride
    assert found.grid.teacher_frames == tuple(range(0, stride * (grid[0] - 1) + 1, stride))
    if experts:
        [problem] = problems(**released | {"wan_expert": ...})
        assert "wan_expert is missing" in problem.what
    [problem] = problems(**released | {"crepa_block_index": depth})
    assert f"0 to {depth - 1}" in problem.fix


def test_a_released_encoder_is_known_offline(plan):
    found = plan(crepa_encoder="dinov2_vitg14", crepa_encoder_image_size=518)
    assert found.encoder is not None
    assert (found.encoder.width, found.encoder.patch) == (1536, 14)
    assert found.teacher_grid(found.grid) == (37, 37)
    assert "37 x 37" in summary(found)["CREPA"]


def test_an_encoder_that_is_no_vision_transformer_is_refused(problems, wan):
    [problem] = problems(crepa_encoder=str(wan / "text_encoder"))
    assert f"crepa_encoder={wan / 'text_encoder'}" in problem.what
    assert "DINOv2" in problem.fix
    [problem] = problems(crepa_encoder=str(wan))
    assert "config.json" in problem.what


def test_an_encoder_without_weights_is_refused(problems, wan, tmp_path):
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    shutil.copy(wan / "encoder" / "config.json", encoder)
    [problem] = problems(crepa_encoder=str(encoder))
    assert f"crepa_encoder={encoder}" in problem.what
    assert "safetensors" in problem.what


def test_no_encoder_is_asked_for_where_none_is_used(plan):
    assert plan(crepa_enabled=False, crepa_encoder="resnet").encoder is None
    assert plan(crepa_feature_source="backbone", crepa_teacher_block_index=9, crepa_encoder="resnet").encoder is None


# Sizes of the families


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
    of, dense = tiny("kandinsky5_video", "tiny-nabla"), tiny("kandinsky5_video")
    assert plan(**of, height=128, width=256).grid.patches == 8 * 16
    assert plan(**of, height=128, width=256, num_frames=1).grid.t == 1
    [height, width] = problems(**of, height=144, width=64)
    assert "height=144: this model takes multiples of 128" in height.what
    assert height.fix == "use 128 or 256"
    assert width.fix == "use 128"
    assert plan(**dense, height=144, width=64).grid.patches == 9 * 4
    [problem] = problems(**dense, height=136)
    assert "multiples of 16" in problem.what


def test_ti2v_takes_multiples_of_32(plan, problems, tiny):
    assert plan(**tiny("wan", "tiny-ti2v")).grid.patches == 2 * 3
    [problem] = problems(**tiny("wan", "tiny-ti2v"), height=80)
    assert problem.fix == "use 64 or 96"


@pytest.mark.parametrize("size", ["tiny-i2v", "tiny-i2v-a14b"])
def test_image_to_video_channels_need_frames_behind_the_first(plan, problems, tiny, size):
    """As images are refused there: of a clip of one frame nothing is told that the transformer must be told."""
    of = tiny("wan", size) | ({"wan_expert": "high"} if "a14b" in size else {})
    assert plan(**of, num_frames=5).grid.t == 2
    [problem] = problems(**of, num_frames=1)
    assert "num_frames=1" in problem.what
    assert "5" in problem.fix


# Several at once


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
    assert keys_of(found) == {"seed", "height", "train_data"}, "a path that happens to hold a wrong key's name is still told"


def test_a_threshold_is_checked_beside_a_wrong_height(problems):
    assert keys_of(problems(height=100, crepa_similarity_threshold=1.7)) == {"height", "crepa_similarity_threshold"}


@pytest.mark.parametrize("key", ["train_data", "output_dir", "pretrained_model_name_or_path"])
def test_a_missing_required_key_does_not_hide_the_rest(problems, key):
    found = problems(**{key: ..., f"{key[:-1]}": "x", "max_train_steps": ..., "crepa_encoder_image_size": 520})
    assert keys_of(found) == {key, key[:-1], "max_train_steps,", "crepa_encoder_image_size"}


def test_a_wrong_value_is_not_told_twice(problems):
    assert len(problems(crepa_block_index="8", crepa_feature_source="backbone", crepa_teacher_block_index=9)) == 1
    assert len(problems(num_frames="50")) == 1
    assert len(problems(max_train_steps="many")) == 1
    assert len(problems(crepa_encoder_image_size="big")) == 1


# What is not wrong, but worth saying


def test_a_clean_config_has_no_warnings(plan):
    assert plan().warnings == ()


OFF = {"crepa_enabled": ..., "crepa_encoder": ..., "crepa_encoder_image_size": ...}
REFERENCE = {
    "crepa_block_index": 8,
    "crepa_lambda": 0.5,
    "crepa_adjacent_distance": 1,
    "crepa_adjacent_tau": 1.0,
    "crepa_encoder": "dinov2_vitg14",
    "crepa_encoder_image_size": 518,
}


def test_crepa_keys_without_crepa_are_told(plan):
    assert plan(**OFF).warnings == ()
    assert plan(**OFF | {"crepa_enabled": False}).warnings == ()
    [warning] = plan(**OFF, crepa_lambda=0.3).warnings
    assert warning == "crepa_lambda: without effect, as crepa_enabled is false"
    [warning] = plan(layersync_student_block=1).warnings
    assert warning == "layersync_student_block: without effect, as layersync_enabled is false"


def test_crepa_keys_without_crepa_are_told_at_their_defaults_too(plan, config_file):
    [warning] = plan(**OFF | REFERENCE).warnings
    assert warning == f"{', '.join(REFERENCE)}: without effect, as crepa_enabled is false"
    options = ["--crepa_enabled", "false", "--crepa_lambda", "0.5"]
    assert "crepa_lambda" in read_plan(config_file(), options, online=False).warnings[0]
    [warning] = plan(layersync_lambda=0.2).warnings
    assert "layersync_lambda" in warning


@pytest.mark.parametrize("crepa", [{}, OFF, BACKBONE | {"crepa_teacher_block_index": 9} | OFF | {"crepa_enabled": True}])
@pytest.mark.parametrize("added_since", [set(), {"crepa_cache_dtype", "crepa_threshold_metric", "use_ema"}])
def test_the_config_of_a_run_says_every_key_and_wishes_for_none_of_its_defaults(plan, crepa, added_since):
    written = json.loads(json.dumps(plan(**crepa).config.model_dump()))
    assert written["flow_shift"] == 3.0
    assert plan(**{key: ... if key in added_since else value for key, value in written.items()}).warnings == ()
    [warning] = plan(**written | {"crepa_power": 2.0}).warnings
    assert warning.startswith("crepa_power: without effect")


@pytest.mark.parametrize(("frames", "distance", "capped"), [(9, 2, None), (9, 3, 2), (9, 50, 2), (1, 1, 0)])
def test_a_distance_beyond_the_clip_is_capped_and_told_once(plan, frames, distance, capped):
    found = plan(num_frames=frames, crepa_adjacent_distance=distance)
    told = [warning for warning in found.warnings if "crepa_adjacent_distance" in warning]
    if capped is None:
        assert not told
    else:
        assert len(told) == 1
        assert f"crepa_adjacent_distance={distance}" in told[0]
        assert f"as {capped}" in told[0]


FADING = {"crepa_scheduler": "cosine"}
THRESHOLD = {"crepa_similarity_threshold": 0.8}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"crepa_lambda_end": 0.1, "crepa_decay_steps": 9},
            "crepa_decay_steps, crepa_lambda_end: * as crepa_scheduler is constant",
        ),
        ({"crepa_lambda_end": 0.0}, "crepa_lambda_end: * as crepa_scheduler is constant; use linear, cosine or polynomial"),
        ({"crepa_power": 2.0} | FADING, "crepa_power: * as crepa_scheduler is cosine"),
        ({"crepa_lambda": 0.0}, "crepa_enabled: * as crepa_lambda is 0"),
        ({"crepa_cutoff_step": 3}, "crepa_cutoff_step: * as the run ends at step 3"),
        ({"crepa_warmup_steps": 3}, "crepa_warmup_steps=3: the run ends at step 3, before it reaches crepa_lambda"),
        (
            {"crepa_threshold_mode": "recoverable", "crepa_probe_interval": 5, "crepa_similarity_ema_decay": 0.9},
            "crepa_similarity_ema_decay, crepa_threshold_mode, crepa_probe_interval: * as crepa_similarity_threshold is null",
        ),
        ({"crepa_threshold_metric": "self"}, "crepa_threshold_metric: * as crepa_similarity_threshold is null"),
        ({"crepa_probe_interval": 5} | THRESHOLD, "crepa_probe_interval: * as crepa_threshold_mode is permanent"),
        ({"crepa_similarity_threshold": 0}, "crepa_similarity_threshold=0: CREPA goes off almost at once"),
        ({"crepa_similarity_threshold": -0.5}, "crepa_similarity_threshold=-0.5: CREPA goes off almost at once"),
        (
            {"crepa_adjacent_distance": 0, "crepa_adjacent_tau": 2.0, "crepa_normalize_neighbour_sum": True},
            "crepa_adjacent_tau, crepa_normalize_neighbour_sum: * as crepa_adjacent_distance is 0",
        ),
        ({"crepa_cumulative_neighbors": True}, "crepa_cumulative_neighbors: * as crepa_adjacent_distance is 1"),
        ({"crepa_teacher_block_index": 9}, "crepa_teacher_block_index: * as crepa_feature_source is cached"),
        (
            BACKBONE | {"crepa_teacher_block_index": 9, "crepa_encoder_frames_batch_size": 4},
            "crepa_encoder, crepa_encoder_image_size, crepa_encoder_frames_batch_size: * as crepa_feature_source is backbone",
        ),
        (
            {"crepa_feature_source": "pixels", "crepa_cache_dtype": "int8"},
            "crepa_cache_dtype: * as crepa_feature_source is pixels",
        ),
        (
            {"crepa_drop_vae_encoder": True},
            "crepa_drop_vae_encoder: * as only crepa_feature_source=latents keeps a VAE in training",
        ),
        ({"revision": "main"}, "revision: * as pretrained_model_name_or_path is a folder"),
        (
            {"timestep_sampling": "uniform", "logit_mean": 0.5, "logit_std": 2.0},
            "logit_mean, logit_std: * as timestep_sampling is uniform",
        ),
        ({"flow_shift": 5.0}, "flow_shift: * as timestep_sampling is logit_normal"),
        ({"ema_decay": 0.9}, "ema_decay: * as use_ema is false"),
        (
            {"optimizer": "adafactor", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
            "adam_beta1, adam_beta2, adam_epsilon: * as optimizer is adafactor",
        ),
        (
            {"lr_scheduler": "constant", "lr_warmup_steps": 2},
            "lr_warmup_steps: * as lr_scheduler is constant; use constant_with_warmup",
        ),
        ({"lr_warmup_steps": 3}, "lr_warmup_steps=3: the run ends at step 3, before it reaches learning_rate"),
        (
            {"validation_images": [__file__], "validation_steps": 9, "validation_seed": 1, "validation_sampling_steps": 9},
            "validation_images, validation_steps, validation_seed, validation_sampling_steps: * as validation_prompts is null",
        ),
        ({"validation_prompts": ["a"], "validation_images": [__file__]}, "validation_images: * as task is t2v"),
    ],
)
def test_what_has_no_effect_is_told_once(plan, changes, told):
    [warning] = plan(**changes).warnings
    assert warning.startswith(told.replace("*", "without effect,"))


@pytest.mark.parametrize(
    "changes",
    [
        FADING | {"crepa_lambda": 0.0, "crepa_lambda_end": 0.1, "crepa_decay_steps": 9},
        {"crepa_scheduler": "polynomial", "crepa_power": 2.0},
        {"crepa_cutoff_step": 2, "crepa_warmup_steps": 2, "lr_warmup_steps": 2},
        {"crepa_cutoff_step": 900, "crepa_warmup_steps": 900, "max_train_steps": ..., "num_train_epochs": 2},
        THRESHOLD | {"crepa_threshold_mode": "recoverable", "crepa_probe_interval": 5, "crepa_threshold_metric": "self"},
        {"crepa_adjacent_distance": 2, "crepa_cumulative_neighbors": True, "crepa_adjacent_tau": 2.0},
        BACKBONE | {"crepa_teacher_block_index": 9, "crepa_encoder": ..., "crepa_encoder_image_size": ...},
        {"crepa_feature_source": "latents", "crepa_drop_vae_encoder": True},
        {"crepa_cache_dtype": "int8"},
        {"timestep_sampling": "shifted", "flow_shift": 5.0},
        {"logit_mean": 0.5, "use_ema": True, "ema_decay": 0.9, "adam_beta1": 0.8},
        {"optimizer": "adafactor", "adam_weight_decay": 0.1},
        {"validation_prompts": ["a"], "validation_steps": 9},
        {"logit_mean": 0.0, "timestep_sampling": "uniform", "ema_decay": 0.999, "revision": None, "validation_steps": 500},
    ],
)
def test_what_has_an_effect_is_not_told(plan, changes):
    assert plan(**changes).warnings == ()


def test_a_dropout_of_first_frames_that_nothing_is_told_is_told(plan, tiny):
    [warning] = plan(i2v_dropout=0.1).warnings
    assert warning == "i2v_dropout: without effect, as task is t2v"
    [warning] = plan(**tiny("ltxvideo"), i2v_dropout=0.1).warnings
    assert "i2v_dropout" in warning
    assert plan(**tiny("ltxvideo"), task="i2v", i2v_dropout=0.1).warnings == ()
    assert plan(i2v_dropout=0.0).warnings == ()


def test_keys_of_an_adapter_without_an_adapter_are_told(plan):
    [warning] = plan(model_type="full", lora_alpha=2.0, lora_use_rslora=True).warnings
    assert warning == "lora_rank, lora_alpha, lora_use_rslora: without effect, as model_type is full"
    assert plan(model_type="full", lora_rank=32, lora_dropout=0.0).warnings == (), "their defaults"
    assert plan(lora_alpha=2.0, lora_use_rslora=True).warnings == ()


# In words


def test_the_summary_says_what_will_happen(plan, wan, clips):
    rows = summary(plan())
    assert str(wan) in rows["model"]
    assert "Wan 2.1" in rows["model"]
    assert str(clips) in rows["clips"]
    assert "9 frames of 64 x 96 at 16 fps" in rows["clips"]
    assert "3 x 4 x 6 = 72" in rows["tokens"]
    assert "3 optimizer steps" in rows["steps"]
    assert rows["task"] == "text-to-video"
    assert "LoRA rank 4, scaled by alpha 4 / rank, on to_q, to_k, to_v, to_out.0" in rows["trained"]
    assert "0.001" in rows["optimizer"]
    assert rows["precision"].startswith("fp32;")


def test_the_summary_tells_what_is_trained_of_what_for_what(plan, tiny):
    rows = summary(plan(**tiny("wan", "tiny-i2v-a14b"), wan_expert="low", i2v_dropout=0.25, lora_use_rslora=True))
    assert "Wan 2.2 image-to-video, the low-noise expert (noise levels 0 to 0.875)" in rows["model"]
    assert rows["task"] == "image-to-video from each clip's first frame, 25% of the samples without it"
    assert "alpha 4 / sqrt(rank)" in rows["trained"]
    rows = summary(plan(**tiny("ltxvideo"), task="i2v", model_type="full", mixed_precision="bf16"))
    assert "LTX-Video" in rows["model"]
    assert rows["task"] == "image-to-video from each clip's first frame"
    assert rows["trained"] == "every weight of the transformer"
    assert rows["precision"].startswith("bf16 arithmetic, fp32 weights")
    assert "every Linear of the blocks" in summary(plan(lora_targets="all-linear"))["trained"]
    assert r"what blocks\..*to_q matches" in summary(plan(lora_targets=r"blocks\..*to_q"))["trained"]


def test_the_summary_tells_block_and_teacher(plan, wan):
    words = summary(plan())["CREPA"]
    assert "block 8 of 0 to 9" in words
    assert f"{wan / 'encoder'} at 56x84" in words
    assert "4 x 6 patches" in words
    assert "patch on patch" in words
    words = summary(plan(crepa_block_index=2, crepa_feature_source="backbone", crepa_teacher_block_index=7))["CREPA"]
    assert "block 2 of 0 to 9 learns from block 7 of the same transformer" in words
    words = summary(plan(crepa_encoder_image_size=518))["CREPA"]
    assert "518x518" in words
    assert "37 x 37" in words
    assert "the teacher's grid resampled onto the student's" in words
    assert "frame means" in summary(plan(crepa_spatial_align=False))["CREPA"]
    assert "off" in summary(plan(crepa_enabled=False))["CREPA"]


def test_the_summary_tells_the_neighbours(plan):
    assert "two frames 1 away" in summary(plan())["neighbours"]
    assert "exp(-distance / 2)" in summary(plan(crepa_adjacent_tau=2))["neighbours"]
    assert "frames 1 to 2 away" in summary(plan(crepa_adjacent_distance=2, crepa_cumulative_neighbors=True))["neighbours"]
    assert "two frames 1 away" in summary(plan(crepa_cumulative_neighbors=True))["neighbours"]
    assert summary(plan(crepa_adjacent_distance=0))["neighbours"].startswith("none")


def test_the_summary_tells_the_schedule(plan):
    assert summary(plan())["weight"] == "0.5"
    schedule = {"crepa_scheduler": "cosine", "crepa_warmup_steps": 100, "crepa_lambda_end": 0.1}
    assert summary(plan(**schedule))["weight"] == "0 to 0.5 in 100 steps, then cosine to 0.1 by the end of the run"
    assert "in 5000 steps (step 5100)" in summary(plan(**schedule, crepa_decay_steps=5000))["weight"]
    assert "polynomial of power 2" in summary(plan(crepa_scheduler="polynomial", crepa_power=2))["weight"]


def test_the_summary_tells_that_the_loss_grows_with_the_clip(plan):
    words = summary(plan(crepa_normalize_by_frames=False))["weight"]
    assert words == "0.5, on the sum over the token frames (3 at this size), which grows with a clip's length"


def test_the_summary_tells_the_cutoff_beside_the_reachable_maximum(plan):
    assert summary(plan())["cutoff"] == "none (the score's maximum here is 1.491)"
    assert "off from step 2000" in summary(plan(crepa_cutoff_step=2000))["cutoff"]
    words = summary(plan(crepa_similarity_threshold=0.85))["cutoff"]
    for word in ("permanent", "alignment", "0.85", "mean cosine of about 0.57", "1.491"):
        assert word in words
    words = summary(plan(crepa_similarity_threshold=0.85, crepa_threshold_metric="self", crepa_threshold_mode="recoverable"))
    for word in ("recoverable", "self-similarity", "0.85", "1.000"):
        assert word in words["cutoff"]


def test_at_the_reference_size_a_threshold_of_0_85_is_a_cosine_of_about_a_half(plan):
    repo = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    size = {"height": 480, "width": 832, "num_frames": 81}
    words = summary(plan(pretrained_model_name_or_path=repo, crepa_similarity_threshold=0.85, **size))["cutoff"]
    assert "mean cosine of about 0.50" in words
    assert "1.701" in words


def test_the_summary_tells_layersync(plan):
    rows = summary(plan(layersync_enabled=True, layersync_student_block=2, layersync_teacher_block=7))
    assert rows["LayerSync"] == "block 2 follows block 7, weight 0.2"
    assert "LayerSync" not in summary(plan())


def test_an_adapter_to_begin_with_is_one_by_its_header(problems, tmp_path):
    path = tmp_path / "adapter.safetensors"

    def told(content: bytes) -> list[str]:
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
        assert told(content) == [f"init_adapter={path}: it is no safetensors file, or not a whole one"]
    weights = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    assert told(weights) == [f"init_adapter={path}: none of its 1 tensors is a LoRA's"]
    path.unlink()
    assert [problem.what for problem in problems(init_adapter=str(path))] == [f"init_adapter={path}: there is no such file"]
