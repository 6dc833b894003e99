"""Where a run stands, in five lines, from its files alone."""

from pathlib import Path

from crepatrain.records.reading import read_run
from crepatrain.records.standing import standing
from crepatrain.screen import Screen


def status(root: Path, screen: Screen) -> None:
    """Print where a run stands.

    Raises:
        UserError: the folder holds no run, or a damaged one.
    """
    for topic, words in standing(read_run(root)):
        screen.say(f"{topic:<12}{words.encode(errors='replace').decode()}")  # paths may hold bytes that are no text
