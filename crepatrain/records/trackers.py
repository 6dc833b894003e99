"""TensorBoard and Weights & Biases as subscribers to what happens in a run; metrics.jsonl stays the source of what they show."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import WandBTracker

from crepatrain.config.resolved import ResolvedConfig
from crepatrain.data.encode import as_jpeg, film_strip
from crepatrain.errors import UserError
from crepatrain.records.event_files import EventFile
from crepatrain.records.events import Logged, Subscriber, VideosMade
from crepatrain.records.layout import RunLayout
from crepatrain.records.runfolder import RunFolder

# The heading over a line's numbers, by the beginning or the end of their name; for the rest it is train.
_GROUPS = (("crepa_seconds", "time"), ("crepa_", "crepa"), ("eval_", "eval"), ("sigma_loss", "sigma_loss"), ("_seconds", "time"))


class TensorBoard:
    """Event files in the run's folder, always of the same steps as metrics.jsonl.

    Args:
        step: where this part of the run begins.

    Raises:
        UserError: they can't be written, here and when it is called.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder
        with self._writable():
            self._events = EventFile(folder, step)

    def __call__(self, event: object) -> None:
        with self._writable():
            if isinstance(event, Logged):
                self._events.add(event.line["step"], scalars(event.line))
            elif isinstance(event, VideosMade):
                # A few frames of each: its pages play no video, and a GIF's few colours flicker by themselves.
                strips = {f"samples/{prompt}": film_strip(frames) for prompt, frames in event.videos.items()}
                self._events.show(event.step, {tag: (as_jpeg(strip), strip.size) for tag, strip in strips.items()})

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

    def __init__(self, config: ResolvedConfig, layout: RunLayout) -> None:
        from wandb.errors import Error  # pyright: ignore[reportMissingImports] - check_trackers has made sure of it

        known, root = layout.wandb_id_file, layout.root
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

    def __call__(self, event: object) -> None:
        if isinstance(event, Logged):
            self._tracker.log(scalars(event.line), step=event.line["step"])
        elif isinstance(event, VideosMade):
            import wandb  # pyright: ignore[reportMissingImports]

            self._tracker.log({"samples": wandb.Video(str(event.file), format="mp4")}, step=event.step)

    def close(self) -> None:
        self._tracker.finish()


@contextmanager
def tracking(folder: RunFolder, step: int) -> Iterator[list[Subscriber]]:
    """The subscribers that copy what is logged to the places of `report_to`; none in a process that does not write.

    Args:
        step: where this part of the run begins.
    """
    trackers: list[TensorBoard | WandB] = []
    try:
        if folder.writes and "tensorboard" in folder.config.loop.report_to:
            trackers.append(TensorBoard(folder.tensorboard, step))
        if folder.writes and "wandb" in folder.config.loop.report_to:
            trackers.append(WandB(folder.config, folder))
        yield [*trackers]
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
