"""Videos on the way, and what they leave of a run's memory and numbers."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from common import PROMPTS, frames_of
from diffusers import AutoencoderKLWan, WanPipeline
from runs import alive
from transformers import Dinov2Model

from crepatrain.commands import sample as module
from crepatrain.commands.fit import fit
from crepatrain.commands.sample import SampleOptions, sample
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.records.events import StepDone
from crepatrain.running import validation
from crepatrain.running.validation import steadiness
from crepatrain.stopping import Stopped


def test_validation_makes_a_grid_and_figures_at_its_steps(trained):
    assert sorted(path.name for path in (trained / "samples").glob("step-*")) == [
        "step-000000.mp4",
        "step-000002.mp4",
        "step-000004.mp4",
    ]
    first, last = (frames_of(trained / "samples" / f"step-00000{step}.mp4") for step in (0, 4))
    assert first.shape == (9, 64 + 22, 2 * 96 + 4, 3)
    assert np.abs(first[:, 22:].astype(int) - last[:, 22:]).mean() > 1
    lines = [json.loads(line) for line in (trained / "samples" / "figures.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [(step, prompt) for step in (0, 2, 4) for prompt in PROMPTS]
    assert all(0 <= line["flicker"] < 2 and -1 <= line["consistency"] <= 1 for line in lines)


def test_a_validation_video_is_what_sample_makes(trained, tmp_path, monkeypatch):
    """The same settings, negative prompt and seed: before they are encoded, but for the grid's label."""
    written = {}
    for where in (module, validation):
        monkeypatch.setattr(where, "write_video", lambda path, frames, *, fps, facts: written.update({path.name: frames.copy()}))
    root = tmp_path / "run"
    shutil.copytree(trained, root)
    (root / "samples" / "step-000004.mp4").unlink()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads((root / "config.json").read_text()) | {"output_dir": str(root)}), encoding="utf-8")
    fit(read_plan(path), Screen(quiet=True))
    sample(root, SampleOptions(prompt=PROMPTS[1], steps=2, seed=42, output=tmp_path / "one.mp4"), Screen(quiet=True))
    grid, one = written["step-000004.mp4"], written["one.mp4"]
    assert np.abs(grid[:, 22:, 100:].astype(int) - one).max() <= 2


def test_a_validation_that_a_kill_has_cost_is_made_good(trained, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(trained, root)
    for lost in ("step-000004.mp4", "step-000002.mp4"):
        (root / "samples" / lost).unlink()
    shutil.copytree(root / "checkpoints" / "step-000004", root / "checkpoints" / "step-000002", dirs_exist_ok=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads((root / "config.json").read_text()) | {"output_dir": str(root)}), encoding="utf-8")
    fit(read_plan(path), Screen(quiet=True))  # complete, but for its last videos
    assert (root / "samples" / "step-000004.mp4").is_file()
    assert not (root / "samples" / "step-000002.mp4").is_file()  # that step's weights are gone
    assert json.loads((root / "status.json").read_text())["status"] == "completed"


def test_a_signal_ends_a_validation_and_loses_nothing(trained, tmp_path, monkeypatch):
    def signalled(pipeline, arguments, generator, advance):
        if "step 2" in messages:
            os.kill(os.getpid(), signal.SIGINT)
        advance()
        return np.zeros((9, 64, 96, 3), dtype=np.uint8)

    class Listening(Screen):
        def say(self, text=""):
            messages[:] = [f"step {text.split()[3].rstrip(':')}"] if text.startswith("validating") else messages

    messages = []
    config = json.loads((trained / "config.json").read_text())
    path = tmp_path / "config.json"
    changes = {"output_dir": str(tmp_path / "run"), "checkpointing_steps": 3}
    path.write_text(json.dumps(config | changes), encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr(validation, "call", signalled)
        with pytest.raises(Stopped, match="saved at step 2"):
            fit(read_plan(path), Listening(quiet=True))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert not (tmp_path / "run" / "samples" / "step-000002.mp4").exists()
    fit(read_plan(path), Screen(quiet=True))
    assert (tmp_path / "run" / "samples" / "step-000002.mp4").exists()


def test_looking_changes_nothing_of_the_training(trained, wan, clips, config_file, tmp_path):
    config = json.loads((trained / "config.json").read_text())
    plain = {key: value for key, value in config.items() if not key.startswith(("validation", "eval"))}
    path = tmp_path / "plain.json"
    path.write_text(json.dumps(plain | {"output_dir": str(tmp_path / "plain")}), encoding="utf-8")
    fit(read_plan(path), Screen(quiet=True))

    def losses(run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]

    assert losses(tmp_path / "plain") == losses(trained)


def test_steadiness_tells_a_still_from_noise(trained, config_file):
    from crepatrain.training import build

    plan = read_plan(config_file())
    encoder = build.build_encoder(plan, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (5, 3, 64, 96), generator=generator, dtype=torch.uint8)
    still = noise[:1].expand(5, -1, -1, -1)
    calm, wild = steadiness(encoder, still, plan), steadiness(encoder, noise, plan)
    assert calm["flicker"] == pytest.approx(0, abs=1e-5)
    assert calm["consistency"] == pytest.approx(1, abs=1e-5)
    assert wild["flicker"] > calm["flicker"] + 0.01
    assert wild["consistency"] < 1


def test_memory_is_given_back_after_a_validation(trained, tmp_path):
    """What lives in the steps behind the videos is what lived in those before them; models of the videos are gone."""
    kinds = (AutoencoderKLWan, Dinov2Model, WanPipeline)
    seen, before_it = {}, alive(*kinds)

    def count(event):
        if isinstance(event, StepDone):
            real = [tensor for tensor in alive(torch.Tensor) if type(tensor) in {torch.Tensor, torch.nn.Parameter}]
            sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in real}
            seen[event.done] = (alive(*kinds, but=before_it), sum(sizes.values()))

    config = json.loads((trained / "config.json").read_text())
    changes = {"output_dir": str(tmp_path / "run"), "max_train_steps": 6, "validation_steps": 3, "checkpointing_steps": 6}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | changes | {"eval_data": None}), encoding="utf-8")
    fit(read_plan(path), Screen(quiet=True), subscribers=[count])
    assert (tmp_path / "run" / "samples" / "step-000003.mp4").is_file()
    assert all(not models for models, _ in seen.values())
    before, after = seen[3][1], seen[5][1]  # of the third step the optimizer's state is there, and its videos are not yet made
    assert abs(after - before) < 0.01 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_videos_are_decoded_in_vae_dtype_whatever_the_training_computes_in(config_file, tmp_path, monkeypatch, dtype):
    seen, made = set(), validation.build.build_vae

    def watched(*args):
        vae = made(*args)
        for part in vae.modules():
            if isinstance(part, torch.nn.Conv3d):
                part.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
        return vae

    monkeypatch.setattr(validation.build, "build_vae", watched)
    changes = {"mixed_precision": "bf16", "vae_dtype": str(dtype).removeprefix("torch."), "max_train_steps": 1}
    changes |= {"validation_prompts": ["a square"], "validation_sampling_steps": 2, "crepa_enabled": False}
    fit(read_plan(config_file(**changes, output_dir=str(tmp_path / "run"))), Screen(quiet=True))
    assert (tmp_path / "run" / "samples" / "step-000001.mp4").is_file()
    assert seen == {dtype}
