"""The average of the trained weights: its recurrence, its place in a run, and what is handed out of it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from crepatrain.commands.export import export
from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen
from crepatrain.errors import UserError
from crepatrain.records.layout import checkpoints
from crepatrain.training.ema import WeightAverage


def test_it_follows_the_literal_recurrence_and_changes_no_weight():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, dtype=torch.bfloat16))]
    average, literal = WeightAverage(parameters, 0.9), [p.detach().float().clone() for p in parameters]
    for _ in range(5):
        for parameter in parameters:
            parameter.data += torch.randn_like(parameter)
        average.update()
        literal = [0.9 * old + 0.1 * p.detach().float() for old, p in zip(literal, parameters, strict=True)]
    before = [p.detach().clone() for p in parameters]
    with average.in_place():
        torch.testing.assert_close(parameters[0].detach(), literal[0])
        assert torch.equal(parameters[1].detach(), literal[1].bfloat16())
    assert all(torch.equal(p.detach(), old) for p, old in zip(parameters, before, strict=True))


RUN = {"learning_rate": 0.02, "max_train_steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": None}


def numbers(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(json.loads(line)["loss"], json.loads(line)["grad_norm"]) for line in lines]


def test_a_run_hands_out_its_average_and_trains_the_same(config_file, tmp_path):
    for name, changes in {"plain": {}, "ema": {"use_ema": True, "ema_decay": 0.5}}.items():
        fit(read_plan(config_file(**RUN, **changes, output_dir=str(tmp_path / name))), Screen(quiet=True))
    assert numbers(tmp_path / "plain") == numbers(tmp_path / "ema")
    file = "pytorch_lora_weights.safetensors"
    plain, averaged = load_file(tmp_path / "plain" / file), load_file(tmp_path / "ema" / file)
    assert any(not torch.equal(plain[name], averaged[name]) for name in plain)

    def exported(weights):
        output = tmp_path / f"{weights}.safetensors"
        export(tmp_path / "ema", None, None, output, Screen(quiet=True), weights=weights)
        return load_file(output)

    assert all(torch.equal(tensor, averaged[name]) for name, tensor in exported(None).items())
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in exported("ema").items())
    assert all(torch.equal(tensor, plain[name]) for name, tensor in exported("raw").items())
    with pytest.raises(UserError, match=r"--weights ema: .* kept no average"):
        export(tmp_path / "plain", None, None, None, Screen(quiet=True), weights="ema")


@pytest.mark.parametrize("model_type", ["lora", "full"])
def test_an_average_goes_on_where_it_stopped(config_file, tmp_path, model_type):
    changes = {"use_ema": True, "ema_decay": 0.7, "model_type": model_type}
    fit(read_plan(config_file(**RUN, **changes, output_dir=str(tmp_path / "whole"))), Screen(quiet=True))
    for steps in (2, 4):
        path = config_file(**RUN | {"max_train_steps": steps}, **changes, output_dir=str(tmp_path / "parts"))
        fit(read_plan(path), Screen(quiet=True))
    whole, parts = (load_file(checkpoints(tmp_path / run / "checkpoints")[-1] / "ema.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
