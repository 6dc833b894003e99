"""Work that may never end is left behind; work that shows signs of life is waited for."""

import subprocess
import sys
import textwrap
import threading
import time

import pytest

from crepatrain.data.watched import GivenUp, Watched, read_ahead


def test_a_result_or_an_error_is_handed_on():
    assert Watched(lambda beat: "done").result(patience=5) == "done"

    def fail(beat):
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        Watched(fail).result(patience=5)


def test_silence_is_given_up_and_the_work_ends_at_its_next_sign_of_life():
    go_on, ended = threading.Event(), threading.Event()

    def silent(beat):
        try:
            go_on.wait()
            beat()
        finally:
            ended.set()

    watched = Watched(silent)
    with pytest.raises(GivenUp):
        watched.result(patience=0.1)
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(5)


def test_slow_work_with_signs_of_life_is_waited_for():
    def slow(beat):
        for _ in range(20):
            time.sleep(0.05)
            beat()
        return "done"

    assert Watched(slow).result(patience=0.5) == "done"


def test_items_come_in_their_order_and_few_are_done_ahead():
    begun = []

    def work(item, beat):
        begun.append(item)
        time.sleep(0.02 if item % 2 else 0)
        return item * 10

    results = []
    for item, watched in read_ahead(work, range(9), at_once=3):
        results.append((item, watched.result(5)))
        assert max(begun) <= item + 2
    assert results == [(item, item * 10) for item in range(9)]


def test_one_that_hangs_does_not_hold_up_the_others():
    stuck = threading.Event()

    def work(item, beat):
        if item == 1:
            stuck.wait()
        return item

    given = []
    for item, watched in read_ahead(work, range(5), at_once=2):
        try:
            given.append(watched.result(0.2))
        except GivenUp:
            given.append(f"{item} given up")
    stuck.set()
    assert given == [0, "1 given up", 2, 3, 4]


def test_what_was_begun_ahead_ends_when_nobody_asks_any_more():
    ended = []

    def work(item, beat):
        try:
            while True:
                time.sleep(0.01)
                beat()
        finally:
            ended.append(item)

    ahead = read_ahead(work, range(5), at_once=3)
    next(ahead)
    ahead.close()
    for _ in range(500):
        if len(ended) == 3:
            break
        time.sleep(0.01)
    assert sorted(ended) == [0, 1, 2]


def test_the_process_ends_well_while_torch_works():
    script = """
        import threading
        import torch
        from crepatrain.data.watched import Watched

        begun = threading.Event()

        def work(beat):
            while True:
                for _ in range(50):
                    torch.nn.functional.interpolate(torch.rand(1, 3, 256, 256), size=(99, 99), mode="bicubic", antialias=True)
                beat()
                begun.set()

        for _ in range(3):
            Watched(work)
        begun.wait()
        raise SystemExit(3)
        """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (3, "")
