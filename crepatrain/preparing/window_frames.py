"""Frames of windows, decoded ahead of whoever needs them."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from crepatrain.data.buckets import Window
from crepatrain.data.clip import Unreadable
from crepatrain.data.decode import FrameReader
from crepatrain.data.watched import PATIENCE, Beat, GivenUp, Watched, read_ahead
from crepatrain.errors import UserError


def read_windows(windows: Sequence[Window], *, at_once: int) -> Iterator[tuple[Window, Watched[Tensor]]]:
    """Every window with the reading of its frames [F, 3, H, W] uint8, which `frames_of` waits for.

    Args:
        at_once: windows that are decoded at a time.
    """
    reader = FrameReader()

    def read(window: Window, beat: Beat) -> Tensor:
        return reader.read(window.clip, window.frames, (window.bucket.height, window.bucket.width), window.crop, beat)

    return read_ahead(read, windows, at_once=at_once)


def frames_of(window: Window, reading: Watched[Tensor]) -> Tensor:
    """What was read.

    Raises:
        UserError: the clip can't be read any more, or its disk does not answer.
    """
    try:
        return reading.result(PATIENCE)
    except (Unreadable, OSError) as error:
        raise UserError(f"{window.path}: {error}", "put the clip back as it was, and run the command again") from error
    except GivenUp as error:
        raise UserError(
            f"{window.path}: nothing could be read of it for {PATIENCE:g} seconds",
            "see whether its disk answers, or copy the clip to another one",
        ) from error
