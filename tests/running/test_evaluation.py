"""The losses of held-out clips."""

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
from common import Listening, render_clip
from runs import Write, last_checkpoint, lines, train

from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.data.readers import batches_ahead
from crepatrain.errors import DivergedError, UserError
from crepatrain.integrity import write_manifest


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


@pytest.fixture
def first_losses(config_file, tmp_path):
    """Trains for a step; gives the held-out losses by noise level before it, when an adapter changes nothing yet."""

    def measure(name: str, *held: int, **changes: Any) -> dict[str, float]:
        folder = tmp_path / f"held-{name}"
        folder.mkdir()
        for seed in held:
            render_clip(folder / f"{seed}.mp4", seed=seed)
            (folder / f"{seed}.txt").write_text("something else\n", encoding="utf-8")
        values = {"max_train_steps": 1, "fps": 16, "crepa_enabled": False, "eval_data": str(folder)}
        run = train(config_file, **values | {"output_dir": str(tmp_path / name)} | changes)
        (line,) = [line for line in lines(run) if "eval_loss" in line and line["step"] == 0]
        return line["eval_sigma_loss"]

    return measure


def test_held_out_noise_is_that_of_eval_seed_alone(first_losses):
    """What the training draws, and how, does not matter: not its seed, its noise levels, its dropout, the order of its data."""
    expected = first_losses("expected", 77)
    assert first_losses("seed", 77, seed=7) == expected
    others = {"timestep_sampling": "uniform", "caption_dropout": 0.9, "lora_dropout": 0.5, "train_batch_size": 2}
    assert first_losses("others", 77, **others) == expected
    assert first_losses("eval-seed", 77, eval_seed=43) != expected


def test_dropped_first_frames_of_the_training_are_given_to_held_out_clips(first_losses, tiny_checkpoint):
    model = {"pretrained_model_name_or_path": str(tiny_checkpoint("wan", "tiny-i2v")), "task": "i2v"}
    expected = first_losses("given", 77, **model)
    assert first_losses("dropped", 77, i2v_dropout=1.0, seed=7, **model) == expected


def test_held_out_noise_does_not_depend_on_what_else_is_held_out(first_losses):
    """Each clip has two windows, so the mean over both clips is the mean of their means."""
    one, other, both = first_losses("one", 77), first_losses("other", 78), first_losses("both", 78, 77)
    assert both == {sigma: pytest.approx((one[sigma] + other[sigma]) / 2, rel=1e-5) for sigma in one}


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


# Resumes


def test_a_run_does_not_go_on_with_another_eval_seed(config_file):
    train(config_file, max_train_steps=1, eval_share=0.3)
    with pytest.raises(UserError, match=r"holds a different run \(eval_seed: 42 there, 7 here\)"):
        train(config_file, max_train_steps=2, eval_share=0.3, eval_seed=7)


def as_earlier_version(run: Path, **changes: Any) -> None:
    """The run's folder as a version wrote it that knew no eval_seed."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "eval_seed"}), encoding="utf-8")
    file = last_checkpoint(run) / "fingerprint.json"
    fingerprint = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in fingerprint.items() if k != "held_out"}), encoding="utf-8")
    write_manifest(file.parent)


def continued(config_file: Write, **changes: Any) -> list[str]:
    """The notes about held-out clips of a run that goes on."""
    screen = Listening()
    fit(read_plan(config_file(**changes)), screen)
    return [note for note in screen.notes if "best.json" in note]


def held_out_folder(root: Path, seed: int) -> str:
    root.mkdir()
    render_clip(root / "clip.mp4", seed=seed)
    (root / "clip.txt").write_text("something else\n", encoding="utf-8")
    return str(root)


def test_a_run_of_an_earlier_version_goes_on_with_other_noise_and_says_so(config_file, tmp_path):
    held = held_out_folder(tmp_path / "held", 77)
    as_earlier_version(train(config_file, max_train_steps=1, eval_data=held))
    (note,) = continued(config_file, max_train_steps=2, eval_data=held)
    assert note.startswith("the noise on held-out clips is that of eval_seed=42 from here on")
    assert continued(config_file, max_train_steps=3, eval_data=held) == []


def test_other_held_out_clips_are_reported(config_file, tmp_path):
    held, other = (held_out_folder(tmp_path / name, seed) for name, seed in (("held", 77), ("other", 78)))
    train(config_file, max_train_steps=1, eval_data=held)
    (note,) = continued(config_file, max_train_steps=2, eval_data=other)
    assert note.startswith("the held-out clips changed since this run's checkpoint")
    assert continued(config_file, max_train_steps=3) == []
    assert continued(config_file, max_train_steps=4, eval_data=held) == []


def test_a_run_of_an_earlier_version_that_held_out_other_clips_is_refused_in_plain_words(config_file):
    run = train(config_file, max_train_steps=1, eval_share=0.3)
    as_earlier_version(run, samples="of other clips")
    with pytest.raises(UserError, match=r"eval_share=0.3: the clips that are trained on are not those of this run's checkpoint"):
        train(config_file, max_train_steps=2, eval_share=0.3)


def test_a_run_of_an_earlier_version_that_held_out_the_same_clips_goes_on(config_file):
    as_earlier_version(train(config_file, max_train_steps=1, eval_share=0.3))
    assert len(continued(config_file, max_train_steps=2, eval_share=0.3)) == 1


@pytest.mark.parametrize("pin", [True, False])
def test_held_out_batches_are_read_and_pinned_while_the_one_before_is_measured(pin: bool):
    read = [threading.Event() for _ in range(3)]

    class Numbered:
        def __init__(self, number: int) -> None:
            self.number, self.pinned = number, False

        def pin_memory(self) -> "Numbered":
            self.pinned = True
            return self

    def batches():
        for number, event in enumerate(read):
            event.set()
            yield Numbered(number)

    found = []
    for batch in batches_ahead(batches(), pin_memory=pin):  # type: ignore[arg-type]
        if batch.number < 2:
            assert read[batch.number + 1].wait(10), "the next one is read before this one is done with"
        found.append((batch.number, batch.pinned))
    assert found == [(number, pin) for number in range(3)]


def test_what_fails_while_a_batch_is_read_ahead_arrives():
    def batches():
        raise UserError("a clip is gone", "put it back")
        yield

    with pytest.raises(UserError, match="a clip is gone"):
        list(batches_ahead(batches(), pin_memory=False))
