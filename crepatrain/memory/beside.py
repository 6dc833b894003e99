"""How a process begins that estimates beside another one. Imports no library, so that these can be silenced first."""

import multiprocessing
import os
import threading

from crepatrain.quiet import quiet_libraries
from crepatrain.stopping import leave_signals_to_the_parent


def begin_beside() -> None:
    """Leave signals to the parent, and end with it: one that has ended needs no numbers."""
    leave_signals_to_the_parent()
    quiet_libraries()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
