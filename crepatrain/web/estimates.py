"""The GPU memory of a draft, estimated beside the page by a process of its own: one at a time, and only for the newest draft."""

import asyncio
import contextlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crepatrain.files import written_aside
from crepatrain.web.confinement import Folders
from crepatrain.web.drafts import as_file
from crepatrain.web.remembered import Remembered

# Seconds that a draft must stay as it is before anything is begun for it.
_PAUSE = 0.7


@dataclass(frozen=True)
class Remedy:
    """A change to the config, as (key, text) pairs, with the GiB that training needs with it."""

    changes: tuple[tuple[str, str], ...]
    peak: float

    def __str__(self) -> str:
        return ", ".join(f"{key}: {text}" for key, text in self.changes)


@dataclass(frozen=True)
class Estimated:
    """What a draft needs.

    Attributes:
        peak: GiB of the stage that needs most.
        largest: the name of that stage.
        training: GiB of training alone, which is what the remedies change.
        problem: why there is no estimate, in the command's own words.
    """

    peak: float = 0.0
    largest: str = ""
    training: float = 0.0
    remedies: tuple[Remedy, ...] = ()
    problem: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Estimated":
        """From what `dry-run --json` prints."""
        peaks = {name: stage["peak_gib"] for name, stage in values["stages"].items() if stage is not None}
        remedies = tuple(Remedy(_changes(one["change"]), one["peak_gib"]) for one in values["remedies"])
        return cls(values["peak_gib"], max(peaks, key=peaks.__getitem__), peaks["training"], remedies)


def _changes(words: str) -> tuple[tuple[str, str], ...]:
    """The (key, text) pairs of `key: text, key: text`."""
    pairs = [change.split(": ", 1) for change in words.split(", ")]
    return tuple((key, text) for key, text in pairs)


@dataclass(eq=False)
class _Job:
    """An estimate that is being made, or waits for its turn."""

    key: tuple[str, ...]
    superseded: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[Estimated | None] | None" = None


class Estimates:
    """Estimates drafts; all calls come from the server's own loop."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._turn = asyncio.Lock()
        self._job: _Job | None = None
        self._known: Remembered[Estimated] = Remembered()

    def known(self, values: Mapping[str, Any], options: Sequence[str]) -> Estimated | None:
        """What is known already."""
        return self._known.get(_key(values, options))

    async def of(self, values: Mapping[str, Any], options: Sequence[str] = ()) -> Estimated | None:
        """The estimate of a draft; ends that of any other draft.

        Args:
            options: of `dry-run`, beside those that ask for the estimate.

        Returns:
            None where a newer draft has ended this one's estimate.
        """
        key = _key(values, options)
        if self._job is None or self._job.key != key:
            self.end()
            if known := self._known.get(key):
                return known
            self._job = job = _Job(key)
            job.task = asyncio.create_task(self._work(job, dict(values), options))
        assert self._job.task is not None
        return await asyncio.shield(self._job.task)  # a page that is closed ends nothing that another one waits for

    def end(self) -> None:
        """End what is being estimated."""
        if self._job is not None:
            self._job.superseded.set()
            self._job = None

    async def _work(self, job: _Job, values: Mapping[str, Any], options: Sequence[str]) -> Estimated | None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(job.superseded.wait(), _PAUSE)
        try:
            async with self._turn:
                found = None if job.superseded.is_set() else await self._run(job, values, options)
            if found and not found.problem:
                self._known.put(job.key, found)
            return found
        finally:
            if self._job is job:  # what went wrong may go right the next time
                self._job = None

    async def _run(self, job: _Job, values: Mapping[str, Any], options: Sequence[str]) -> Estimated | None:
        config = self._folders.own / "estimate.json"
        with written_aside(config) as aside:
            aside.write_text(as_file(values), encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            *_command(config, options),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        printing, ending = asyncio.create_task(process.communicate()), asyncio.create_task(job.superseded.wait())
        try:
            await asyncio.wait({printing, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:  # the server's own end, too
            ending.cancel()
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        printed, messages = await printing
        if job.superseded.is_set():
            return None
        try:
            return Estimated.of(json.loads(printed))
        except ValueError:  # it has printed no estimate, but why there is none
            return Estimated(problem=messages.decode(errors="replace").strip() or f"it ended with code {process.returncode}")


def _key(values: Mapping[str, Any], options: Sequence[str]) -> tuple[str, ...]:
    return (as_file(values), *options)


def _command(config: Path, options: Sequence[str]) -> list[str]:
    """The estimate, behind everything else that the machine has to do."""
    nice = shutil.which("nice")
    behind = [nice, "-n", "15"] if nice else []
    return [*behind, sys.executable, "-m", "crepatrain", "dry-run", str(config), "--estimate-vram", "--json", *options]
