"""Videos from an adapter, videos on the way, and held-out clips."""

import gc
import json
import math
import os
import shutil
import signal
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from common import context_of, render_clip, tiny_values
from diffusers import AutoencoderKLWan, WanPipeline
from transformers import Dinov2Model

from crepatrain.commands import sample as module
from crepatrain.commands.fit import fit
from crepatrain.commands.sample import SampleOptions, sample
from crepatrain.config.load import parse_numbers
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.data.encode import film_strip, grid_video, video_facts, write_video
from crepatrain.errors import DivergedError, UserError
from crepatrain.preparing.preflight import read_dataset, read_datasets
from crepatrain.records.events import StepDone
from crepatrain.records.opening import asked_step
from crepatrain.running import validation
from crepatrain.running.validation import steadiness
from crepatrain.stopping import Stopped

PROMPTS = ["a square", "another square moves"]


def frames_of(path):
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, wan, clips):
    """A run of the tiny Wan with two adapters, a base that it does change, videos on the way and clips held out."""
    root = tmp_path_factory.mktemp("trained")
    held_out = root / "held-out"
    held_out.mkdir()
    render_clip(held_out / "other.mp4", seed=77)
    (held_out / "other.txt").write_text("something else\n", encoding="utf-8")
    values = tiny_values(wan, clips, root / "run", tmp_path_factory) | {
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 1,
        "learning_rate": 0.05,
        "validation_prompts": PROMPTS,
        "validation_steps": 2,
        "validation_sampling_steps": 2,
        "eval_data": str(held_out),
    }
    path = root / "config.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    fit(read_plan(path), Screen(quiet=True))
    return root / "run"


def test_a_sample_stands_beside_the_base_of_the_same_seed(trained, tmp_path, capsys):
    sample(trained, SampleOptions(prompt="a square", steps=2, output=tmp_path / "one.mp4"), Screen())
    out = capsys.readouterr().out
    assert "steps: 2 instead of the recipe's 50" in out
    assert "adapter changes" in out
    assert frames_of(tmp_path / "one.mp4").shape == (9, 64, 96, 3)
    beside = frames_of(tmp_path / "one-beside-base.mp4")
    assert beside.shape[0] == 9
    assert beside.shape[2] == 2 * 96 + 4
    base, made = (beside[:, 22:86, start : start + 96].astype(int) for start in (0, 100))
    assert np.abs(base - made).mean() > 1
    facts = video_facts(tmp_path / "one-beside-base.mp4")
    assert {key: facts[key] for key in ("prompt", "seed", "step", "steps", "shown", "base")} == {
        "prompt": "a square",
        "seed": 42,
        "step": 4,
        "steps": 2,
        "shown": ["base", "adapter"],
        "base": "wan-tiny",
    }
    assert video_facts(trained / "samples" / "step-000002.mp4") == {"prompts": PROMPTS, "seed": 42, "steps": 2, "step": 2}


def test_a_sample_takes_no_others_place(trained):
    for _ in range(2):
        sample(trained, SampleOptions(prompt="a", steps=2, frames=5, seed=3), Screen(quiet=True))
    names = {path.name for path in (trained / "samples").glob("sample-3*")}
    assert names == {"sample-3.mp4", "sample-3-beside-base.mp4", "sample-3-2.mp4", "sample-3-2-beside-base.mp4"}


def test_the_same_seed_gives_the_same_frames(trained, tmp_path, monkeypatch):
    """Before they are encoded: the encoder's threads may split the bits otherwise."""
    written = []
    monkeypatch.setattr(module, "write_video", lambda _path, frames, *, fps, facts: written.append((frames.copy(), fps)))
    for seed in (1, 1, 2):
        sample(trained, SampleOptions(prompt="a", steps=2, frames=5, seed=seed, output=tmp_path / "out.mp4"), Screen(quiet=True))
    first, again, other = (written[index][0] for index in (0, 2, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert {fps for _, fps in written} == {16.0}


def test_checkpoints_and_strengths_make_one_grid(trained, tmp_path):
    options = SampleOptions(prompt="a", steps=2, frames=5, at=(2, 4), strengths=(0.5, 1.0), output=tmp_path / "grid.mp4")
    sample(trained, options, Screen(quiet=True))
    grid = frames_of(tmp_path / "grid-beside-base.mp4")
    assert grid.shape == (5, 2 * (64 + 22) + 4, 3 * 96 + 2 * 4, 3)


def test_an_adapters_file_is_enough_where_its_base_is_known(trained, wan, tiny_checkpoint, tmp_path):
    file = tmp_path / "copied.safetensors"
    shutil.copy(trained / "pytorch_lora_weights.safetensors", file)
    sample(file, SampleOptions(prompt="a", steps=2, frames=5, base=str(wan), output=tmp_path / "out.mp4"), Screen(quiet=True))
    assert len(frames_of(tmp_path / "out.mp4")) == 5
    with pytest.raises(UserError, match="its base was a local folder called wan"):
        sample(file, SampleOptions(prompt="a"), Screen(quiet=True))
    with pytest.raises(UserError, match=r"--base .*: it is Wan 2.1 image-to-video, and this was trained for text"):
        sample(file, SampleOptions(prompt="a", base=str(tiny_checkpoint("wan", "tiny-i2v"))), Screen(quiet=True))
    with pytest.raises(UserError, match=r"--base=.*: its transformer is a LTXVideoTransformer3DModel.*\n.*give another one"):
        sample(trained, SampleOptions(prompt="a", base=str(tiny_checkpoint("ltxvideo", "tiny"))), Screen(quiet=True))
    with pytest.raises(UserError, match="--at: it compares the checkpoints of a run"):
        sample(file, SampleOptions(prompt="a", at=(2,)), Screen(quiet=True))


def test_what_another_base_decides_otherwise_is_reported(trained, wan, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(wan, other)
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"flow_shift": 5.0}))
    options = SampleOptions(prompt="a", steps=2, frames=5, base=str(other), output=tmp_path / "out.mp4")
    for target in (trained, trained / "pytorch_lora_weights.safetensors"):
        sample(target, options, Screen())
        assert f"shift: 5.0, as {other} has it, instead of the recipe's 3.0" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SampleOptions(prompt="a", frames=6), "num_frames=6: this model takes 4k"),
        (SampleOptions(prompt="a", height=60), "height=60: this model takes multiples of 16"),
        (SampleOptions(prompt="a", image=Path("x.png")), "--image x.png: the run was trained from text alone"),
        (SampleOptions(prompt="a", output=Path("video.avi")), "--output video.avi: not the name of an .mp4 file"),
        (SampleOptions(prompt="a", output=Path("/proc/video.mp4")), "--output /proc/video.mp4: it can't be written"),
        (SampleOptions(prompt="a", guidance=math.inf), "--guidance inf: not a finite number"),
        (SampleOptions(prompt="a", at=(3,)), "adapter-000003.safetensors: there is no such file"),
    ],
)
def test_what_cant_be_sampled_is_reported(trained, options, message):
    with pytest.raises(UserError, match=message):
        sample(trained, options, Screen(quiet=True))


def test_numbers_between_commas():
    assert parse_numbers("0.5, 1", float, "--strength") == (0.5, 1.0)
    assert parse_numbers("", int, "--at") == ()
    with pytest.raises(UserError, match="--at 5,x: not numbers"):
        parse_numbers("5,x", int, "--at")
    with pytest.raises(UserError, match=r"--strength nan: not numbers .*\n.*0.7,1.0"):
        parse_numbers("nan", float, "--strength")


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


def test_held_out_losses_that_are_not_finite_end_the_run_as_such(trained, tmp_path):
    """Before a checkpoint of such weights takes the place of a good one."""
    config = json.loads((trained / "config.json").read_text())
    changes = {"output_dir": str(tmp_path / "run"), "learning_rate": 10.0, "model_type": "full", "validation_prompts": None}
    changes |= {"max_train_steps": 40, "checkpointing_steps": 1}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | changes), encoding="utf-8")
    with pytest.raises(DivergedError, match=r"step \d+: loss nan, .* on the held-out clips"):
        fit(read_plan(path), Screen(quiet=True))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed"
    assert status["reason"].startswith("DivergedError")


def test_held_out_clips_are_measured_at_every_checkpoint(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in found] == [0, 2, 4]
    for line in found:
        assert math.isfinite(line["eval_alignment"])
        assert line["eval_loss"] == pytest.approx(sum(line["eval_sigma_loss"].values()) / 5, rel=1e-5)
    best = min(found[1:], key=lambda line: line["eval_loss"])  # before the first step there is no checkpoint to keep
    assert json.loads((trained / "best.json").read_text()) == {"step": best["step"], "eval_loss": best["eval_loss"]}


def test_the_best_step_can_be_asked_for(trained, config_file, tmp_path):
    best = json.loads((trained / "best.json").read_text())["step"]
    assert asked_step(trained, "best") == best
    assert asked_step(trained, "2") == 2
    assert asked_step(trained, None) is None
    with pytest.raises(UserError, match="--step last: not a step"):
        asked_step(trained, "last")
    with pytest.raises(UserError, match=r"has no best.json, as it held out no clips"):
        asked_step(tmp_path, "best")


def test_a_resume_from_an_earlier_step_forgets_what_came_later(trained, tmp_path):
    """Lines, figures, videos and adapters of abandoned steps don't mix with those that take their place."""
    root = tmp_path / "run"
    shutil.copytree(trained, root)
    config = json.loads((root / "config.json").read_text()) | {"output_dir": str(root), "checkpoints_total_limit": None}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"max_train_steps": 6}), encoding="utf-8")
    fit(read_plan(path), Screen(quiet=True))
    (root / "samples" / "figures.jsonl").open("a").write('{"step": 6, "promp')  # a kill
    path.write_text(json.dumps(config | {"max_train_steps": 5, "resume_from_checkpoint": "step-000004"}), encoding="utf-8")
    fit(read_plan(path), Screen(quiet=True))
    assert not (root / "samples" / "step-000006.mp4").exists()
    assert not (root / "adapters" / "adapter-000006.safetensors").exists()
    assert (root / "adapters" / "adapter-000006.safetensors.left").exists()
    steps = [json.loads(line)["step"] for line in (root / "samples" / "figures.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [0, 2, 4, 5]
    assert len(steps) == 2 * 4
    assert json.loads((root / "best.json").read_text())["step"] <= 5


def test_what_is_held_out_is_not_trained_on(config_file, clips):
    with pytest.raises(UserError, match=r"eval_data: .*clip-0.mp4 is in train_data too \(3 in all\)"):
        fit(read_plan(config_file(eval_data=str(clips))), Screen(quiet=True))


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


def test_a_share_is_held_out_by_content(config_file):
    whole = read_dataset(context_of(read_plan(config_file())))
    digests = {window.clip.digest for window in whole.clips.windows}
    shares = sorted(int(digest[:8], 16) / 2**32 for digest in digests)
    trained, held = read_datasets(context_of(read_plan(config_file(eval_share=(shares[0] + shares[1]) / 2))))
    assert {window.clip.digest for window in held.clips.windows} == {min(digests, key=lambda d: int(d[:8], 16))}
    assert len(trained.clips.windows) + len(held.clips.windows) == len(whole.clips.windows)
    with pytest.raises(UserError, match="none of the clips would be held out"):
        read_datasets(context_of(read_plan(config_file(eval_share=shares[0] / 2))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_data": "gone"}, "eval_data=gone: it does not exist"),
        ({"eval_data": ".", "eval_share": 0.1}, "both are set"),
        ({"eval_share": 0.7}, "eval_share=0.7"),
        ({"validation_prompts": []}, "validation_prompts"),
    ],
)
def test_wrong_values_are_reported_by_the_config(config_file, changes, message):
    with pytest.raises(UserError, match=message):
        read_plan(config_file(**changes))


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


def test_a_grid_is_labelled_and_whole(tmp_path):
    video = np.full((3, 32, 48, 3), 200, dtype=np.uint8)
    grid = grid_video([[("a", video), ("b", video)], [("c", video), ("d", video)]])
    assert grid.shape == (3, 2 * (32 + 22) + 4, 2 * 48 + 4, 3)
    assert (grid[:, 22:54, :48] == 200).all()
    assert grid[:, :22, :48].max() > 100
    write_video(tmp_path / "deep" / "grid.mp4", grid, fps=16)
    assert frames_of(tmp_path / "deep" / "grid.mp4").shape == grid.shape


def test_a_strip_shows_both_ends_and_no_frame_twice():
    frames = np.arange(9, dtype=np.uint8).repeat(400 * 800 * 3).reshape(9, 400, 800, 3)
    strip = np.array(film_strip(frames))
    assert strip.shape == (160, 6 * 320 + 5 * 4, 3)
    assert [strip[80, left + 160, 0] for left in range(0, strip.shape[1], 324)] == [0, 2, 3, 5, 6, 8]
    assert np.array(film_strip(frames[:1])).shape == (160, 320, 3)


def test_a_video_without_facts_has_none(tmp_path):
    write_video(tmp_path / "plain.mp4", np.zeros((2, 32, 32, 3), dtype=np.uint8), fps=8)
    (tmp_path / "broken.mp4").write_bytes(b"x")
    assert video_facts(tmp_path / "plain.mp4") == video_facts(tmp_path / "broken.mp4") == {}


def test_memory_is_given_back_after_a_validation(trained, tmp_path):
    """What lives in the steps behind the videos is what lived in those before them; models of the videos are gone."""
    seen = {}

    def count(event):
        if isinstance(event, StepDone):
            gc.collect()
            things = gc.get_objects()
            models = [thing for thing in things if issubclass(type(thing), (AutoencoderKLWan, Dinov2Model, WanPipeline))]
            tensors = [thing for thing in things if type(thing) in {torch.Tensor, torch.nn.Parameter}]
            sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
            seen[event.done] = ([model for model in models if id(model) not in held], sum(sizes.values()))

    gc.collect()
    held = set(map(id, gc.get_objects()))  # by other tests of this process
    config = json.loads((trained / "config.json").read_text())
    changes = {"output_dir": str(tmp_path / "run"), "max_train_steps": 6, "validation_steps": 3, "checkpointing_steps": 6}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | changes | {"eval_data": None}), encoding="utf-8")
    fit(read_plan(path), Screen(quiet=True), subscribers=[count])
    assert (tmp_path / "run" / "samples" / "step-000003.mp4").is_file()
    assert all(not models for models, _ in seen.values())
    before, after = seen[3][1], seen[5][1]  # of the third step the optimizer's state is there, and its videos are not yet made
    assert abs(after - before) < 0.01 * before
