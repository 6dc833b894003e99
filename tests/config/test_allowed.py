"""allow_changes: what it may name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from crepatrain.config.load import parse_options
from crepatrain.config.plan import read_plan
from crepatrain.config.run_config import ALLOWABLE, KEYS
from crepatrain.errors import UserError

# What a checkpoint's tensors and states are shaped by, or mean.
_FIXED = ("lora_rank", "lora_alpha", "model_type", "optimizer", "adam_beta1", "use_ema", "crepa_enabled", "seed", "height", "fps")


def test_a_key_that_a_checkpoint_depends_on_is_refused_with_those_that_may_change(config_file: Callable[..., Path]):
    for key in _FIXED:
        assert key not in ALLOWABLE
        with pytest.raises(UserError) as error:
            read_plan(config_file(allow_changes=["learning_rate", key]))
        (problem,) = error.value.problems
        assert problem.what == f"allow_changes: {key} can't change within a run, as its checkpoints depend on it"
        assert all(other in problem.fix for other in ALLOWABLE)


def test_what_may_change_anyway_does_no_harm(config_file: Callable[..., Path]):
    read_plan(config_file(allow_changes=[*ALLOWABLE, "logging_steps"]))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("learning_rat", "did you mean learning_rate?"),
        ("x", "leave it out; it takes adam_weight_decay, "),
        ("gradient_accumulation_steps", "needs no allowance where the samples of a step stay the same"),
    ],
)
def test_other_names_have_their_own_answers(config_file: Callable[..., Path], key: str, words: str):
    with pytest.raises(UserError) as error:
        read_plan(config_file(allow_changes=[key]))
    assert words in str(error.value)


def test_the_option_takes_names_with_commas():
    assert parse_options(["--allow_changes", "learning_rate,train_data"], []) == {
        "allow_changes": ["learning_rate", "train_data"]
    }
    assert parse_options(["--allow_changes", "learning_rate"], []) == {"allow_changes": ["learning_rate"]}


def test_every_allowable_key_is_one():
    assert KEYS.keys() >= set(ALLOWABLE)
