"""Commands that the page starts, each a process of its own that outlives the page, and how a run is stopped."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crepatrain.errors import UserError
from crepatrain.files import written_aside
from crepatrain.records.layout import RunLayout
from crepatrain.records.signs import holder_of, is_locked
from crepatrain.web.confinement import Folders
from crepatrain.web.drafts import as_file

# Of a log, what is shown of its end.
_TAIL_BYTES = 64 << 10
# Of a command whose words are waited for.
_LONGEST_SECONDS = 3600


class Processes:
    """The runs that this page has started, and those that others have.

    Args:
        folders: a run's config and log are written into the page's own folder there.
    """

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._lock = threading.Lock()
        self._started: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, output_dir: Path, values: Mapping[str, Any]) -> None:
        """Train a config in a process of its own.

        Args:
            values: of the config; its output_dir is the run's folder.

        Raises:
            UserError: a run is under way in the folder.
        """
        with self._lock:
            self._expect_free(output_dir)
            self._begin(output_dir, [str(self.save(output_dir, values))])

    def config_file(self, output_dir: Path) -> Path:
        """Where the config of a run is written that is started from the page."""
        return self._own(output_dir) / "config.json"

    def save(self, output_dir: Path, values: Mapping[str, Any]) -> Path:
        """Write the config of a run; gives the file."""
        config = self.config_file(output_dir)
        with written_aside(config) as aside:
            aside.write_text(as_file(values), encoding="utf-8")
        return config

    def go_on(self, output_dir: Path, max_train_steps: int | None = None) -> None:
        """Continue a run, to another length where one is given.

        Raises:
            UserError: a run is under way in the folder, or nothing says how it was started.
        """
        written, own = RunLayout(output_dir).config_file, self.config_file(output_dir)
        config = next((path for path in (written, own) if path.is_file()), None)
        if config is None:
            raise UserError(f"{output_dir}: it holds no config.json", "start it from the page of a new run")
        length = [] if max_train_steps is None else ["--max_train_steps", str(max_train_steps)]
        with self._lock:
            self._expect_free(output_dir)
            # The folder may have been moved since its config was written.
            self._begin(output_dir, [str(config), "--output_dir", str(output_dir), *length])

    def stop(self, output_dir: Path) -> None:
        """Ask a run to stop, as Ctrl-C does: it finishes its step and saves it.

        Raises:
            UserError: no process of this machine is at work in the folder.
        """
        with self._lock:
            ours = self._started.get(_key(output_dir))
            if ours is not None and ours.poll() is None:
                ours.send_signal(signal.SIGTERM)
                return
        pid = holder_of(RunLayout(output_dir).lock_file)
        if pid is None:
            raise UserError(f"{output_dir}: no process of this machine and user is at work in it", "stop it where it was started")
        try:
            os.kill(pid, signal.SIGTERM)
        except OSError as error:
            raise UserError(f"process {pid} can't be stopped ({error})", "stop it where it was started") from error

    def is_at_work(self, output_dir: Path) -> bool:
        """Whether a process is at work in a run's folder, as far as is known."""
        ours = self._started.get(_key(output_dir))
        return (ours is not None and ours.poll() is None) or bool(is_locked(RunLayout(output_dir).lock_file))

    def log(self, output_dir: Path) -> str:
        """The end of what a run has printed; empty where it was not started from the page."""
        path = self._own(output_dir) / "log.txt"
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
            return file.read().decode(errors="replace")

    def pending(self) -> list[str]:
        """The runs that the page has started and that have not made their folder, by their names."""
        found = []
        for path in sorted(self._folders.own.glob("runs/**/config.json")):
            name = path.parent.relative_to(self._folders.own / "runs").as_posix()
            if not RunLayout(self._folders.runs / name).config_file.is_file():
                found.append(name)
        return found

    def _own(self, output_dir: Path) -> Path:
        """The page's folder for a run: the run's own must be empty when it begins."""
        return self._folders.own / "runs" / output_dir.resolve().relative_to(self._folders.runs.resolve())  # checked before

    def _expect_free(self, output_dir: Path) -> None:
        if self.is_at_work(output_dir):
            raise UserError(f"{output_dir}: a run is under way in it already", "stop it first, or give a new output_dir")

    def _begin(self, output_dir: Path, arguments: Sequence[str]) -> None:
        log = self._own(output_dir) / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._started[_key(output_dir)] = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "crepatrain", "fit", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # neither the terminal's Ctrl-C nor its end reaches it
            )


def _key(output_dir: Path) -> Path:
    return output_dir.resolve()


@dataclass(frozen=True)
class Printed:
    """What a command has printed, messages included, and the code with which it ended."""

    text: str
    code: int


def dry_run(folders: Folders, values: Mapping[str, Any], options: Sequence[str]) -> Printed:
    """What `crepatrain dry-run` prints for a config, with the problems that it finds.

    Raises:
        UserError: it takes too long.
    """
    config = folders.own / f"dry-run-{threading.get_ident()}.json"
    with written_aside(config) as aside:
        aside.write_text(as_file(values), encoding="utf-8")
    try:
        return printed_by(["dry-run", str(config), *options])
    finally:
        with contextlib.suppress(OSError):
            config.unlink()


def printed_by(arguments: Sequence[str]) -> Printed:
    """Run a command to its end.

    Raises:
        UserError: it takes too long.
    """
    try:
        done = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-m", "crepatrain", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_LONGEST_SECONDS,
            check=False,
            env={**os.environ, "COLUMNS": "110"},
        )
    except subprocess.TimeoutExpired as error:
        what = f"crepatrain {arguments[0]} took more than {_LONGEST_SECONDS} seconds"
        raise UserError(what, "run it in a terminal") from error
    return Printed(done.stdout.decode(errors="replace"), done.returncode)
