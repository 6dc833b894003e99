"""A problem carries the keys that it is about: what follows from a wrong value is hidden by them, whatever its words are."""

import pytest

from crepatrain.config import checks
from crepatrain.config.plan import read_plan
from crepatrain.errors import Problem, UserError


def problems(path, *options: str) -> list[Problem]:
    with pytest.raises(UserError) as caught:
        read_plan(path, options, online=False)
    return caught.value.problems


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"num_frames": 50}, ("num_frames",)),
        ({"width": 100}, ("width",)),
        ({"num_train_epochs": 2}, ("max_train_steps", "num_train_epochs")),
        ({"crepa_feature_source": "backbone"}, ("crepa_teacher_block_index", "crepa_feature_source")),
        ({"layersync_enabled": True, "layersync_student_block": 4, "layersync_teacher_block": 4}, None),
        ({"pretrained_model_name_or_path": "/nowhere"}, ("pretrained_model_name_or_path",)),
        ({"crepa_encoder": "resnet"}, ("crepa_encoder",)),
        ({"seed": "x"}, ("seed",)),
        ({"sed": 1}, ("sed",)),
        ({"eval_data": "/nowhere", "eval_share": 0.5}, ("eval_data", "eval_share")),
    ],
)
def test_a_problem_carries_its_keys(config_file, changes, keys):
    [problem] = problems(config_file(**changes))
    assert problem.keys == (keys or ("layersync_teacher_block", "layersync_student_block"))


def test_what_follows_from_a_wrong_value_is_hidden_by_its_key_not_by_its_words(config_file, monkeypatch):
    words = Problem("seed=7: these words name a key that they are not about", "read them", ("height",))
    about = Problem("these words name no key", "read them", ("seed",))
    monkeypatch.setattr(checks, "check_length", lambda _config: [words, about])
    found = problems(config_file(seed="x"))
    assert [problem.keys for problem in found] == [("seed",), ("height",)]
    assert words in found
