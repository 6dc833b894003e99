"""What a user can cause, as exceptions that say what to do about it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a config: what it is, with its value, and the remedy."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}\n  -> {self.fix}"


class UserError(Exception):
    """Something that the user can mend. The command line prints it without a traceback and exits with 2.

    Args:
        what: what is wrong, with the value that is.
        fix: what to do about it.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(str(Problem(what, fix)))
        self.problems = [Problem(what, fix)]

    @classmethod
    def of(cls, problems: list[Problem]) -> "UserError":
        """One error that tells every problem at once."""
        assert problems
        error = cls(problems[0].what, problems[0].fix)
        error.problems = list(problems)
        return error

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class DivergedError(Exception):
    """The loss or a gradient is not finite; the weights have not been touched. Exit code 4."""
