"""Checkpoints and encoders that a config names: what is missing, broken, or not trainable is refused."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crepatrain.config.plan import Plan, read_plan
from crepatrain.config.sources import fetch
from crepatrain.config.summary import summarize
from crepatrain.errors import UserError
from crepatrain.specs import FAMILIES

REPOS = [(family, model.repo) for family, spec in FAMILIES.items() for model in spec.released.values()]


def rewrite(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.unlink()
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}), encoding="utf-8")


def summary(plan: Plan) -> dict[str, str]:
    return dict(summarize(plan))


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


def test_every_missing_part_is_reported_at_once(problems, clips):
    [problem] = problems(pretrained_model_name_or_path=str(clips))
    for part in ("model_index.json", "transformer/", "vae/", "scheduler/"):
        assert part in problem.what
    assert "-Diffusers" in problem.fix
    assert "make-random" in problem.fix


def test_every_missing_part_of_a_variant_is_reported_at_once(problems, copied):
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
        ("transformer/config.json", "num_layers", True),
        ("transformer/config.json", "num_layers", 0),
        ("transformer/config.json", "in_channels", ...),
        ("transformer/config.json", "in_channels", [16]),
        ("transformer/config.json", "patch_size", 2),
        ("transformer/config.json", "patch_size", [1, 2]),
        ("transformer/config.json", "patch_size", [1, 2, 2.0]),
        ("transformer/config.json", "attention_head_dim", None),
        ("vae/config.json", "z_dim", ...),
        ("vae/config.json", "scale_factor_temporal", None),
        ("vae/config.json", "scale_factor_spatial", -8),
        ("scheduler/scheduler_config.json", "flow_shift", "three"),
        ("scheduler/scheduler_config.json", "flow_shift", 10**400),
        ("scheduler/scheduler_config.json", "flow_shift", math.inf),
        ("model_index.json", "transformer_2", 5),
    ],
)
def test_a_checkpoint_with_a_strange_config_is_refused(problems, checkpoint, file, key, value):
    rewrite(checkpoint / file, **{key: value})
    [problem] = problems(pretrained_model_name_or_path=str(checkpoint))
    assert problem.what.startswith(f"pretrained_model_name_or_path={checkpoint}: ")
    assert (f"({key} is missing)" if value is ... else f"({key}={json.dumps(value)} is not ") in problem.what
    assert problem.fix == "download it again"


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("vae/config.json", {"spatio_temporal_scaling": 3}, "spatio_temporal_scaling=3 is not a list of true and false"),
        ("vae/config.json", {"temporal_compression_ratio": "8"}, 'temporal_compression_ratio="8" is not a whole number above 0'),
        ("scheduler/scheduler_config.json", {"base_shift": None}, "base_shift=null is not a number between"),
        ("scheduler/scheduler_config.json", {"max_image_seq_len": 1024}, "base_image_seq_len=1024 is not below"),
    ],
)
def test_a_strange_config_of_an_ltx_video_is_refused(problems, copied, file, changes, words):
    checkpoint = copied("ltxvideo")
    rewrite(checkpoint / file, **changes)
    [problem] = problems(model_family="ltxvideo", pretrained_model_name_or_path=str(checkpoint))
    assert words in problem.what


@pytest.mark.parametrize("function", ["variant", "geometry"])
@pytest.mark.parametrize("bug", [TypeError, KeyError, ValueError])
def test_a_bug_in_a_spec_is_not_blamed_on_the_checkpoint(config_file, checkpoint, monkeypatch, function, bug):
    def broken(*_):
        raise bug("ours")

    monkeypatch.setattr("crepatrain.config.plan.FAMILIES", {"wan": replace(FAMILIES["wan"], **{function: broken})})
    with pytest.raises(bug, match="ours"):
        read_plan(config_file(pretrained_model_name_or_path=str(checkpoint)), online=False)


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
        (
            "ltxvideo",
            "model_index.json",
            {"_class_name": "LTXI2VLongMultiPromptPipeline"},
            ["LTXI2VLong", "LTXConditionPipeline"],
        ),
        ("ltxvideo", "model_index.json", {"_class_name": None}, ["_class_name", "but null"]),
        ("ltxvideo", "model_index.json", {"_class_name": ...}, ["_class_name", "but null"]),
        ("ltxvideo", "model_index.json", {"_class_name": ["LTXPipeline"]}, ["_class_name", 'but ["LTXPipeline"]']),
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


@pytest.mark.parametrize(
    ("named", "pipeline", "length"),
    [
        ("LTXPipeline", "LTXPipeline", 128),
        ("LTXImageToVideoPipeline", "LTXPipeline", 128),
        ("LTXConditionPipeline", "LTXConditionPipeline", 256),
    ],
)
def test_the_generation_of_an_ltx_video_is_that_of_the_pipeline_it_names(plan, copied, named, pipeline, length):
    checkpoint = copied("ltxvideo")
    rewrite(checkpoint / "model_index.json", _class_name=named)
    found = plan(model_family="ltxvideo", pretrained_model_name_or_path=str(checkpoint))
    assert found.warnings == ()
    assert found.spec.pipeline_of(found.variant, "t2v") == pipeline
    assert found.spec.text_length_of(found.variant) == length


def test_a_checkpoint_that_its_own_pipeline_can_not_sample_is_trained_without_videos(plan, problems, copied):
    checkpoint = copied("ltxvideo")
    rewrite(checkpoint / "model_index.json", _class_name="LTXConditionPipeline")
    of = {"model_family": "ltxvideo", "pretrained_model_name_or_path": str(checkpoint)}
    assert plan(**of).variant.pipeline == "LTXConditionPipeline"
    [problem] = problems(**of, validation_prompts=["a"])
    assert (
        problem.what == "validation_prompts: its scheduler has use_dynamic_shifting, with which LTXConditionPipeline can't sample"
    )
    assert "leave it out" in problem.fix
    rewrite(checkpoint / "scheduler/scheduler_config.json", use_dynamic_shifting=False)
    assert plan(**of, validation_prompts=["a"]).warnings == ()


@pytest.mark.parametrize(("family", "ours"), [("wan", "WanPipeline"), ("sanavideo", "SanaVideoPipeline")])
def test_a_pipeline_class_that_is_unknown_is_said(plan, copied, family, ours):
    checkpoint = copied(family)
    rewrite(checkpoint / "model_index.json", _class_name="OtherPipeline")
    [warning] = plan(model_family=family, pretrained_model_name_or_path=str(checkpoint)).warnings
    assert "OtherPipeline" in warning
    assert ours in warning


def test_an_image_to_video_kandinsky_whose_transformer_takes_no_image_is_refused(problems, copied):
    checkpoint = copied("kandinsky5_video")
    rewrite(checkpoint / "model_index.json", _class_name="Kandinsky5I2VPipeline")
    rewrite(checkpoint / "transformer/config.json", visual_cond=False)
    [problem] = problems(model_family="kandinsky5_video", pretrained_model_name_or_path=str(checkpoint))
    assert "takes no image" in problem.what


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
        ("ltxvideo", "tiny-0.9.5", ["t2v", "i2v"]),
        ("sanavideo", "tiny", ["t2v", "i2v"]),
        ("kandinsky5_video", "tiny", ["t2v", "i2v"]),
    ],
)
def test_a_checkpoint_is_trained_for_what_it_can_do_its_own_task_first(plan, problems, tiny, family, size, tasks):
    of = tiny(family, size) | ({"wan_expert": "high"} if "a14b" in size else {})
    assert plan(**of).config.model.task == plan(**of).task == tasks[0]
    for task in ("t2v", "i2v"):
        if task in tasks:
            assert plan(**of, task=task).task == task
        else:
            [problem] = problems(**of, task=task)
            assert problem.what.startswith(f"task={task}: ")
            assert f"for {tasks[0]} only" in problem.what
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
    assert "for t2v only" in problem.what


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
def test_a_hub_that_does_not_let_us_is_explained_with_the_way_out(problems, monkeypatch, error, what, fix):
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
    "Lightricks/LTX-Video-0.9.5": (28, 2048, (16, 16, 22), "t2v", 1),
    "Lightricks/LTX-Video-0.9.7-dev": (48, 4096, (16, 16, 22), "t2v", 1),
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
    if "Pro" in repo:  # NABLA
        released["compile"] = True
    found = plan(**released)
    assert found.checkpoint.origin == "package"
    assert (found.geometry.depth, found.geometry.width) == (depth, width)
    assert (found.grid.t, found.grid.h, found.grid.w) == grid
    assert found.task == task
    assert found.config.diffusion.flow_shift == pytest.approx(shift, rel=1e-3)
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
