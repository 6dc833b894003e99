"""Numbers that grow over a run, and those that only seem to."""

import random

import torch

from crepatrain.console import Screen
from crepatrain.records.events import StepDone
from crepatrain.running import growth
from crepatrain.running.growth import Growth, GrowthNotes, resident_bytes


def first_found(values: list[float], window: int = 10) -> int | None:
    """The step, from 1, at which growth is said."""
    watched = Growth(window)
    return next((step for step, value in enumerate(values, start=1) if watched.observe(value)), None)


def noise(seed: int, count: int, spread: float) -> list[float]:
    source = random.Random(seed)
    return [1 + source.uniform(-spread, spread) for _ in range(count)]


def test_steady_growth_is_found_though_steps_are_noisy():
    found = first_found([(1 + step / 500) * factor for step, factor in enumerate(noise(1, 500, 0.02))])
    assert found is not None
    assert 100 < found < 200  # +20 % over the first window


def test_growth_that_begins_late_is_found():
    found = first_found([1.0] * 3000 + [1 + step / 2000 for step in range(3000)])
    assert found is not None
    assert 3400 < found < 5000


def test_slow_growth_of_a_long_run_is_found():
    assert first_found([1 + step / 10_000 for step in range(10_000)]) is not None
    found = first_found([1 + step / 100_000 for step in range(100_000)])
    assert found is not None
    assert 20_000 < found < 40_000


def test_growth_that_is_not_steady_or_not_large_is_none():
    assert first_found([1.0] * 5000) is None
    assert first_found([1 + step / 30_000 for step in range(5000)]) is None, "17 %"
    assert first_found([1 - step / 6000 for step in range(5000)]) is None, "falling"
    assert first_found([1.0] * 500 + [1.5] * 4500) is None, "one jump, as where CREPA comes back"
    assert first_found([1 + step / 200 for step in range(30)] + [1.15] * 4970) is None, "levels off"
    assert first_found([1 + 0.5 * (step // 300 % 2) for step in range(5000)]) is None, "two buckets in turn"
    assert first_found([9.0] * 10 + [1.0] * 4990) is None, "compilation"
    assert first_found([step / 10 for step in range(10)] + [1.0] * 4990) is None, "warm-up"


def test_noise_is_never_taken_for_growth():
    assert [seed for seed in range(300) if first_found(noise(seed, 2000, 0.5), window=50)] == []
    assert [seed for seed in range(300) if first_found(noise(seed, 1000, 0.2))] == []


def test_rare_slow_steps_are_no_growth():
    assert first_found([20.0 if step % 10 == 9 else 1.0 for step in range(5000)]) is None


def test_memory_of_the_watch_is_bounded():
    watched = Growth(10)
    for _ in range(100_000):
        watched.observe(1.0)
    assert len(watched._medians) <= Growth._MOST_WINDOWS
    assert watched._window > 1000


def test_each_thing_is_noted_once(capsys, monkeypatch):
    step = 0
    monkeypatch.setattr(growth, "resident_bytes", lambda: (1 << 30) * (1 + step / 300))
    notes = GrowthNotes(Screen(), torch.device("cpu"))
    for step in range(1, 1500):
        notes(StepDone(step, 1.0))
        notes(object())
    said = capsys.readouterr().out
    assert said.count("note:") == 1
    assert "this process's memory has grown steadily, from 1.2" in said
    for step in range(1500, 4000):
        notes(StepDone(step, step / 1000))
    assert "the time of a step has grown steadily" in capsys.readouterr().out


def test_memory_is_what_this_process_holds():
    before = resident_bytes()
    assert before is None or before > 10 << 20
    if before is not None:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        after = resident_bytes()
        assert after is not None
        assert after - before > (32 << 20)
        del held
