"""Drafts are estimated one at a time, the newest ends the older ones, and what was found is remembered."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from crepatrain.web import estimates as module
from crepatrain.web.confinement import Folders
from crepatrain.web.estimates import Estimated, Estimates
from crepatrain.web.remembered import Remembered

STAGES = {"training": {"peak_gib": 20.5}, "caching": {"peak_gib": 22.0}, "sampling": None}
REMEDIES = [{"change": "gradient_checkpointing: true, block_offload: 5", "peak_gib": 12.25}]
PRINTED = {"stages": STAGES, "peak_gib": 22.0, "remedies": REMEDIES}
# Stands for the command, as what matters here is when it begins and ends.
WORKS = """
import json, os, sys, time
config = json.load(open(sys.argv[1]))
open(os.path.join(sys.argv[2], f"{config['name']}-{os.getpid()}"), "w").close()
time.sleep(config["seconds"])
print(config.get("prints", ""))
print("error: it is wrong", file=sys.stderr)
"""


@pytest.fixture
def begun(tmp_path: Path, monkeypatch) -> Path:
    """A folder with a file for every process that was begun, named by its config and its id."""
    folder = tmp_path / "begun"
    folder.mkdir()
    monkeypatch.setattr(module, "_command", lambda config, _: [sys.executable, "-c", WORKS, str(config), str(folder)])
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    (tmp_path / "runs" / ".ui").mkdir(parents=True)
    return Folders(tmp_path / "runs", (tmp_path / "data",))


def draft(name: str, seconds: float = 0.0, *, printed: object = PRINTED) -> dict[str, object]:
    return {"name": name, "seconds": seconds, "prints": json.dumps(printed) if printed else ""}


def names(begun: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in begun.iterdir())


def test_a_newer_draft_ends_the_estimate_of_an_older_one(begun, folders):
    async def work() -> None:
        estimates = Estimates(folders)
        older = asyncio.create_task(estimates.of(draft("older", 60)))
        while not any(begun.iterdir()):
            await asyncio.sleep(0.05)
        newer = asyncio.create_task(estimates.of(draft("newer")))
        assert await older is None
        found = await newer
        assert found is not None
        assert found.peak == 22.0

    asyncio.run(work())
    [pid] = [int(path.name.split("-")[1]) for path in begun.glob("older-*")]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert names(begun) == ["newer", "older"]


def test_drafts_in_quick_succession_begin_one_process_and_its_numbers_are_remembered(begun, folders):
    async def work() -> None:
        estimates = Estimates(folders)
        waiting = [asyncio.create_task(estimates.of(draft(f"draft{number}"))) for number in range(5)]
        waiting.append(asyncio.create_task(estimates.of(draft("draft4"))))  # another page on the same draft
        found = await asyncio.gather(*waiting)
        assert found[:4] == [None] * 4
        assert found[4] is not None
        assert found[5] is found[4]
        assert estimates.known(draft("draft4"), ()) is found[4]
        assert await estimates.of(draft("draft4")) is found[4]

    asyncio.run(work())
    assert names(begun) == ["draft4"]


def test_a_failure_is_said_in_the_commands_words_and_tried_again(begun, folders):
    async def work() -> None:
        estimates = Estimates(folders)
        for _ in range(2):
            found = await estimates.of(draft("wrong", printed=None))
            assert found is not None
            assert found.problem == "error: it is wrong"

    asyncio.run(work())
    assert names(begun) == ["wrong", "wrong"]


def test_the_end_of_the_server_ends_the_process(begun, folders):
    async def work() -> None:
        waiting = asyncio.create_task(Estimates(folders).of(draft("left", 60)))
        while not any(begun.iterdir()):
            await asyncio.sleep(0.05)
        waiting.cancel()

    asyncio.run(work())
    [path] = begun.iterdir()
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.name.split("-")[1]), 0)


def test_the_verdict_and_the_remedies_are_read_from_what_dry_run_prints():
    from crepatrain.web.fitting import verdict

    found = Estimated.of(PRINTED)
    assert (found.largest, found.training) == ("caching", 20.5)
    assert (
        verdict(found, "a card of 24 GB", 23.6) == "Fits a card of 24 GB with 1.60 GiB left. It needs 22.00 GiB, while caching."
    )
    assert verdict(found, "a card of 16 GB", 15.8).startswith("Does not fit a card of 16 GB: 6.20 GiB too much.")
    [remedy] = found.remedies
    assert remedy.changes == (("gradient_checkpointing", "true"), ("block_offload", "5"))
    assert str(remedy) == REMEDIES[0]["change"]


def test_the_oldest_of_what_is_remembered_is_forgotten():
    remembered: Remembered[int] = Remembered()
    for number in range(1000):
        remembered.put((str(number),), number)
    kept = [number for number in range(1000) if remembered.get((str(number),)) is not None]
    assert kept == list(range(kept[0], 1000))
    assert len(kept) < 100


@pytest.mark.slow
def test_the_tiny_wan_is_estimated_and_every_remedy_is_a_change_of_its_draft(folders, values, config_file):
    from crepatrain.config.plan import read_plan

    found = asyncio.run(Estimates(folders).of(values))
    assert found is not None
    assert not found.problem
    assert found.peak >= found.training > 0
    assert found.remedies
    for remedy in found.remedies:
        read_plan(config_file(), [word for key, text in remedy.changes for word in (f"--{key}", text)])
