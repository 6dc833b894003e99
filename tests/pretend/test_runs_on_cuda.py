"""Whole runs on a CUDA device: no mixed devices, no step that waits, no memory left behind, and how a run on a small GPU ends."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from common import render_image

from crepatrain.specs import FAMILIES

# Everything that a run can do between two steps; a step is logged only at the end.
WHOLE: dict[str, Any] = {
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "logging_steps": 100,
    "mixed_precision": "bf16",
    "use_ema": True,
    "eval_share": 0.34,
    "validation_prompts": ["a square"],
    "validation_steps": 2,
    "validation_sampling_steps": 2,
    "dataloader_num_workers": 1,
}
# Bytes: enough to save with, tensor by tensor, and not enough for a step, a clip that is measured, or a video.
ROOM = 1 << 15
LARGER = {"num_frames": 9, "height": 128, "width": 192}
# A limit of the device's memory does not depend on what other tests have left in the cache.
NOTHING_ELSE: dict[str, Any] = {
    "eval_share": ...,
    "validation_prompts": ...,
    "validation_steps": ...,
    "validation_sampling_steps": ...,
}


def expect_ended(done: dict[str, Any], code: int = 0) -> None:
    assert (done["code"], done["fault"]) == (code, ""), done["said"] + done["fault"]
    assert done["after"] == done["before"], "memory of the device that the command has left behind"


def expect_clean_steps(done: dict[str, Any], numbers: range, *, apart: int = 0) -> None:
    """Nothing that the host waits for but the events of `HostCopy` and the clock; and between two steps only what a run holds.

    Args:
        apart: bytes that the run holds too, in no tensor of its modules and optimizers.
    """
    assert [step["step"] for step in done["steps"]] == list(numbers)
    beside = done["steps"][0]["live"] - done["steps"][0]["held"]  # a teacher's own small tensors
    assert apart <= beside <= apart + (0 if done["steps"][0]["teacher"] in {None, "CachedTeacher"} else 1 << 19)
    for step in done["steps"]:
        assert step["launch"]["wait"] == {}, step
        assert step["launch"]["event"] == {}, step
        assert step["launch"]["copy"], step
        assert step["logged"] or step["settle"]["wait"] == {}, step
        assert step["live"] == step["held"] + beside, step


def whole_run(on_cuda, path: Path, *sample: str, short: bool = False) -> None:
    """Train, continue, and make a video.

    Args:
        short: the last step before the continuation finds hardly any memory.
    """
    folder = json.loads(path.read_text(encoding="utf-8"))["output_dir"]
    first, continued, sampled = on_cuda(
        [
            {"arguments": ["fit", str(path)], "tighten": {"step": 3, "launched": False, "room": ROOM} if short else None},
            {"arguments": ["fit", str(path), "--max_train_steps", "6"]},
            {"arguments": ["sample", folder, "--steps", "2", *sample]},
        ]
    )
    expect_ended(first, 2 if short else 0)
    expect_ended(continued)
    expect_ended(sampled)
    if short:
        assert "out of GPU memory at step 4" in first["said"]
        first["steps"].pop()
    expect_clean_steps(first, range(3 if short else 4))
    expect_clean_steps(continued, range(3 if short else 4, 6))
    assert "rehearsing a step" in first["said"]
    assert "continuing from" in continued["said"]
    assert len(list(Path(folder, "samples").glob("step-*.mp4"))) == 4  # of steps 0, 2, 4 and 6
    assert list(Path(folder, "samples").glob("sample*.mp4"))


def test_a_whole_run(config_file, on_cuda, tmp_path):
    whole_run(on_cuda, config_file(cache_dir=str(tmp_path / "cache"), **WHOLE))


@pytest.mark.slow
def test_a_whole_run_that_once_is_out_of_memory(config_file, on_cuda, tmp_path):
    whole_run(on_cuda, config_file(cache_dir=str(tmp_path / "cache"), **WHOLE), short=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "wan"])
def test_a_whole_run_of_every_family(config_file, on_cuda, tiny_checkpoint, family: str):
    folder = str(tiny_checkpoint(family))
    whole_run(on_cuda, config_file(**WHOLE | LARGER, model_family=family, pretrained_model_name_or_path=folder))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "size"), [("wan", "tiny-i2v"), ("wan", "tiny-ti2v"), ("ltxvideo", "tiny")])
def test_a_whole_run_from_images(config_file, on_cuda, tiny_checkpoint, tmp_path, family: str, size: str):
    render_image(image := tmp_path / "image.png")
    changes = {"task": "i2v", "i2v_dropout": 0.5, "validation_images": [str(image)]}
    folder = str(tiny_checkpoint(family, size))
    path = config_file(**WHOLE | LARGER | changes, model_family=family, pretrained_model_name_or_path=folder)
    whole_run(on_cuda, path, "--image", str(image))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"crepa_feature_source": "pixels"},
        {"crepa_feature_source": "latents"},
        {"crepa_feature_source": "latents", "crepa_drop_vae_encoder": True},
        {"crepa_feature_source": "backbone", "crepa_block_index": 3, "crepa_teacher_block_index": 9},
        {"crepa_enabled": False},
        {"model_type": "full", "lora_rank": ..., "gradient_accumulation_steps": 2},
    ],
    ids=["pixels", "latents", "decoder only", "backbone", "without CREPA", "full"],
)
def test_a_whole_run_with_every_teacher(config_file, on_cuda, changes: dict[str, Any]):
    if not changes.get("crepa_enabled", True):
        changes |= {"crepa_encoder": ..., "crepa_encoder_image_size": ...}
    sample = ["--prompt", "a square"]
    whole_run(on_cuda, config_file(**WHOLE | changes), *sample)


@pytest.mark.slow
def test_out_of_memory_at_every_stage(config_file, on_cuda, tmp_path):
    """A limit from outside for the stages before the first step; after that memory is taken away at one moment."""
    plain = config_file(cache_dir=str(tmp_path / "cache"), **WHOLE | NOTHING_ELSE)
    short = tmp_path / "short.json"
    shutil.copy(plain, short)

    def run(name: str, *options: str, **limits: Any) -> dict[str, Any]:
        return {"arguments": ["fit", str(short), "--output_dir", str(tmp_path / name), *options], **limits}

    caching, measured, loading, rehearsal, evaluation, validation, saving = on_cuda(
        [
            run("caching", limit=1 << 18),
            run("measured", "--max_train_steps", "1"),
            run("loading", share_of_held=0.5),
            run("rehearsal", share_of_held=1.01),
            run("evaluation", "--eval_share", "0.34", tighten={"step": 1, "launched": True, "room": ROOM}),
            run(
                "validation",
                "--validation_prompts",
                "a square",
                "--validation_sampling_steps",
                "2",
                tighten={"step": 3, "launched": True, "room": ROOM},
            ),
            run("saving", "--use_ema", "true", tighten={"step": 3, "launched": True, "room": 0}),
        ]
    )
    expect_ended(measured)
    expected = {
        "out of GPU memory while filling the caches": caching,
        "out of GPU memory while the model was loaded": loading,
        "out of GPU memory on the largest clips": rehearsal,
    }
    for message, done in expected.items():
        expect_ended(done, 2)
        assert message in done["said"]
    for done, saved, message in (
        (evaluation, 2, "out of GPU memory while the held-out clips were measured"),
        (validation, 4, "validation_prompts: out of GPU memory while a video was made"),
    ):
        expect_ended(done, 2)
        assert message in done["said"]
        name = "evaluation" if done is evaluation else "validation"
        assert (tmp_path / name / "checkpoints" / f"step-{saved:06}").is_dir(), name
    expect_ended(saving)  # whole and on the disk, without a byte of the device's
    assert (tmp_path / "saving" / "checkpoints" / "step-000004").is_dir()
