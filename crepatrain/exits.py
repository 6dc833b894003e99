"""How a command ends: its exit code, and a message rather than a traceback where the user can do something about it."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from crepatrain.errors import DivergedError, UserError, disk_problem
from crepatrain.screen import Screen

EXIT_USER_ERROR, EXIT_STOPPED, EXIT_DIVERGED, EXIT_DOES_NOT_FIT = 2, 3, 4, 5


@contextmanager
def exit_codes(screen: Screen) -> Iterator[None]:
    """Within it a command runs; what goes wrong becomes its exit code."""
    try:
        yield
    except (UserError, DivergedError) as error:
        # Another process of the same run says it, or one of the same command on this machine.
        if not error.reported and os.environ.get("LOCAL_RANK", "0") == "0":
            screen.problems(error.problems)
        sys.exit(EXIT_DIVERGED if isinstance(error, DivergedError) else EXIT_USER_ERROR)
    except OSError as error:
        problem = disk_problem(error)
        if problem is None:
            raise
        screen.problems([problem])
        sys.exit(EXIT_USER_ERROR)


def stoppable(work: Callable[[], Any], screen: Screen) -> None:
    """Run what may be stopped by a signal, with the libraries' own progress bars off."""
    # Read when torch loads: waiting CPU threads sleep sooner, which costs nothing alone, and much less on a busy machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    from crepatrain.quiet import quiet_libraries
    from crepatrain.stopping import Stopped

    quiet_libraries()
    try:
        work()
    except Stopped as stopped:
        screen.say(f"stopped: {stopped}")
        sys.exit(EXIT_STOPPED)
