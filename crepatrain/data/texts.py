"""Reading the texts of a dataset: which files may be opened, and what can be a caption or a file's name."""

import stat
from pathlib import Path

# What other programs write where they have no value.
_NO_VALUE = frozenset({"nan", "<na>", "none", "null"})

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class Mistake(Exception):
    """Something of one file or one entry that can't be used.

    Args:
        what: is wrong, without the name of the file or entry.
        fix: what to do about it.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


def expect_regular(path: Path) -> None:
    """Make sure that a path is a file that ends; opening a named pipe or a device may take for ever.

    Raises:
        Mistake: it is none.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise Mistake("it is a link that leads nowhere", "repair or remove it") from None
        raise Mistake("there is no such file", "correct its name, or remove it") from None
    except OSError as error:
        raise Mistake(f"it can't be read ({error.strerror})", "repair or remove it") from None
    if not stat.S_ISREG(mode):
        kind = next((words for matches, words in _KINDS if matches(mode)), "something else")
        raise Mistake(f"it is {kind}, and not a file of content", "remove it")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        Mistake: it is no such file.
    """
    expect_regular(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise Mistake("it is not UTF-8", "save it as UTF-8") from None
    except OSError as error:
        raise Mistake(f"it can't be read ({error.strerror})", "make it readable, or remove it") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise Mistake(f"line {line} holds a NUL byte, as a file of UTF-16 does", "save it as UTF-8")
    return text


def as_caption(text: str) -> str | None:
    """A caption on one line; None of a text that holds none.

    Raises:
        Mistake: it is what a program writes for no value, or holds what is no character.
    """
    caption = " ".join(text.split())
    if caption.casefold() in _NO_VALUE:
        raise Mistake(
            f"the caption is {caption!r}, which programs write for a missing value", "write a caption, or leave it empty"
        )
    if not is_unicode(caption) or "\0" in caption:
        raise Mistake("the caption holds what is no character (half a surrogate pair, or NUL)", "write the caption anew")
    return caption or None


def expect_unicode_name(path: Path) -> None:
    """Make sure that a path can be written, and be a caption.

    Raises:
        Mistake: a name in it is not UTF-8.
    """
    if not is_unicode(str(path)):
        raise Mistake("its name is not UTF-8", "rename it")


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: half a surrogate pair can't, nor the undecodable bytes of a file's name."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
