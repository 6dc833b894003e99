"""Opening the page, where the packages that it needs are installed."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from crepatrain.errors import UserError
from crepatrain.screen import Screen


def open_page(port: int, host: str | None, runs: Path, data: Sequence[Path], screen: Screen) -> None:
    """Serve the page until a signal ends it; the arguments are those of `serve`.

    Raises:
        UserError: the extra is not installed, the port is taken, or the folder of runs can't be made.
    """
    if importlib.util.find_spec("nicegui") is None:
        raise UserError("the page needs nicegui, which is not installed", 'run pip install -c constraints.txt -e ".[ui]"')
    from crepatrain.web.server import serve

    serve(port, host, runs, data, screen)
