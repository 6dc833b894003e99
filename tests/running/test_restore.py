"""Continuing from a checkpoint: a bug that comes up meanwhile is not blamed on the checkpoint."""

import pytest
import torch

from crepatrain.commands.fit import fit
from crepatrain.config.plan import read_plan
from crepatrain.console import Screen


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), TypeError("a bug")])
def test_what_comes_up_while_a_run_is_restored_comes_out_as_itself(config_file, monkeypatch, error):
    fit(read_plan(config_file(max_train_steps=1)), Screen(quiet=True))

    def fail(_self, _state):
        raise error

    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", fail)
    with pytest.raises(type(error)) as found:
        fit(read_plan(config_file(max_train_steps=2)), Screen(quiet=True))
    assert found.value is error
