"""Which clips of a dataset are held out."""

from crepatrain.data.buckets import ClipWindows
from crepatrain.errors import UserError


def hold_out(clips: ClipWindows, share: float) -> tuple[ClipWindows, ClipWindows]:
    """What is trained on, and what is held out: a share of the contents, those with the lowest digests.

    So what is held out depends on no seed and no name, copies of a clip are on one side, and a clip that joins moves at most
    the ones at the border.

    Raises:
        UserError: all clips have one content, so that nothing would be left to train on.
    """
    contents = sorted({window.clip.digest for window in clips.windows})
    if len(contents) == 1:
        raise UserError(
            f"eval_share={share:g}: there is one clip, which can't be trained on and held out", "add clips, or give eval_data"
        )
    held = set(contents[: min(max(round(share * len(contents)), 1), len(contents) - 1)])
    trained = clips.part(window for window in clips.windows if window.clip.digest not in held)
    return trained, clips.part(window for window in clips.windows if window.clip.digest in held)


def shares_in_words(held: ClipWindows, whole: ClipWindows) -> str:
    """How much is held out, in clips and in windows."""
    return " and ".join(
        f"{part} of {all_of} {what} ({part / all_of:.0%})"
        for part, all_of, what in (
            (len(held.cuts), len(whole.cuts), "clips"),
            (len(held.windows), len(whole.windows), "windows"),
        )
    )
