"""Where logged lines go beside metrics.jsonl, which stays their source."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import WandBTracker

from crepatrain.config.sections import RunConfig
from crepatrain.data.encode import as_jpeg, film_strip
from crepatrain.errors import UserError
from crepatrain.records.event_files import EventFile
from crepatrain.records.events import Logged, Subscriber, VideosMade
from crepatrain.records.runfolder import RunFolder

# What a line's numbers are shown under, by the beginning or the end of their name; the rest under train.
_GROUPS = (("crepa_seconds", "time"), ("crepa_", "crepa"), ("eval_", "eval"), ("sigma_loss", "sigma_loss"), ("_seconds", "time"))


class TensorBoard:
    """Event files in the run's folder, always of the same steps as metrics.jsonl.

    Args:
        step: where this part of the run begins.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder
        with self._writable():
            self._events = EventFile(folder, step)

    def log(self, line: Mapping[str, Any]) -> None:
        with self._writable():
            self._events.add(line["step"], scalars(line))

    def show(self, step: int, videos: Mapping[str, np.ndarray], file: Path) -> None:  # noqa: ARG002
        """A few frames of each: its pages play no video, and a GIF's few colours flicker by themselves."""
        strips = {f"samples/{prompt}": film_strip(frames) for prompt, frames in videos.items()}
        with self._writable():
            self._events.show(step, {tag: (as_jpeg(strip), strip.size) for tag, strip in strips.items()})

    def close(self) -> None:
        self._events.close()

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._folder} can't be written ({error})", "free disk space, or set report_to to []") from error


class WandB:
    """Weights & Biases, through accelerate. A run that goes on is the same run there; steps that it knows already it drops."""

    def __init__(self, config: RunConfig, root: Path) -> None:
        from wandb.errors import Error  # pyright: ignore[reportMissingImports] - check_trackers has looked for it

        known = root / "wandb-id.txt"
        same = {"id": known.read_text(encoding="utf-8").strip(), "resume": "allow"} if known.is_file() else {}
        try:
            self._tracker = WandBTracker("crepatrain", name=root.resolve().name, dir=str(root), **same)
            self._tracker.start()
        except Error as error:
            raise UserError(
                f"report_to: wandb can't begin ({error})", "run wandb login, set WANDB_MODE=offline, or leave it out"
            ) from error
        self._tracker.store_init_configuration(config.model_dump())
        known.write_text(self._tracker.run.id, encoding="utf-8")

    def log(self, line: Mapping[str, Any]) -> None:
        self._tracker.log(scalars(line), step=line["step"])

    def show(self, step: int, videos: Mapping[str, np.ndarray], file: Path) -> None:  # noqa: ARG002
        import wandb  # pyright: ignore[reportMissingImports]

        self._tracker.log({"samples": wandb.Video(str(file), format="mp4")}, step=step)

    def close(self) -> None:
        self._tracker.finish()


class _Tracker:
    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker

    def __call__(self, event: object) -> None:
        match event:
            case Logged(line):
                self._tracker.log(line)
            case VideosMade(step, videos, file):
                self._tracker.show(step, videos, file)


@contextmanager
def tracking(folder: RunFolder, config: RunConfig, step: int) -> Iterator[list[Subscriber]]:
    """Within the context what is logged in the folder goes to the places of `report_to` too.

    Args:
        step: where this part of the run begins.
    """
    trackers: list[Any] = []
    try:
        if folder.writes and "tensorboard" in config.report_to:
            trackers.append(TensorBoard(folder.root / "tensorboard", step))
        if folder.writes and "wandb" in config.report_to:
            trackers.append(WandB(config, folder.root))
        yield [_Tracker(tracker) for tracker in trackers]
    finally:
        for tracker in trackers:
            tracker.close()


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a logged line as group/name, without what was not measured."""
    flat = {name: value for name, value in line.items() if not isinstance(value, Mapping)}
    for name, values in line.items():
        if isinstance(values, Mapping):
            flat |= {f"{name}/{part}": value for part, value in values.items()}
    named = {name if "/" in name else f"{_group(name)}/{name}": value for name, value in flat.items() if name != "step"}
    return {name: float(value) for name, value in named.items() if value is not None}


def _group(name: str) -> str:
    return next((group for part, group in _GROUPS if name.startswith(part) or name.endswith(part)), "train")
