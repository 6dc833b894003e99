import inspect
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crepatrain.alignment.schedule import CrepaSchedule
from crepatrain.config.alignment_sections import CrepaConfig

SCHEDULERS = ["constant", "linear", "cosine", "polynomial"]


def schedule(**options):
    return CrepaSchedule(**{"max_train_steps": 1000} | options)


def literal(step, name, peak, end, warmup, decay, power):
    if step < warmup:
        return peak * step / warmup
    p = min((step - warmup) / decay, 1)
    return {
        "constant": peak,
        "linear": peak + (end - peak) * p,
        "cosine": end + (peak - end) * (1 + math.cos(math.pi * p)) / 2,
        "polynomial": end + (peak - end) * (1 - p) ** power,
    }[name]


@pytest.mark.parametrize("name", SCHEDULERS)
@given(
    step=st.integers(0, 3000),
    peak=st.floats(0, 5),
    end=st.floats(0, 5),
    warmup=st.integers(0, 200),
    decay=st.integers(1, 2000),
    power=st.floats(0.25, 4),
)
def test_weight_is_the_formula(name, step, peak, end, warmup, decay, power):
    made = schedule(weight=peak, scheduler=name, lambda_end=end, warmup_steps=warmup, decay_steps=decay, power=power)
    assert made.weight(step) == pytest.approx(literal(step, name, peak, end, warmup, decay, power), abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_the_decay_counts_from_the_end_of_the_warmup(name):
    made = schedule(weight=0.5, scheduler=name, warmup_steps=100, decay_steps=5000, lambda_end=0.0, max_train_steps=9000)
    assert made.weight(0) == 0
    assert made.weight(50) == 0.25
    assert made.weight(100) == 0.5
    assert made.weight(2600) == pytest.approx(0.25)
    assert made.weight(5099) > 0
    assert made.weight(5100) == made.weight(8999) == 0


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_no_decay_steps_means_the_rest_of_the_run(name):
    made = schedule(weight=0.5, scheduler=name, warmup_steps=100, lambda_end=0.1, max_train_steps=1100)
    for step in (100, 300, 777, 1099):
        assert made.weight(step) == pytest.approx(literal(step, name, 0.5, 0.1, 100, 1000, 1.0))
    assert made.weight(1099) > 0.1
    assert made.weight(1100) == pytest.approx(0.1)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_warmup_longer_than_the_run(name):
    made = schedule(weight=0.5, scheduler=name, warmup_steps=100, max_train_steps=50)
    assert made.weight(49) == pytest.approx(0.245)
    assert made.weight(100) == 0.5


def test_cutoff_step():
    made = schedule(weight=0.5, cutoff_step=200)
    assert made.weight(199) == 0.5
    assert made.weight(200) == made.weight(999) == 0
    assert schedule(weight=0.5, cutoff_step=0).weight(999) == 0.5
    assert not made.needs_score(200)
    assert made.is_over(200)
    assert not made.is_over(199)


def test_the_first_score_seeds_the_ema():
    made = schedule(similarity_ema_decay=0.9)
    assert made.ema is None
    made.observe(0.8)
    assert made.ema == 0.8
    made.observe(0.3)
    assert made.ema == pytest.approx(0.9 * 0.8 + 0.1 * 0.3)


def test_a_permanent_cutoff_latches():
    made = schedule(weight=0.5, similarity_threshold=0.85, similarity_ema_decay=0.5)
    made.observe(0.849)
    assert (made.cutoff, made.weight(5)) == (False, 0.5)
    made.observe(0.851)
    assert made.ema == pytest.approx(0.85)
    made.observe(0.9)
    assert (made.cutoff, made.weight(6), made.is_over(6), made.needs_score(10)) == (True, 0, True, False)
    made.observe(-1.0)
    assert made.ema < 0.85
    assert (made.cutoff, made.weight(7)) == (True, 0)


def test_the_threshold_itself_cuts_off():
    made = schedule(similarity_threshold=0.85)
    made.observe(0.85)
    assert made.cutoff


def test_a_recoverable_cutoff_comes_back():
    made = schedule(weight=0.5, similarity_threshold=0.8, similarity_ema_decay=0.5, threshold_mode="recoverable")
    made.observe(0.9)
    assert (made.cutoff, made.weight(5), made.is_over(5)) == (True, 0, False)
    made.observe(0.5)
    assert made.ema == pytest.approx(0.7)
    assert (made.cutoff, made.weight(6)) == (False, 0.5)
    made.observe(1.1)
    assert (made.cutoff, made.weight(7)) == (True, 0)


def test_no_threshold_no_cutoff():
    made = schedule(weight=0.5)
    made.observe(2.0)
    assert (made.cutoff, made.weight(5)) == (False, 0.5)


def test_scores_are_needed_where_there_is_a_weight():
    made = schedule(weight=0.5, warmup_steps=10, scheduler="linear", decay_steps=10)
    assert [step for step in range(30) if made.needs_score(step)] == list(range(1, 20))


def test_a_recoverable_cutoff_probes():
    made = schedule(weight=0.5, similarity_threshold=0.8, threshold_mode="recoverable", probe_interval=7, cutoff_step=30)
    assert all(made.needs_score(step) for step in range(30))
    made.observe(0.9)
    assert [step for step in range(60) if made.needs_score(step)] == [0, 7, 14, 21, 28]
    assert all(made.weight(step) == 0 for step in range(60))


def test_no_probe_where_nothing_could_come_back():
    made = schedule(
        weight=0.5, scheduler="linear", decay_steps=20, similarity_threshold=0.8, threshold_mode="recoverable", probe_interval=5
    )
    made.observe(0.9)
    assert [step for step in range(60) if made.needs_score(step)] == [0, 5, 10, 15]
    assert made.is_over(20)


@pytest.mark.parametrize("mode", ["permanent", "recoverable"])
def test_queries_change_nothing(mode):
    made = schedule(weight=0.5, scheduler="cosine", similarity_threshold=0.8, threshold_mode=mode, cutoff_step=50)
    for score in (None, 0.5, 0.95, 0.1):
        if score is not None:
            made.observe(score)
        before = dict(vars(made))
        first = [(made.weight(s), made.needs_score(s), made.is_off(s), made.is_over(s), made.cutoff) for s in range(100)]
        second = [
            (made.weight(s), made.needs_score(s), made.is_off(s), made.is_over(s), made.cutoff) for s in reversed(range(100))
        ]
        assert first == second[::-1]
        assert vars(made) == before


@pytest.mark.parametrize("mode", ["permanent", "recoverable"])
def test_a_resumed_run_stays_as_it_was(mode):
    options = {"weight": 0.5, "similarity_threshold": 0.8, "similarity_ema_decay": 0.5, "threshold_mode": mode}
    made = schedule(**options)
    made.observe(0.9)
    made.observe(0.5)  # below the threshold again: only a latch can keep it off
    resumed = schedule(**options)
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert (resumed.ema, resumed.cutoff) == (made.ema, made.cutoff) == (0.7, mode == "permanent")
    assert [resumed.weight(step) for step in range(20)] == [made.weight(step) for step in range(20)]
    for each in (made, resumed):
        each.observe(0.85)
    assert resumed.ema == made.ema


def test_a_fresh_state_survives_json():
    resumed = schedule()
    resumed.load_state_dict(json.loads(json.dumps(schedule().state_dict())))
    assert resumed.ema is None
    assert not resumed.cutoff


def test_it_is_over_where_nothing_can_weigh_again():
    assert schedule(weight=0.0).is_over(0)
    assert not schedule(weight=0.5).is_over(10**6)
    assert not schedule(weight=0.5, scheduler="cosine", lambda_end=0.1).is_over(10**6)
    assert schedule(weight=0.5, scheduler="cosine").is_over(1000)
    assert not schedule(weight=0.5, scheduler="cosine").is_over(999)


def test_defaults_are_the_configs():
    keys = {"weight": "crepa_lambda"}
    parameters = inspect.signature(CrepaSchedule).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}
    assert {parameter.name for parameter in parameters} - set(defaults) == {"max_train_steps"}
    assert defaults == {name: CrepaConfig.model_fields[keys.get(name, f"crepa_{name}")].default for name in defaults}
