"""The losses of held-out clips."""

import json
import math

import pytest

from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.errors import DivergedError, UserError


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
