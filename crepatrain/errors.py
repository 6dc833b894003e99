"""What a user can cause, as exceptions that say what to do about it."""

import difflib
import errno
from collections.abc import Iterable
from dataclasses import dataclass

# What the system answers where a disk is full, read-only, broken or gone.
_OF_THE_DISK = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ESTALE", "ENOTCONN", "ENODEV", "ENXIO")
    if hasattr(errno, name)
)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what it is, with its value, and the remedy.

    Attributes:
        keys: the keys of the config that it is about; none where it is about something else.
    """

    what: str
    fix: str
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what}\n  -> {self.fix}"


class UserError(Exception):
    """Something that the user can repair. The command line prints it without a traceback and exits with 2.

    Args:
        what: what is wrong, with the value that is.
        fix: what to do about it.
        keys: the keys of the config that it is about.

    Attributes:
        reported: whether another process of the run says it.
    """

    reported = False

    def __init__(self, what: str, fix: str, keys: tuple[str, ...] = ()) -> None:
        problem = Problem(what, fix, keys)
        super().__init__(str(problem))
        self.problems = [problem]

    @classmethod
    def of(cls, problems: list[Problem]) -> "UserError":
        """One error that reports every problem at once."""
        assert problems
        error = cls(problems[0].what, problems[0].fix)
        error.problems = list(problems)
        return error

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class DivergedError(Exception):
    """A loss or gradient is not finite; the weights have not been touched. Exit code 4.

    Args:
        what: the step, its numbers and its clips.
        fix: what to do about it.

    Attributes:
        reported: whether another process of the run says it.
    """

    reported = False

    def __init__(self, what: str, fix: str) -> None:
        self.problems = [Problem(what, fix)]
        super().__init__(str(self.problems[0]))


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that a misspelt one probably means."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)), None)


def disk_problem(error: OSError) -> Problem | None:
    """What a user can do about an error of a disk; None of others."""
    if error.errno not in _OF_THE_DISK:
        return None
    return Problem(
        f"{error.filename or 'a file'}: {error.strerror}",
        "free disk space, or see that the disk answers and can be written to, then run the same command again",
    )
