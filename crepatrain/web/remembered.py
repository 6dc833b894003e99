"""What was worked out for a draft, for as long as it may be asked for again."""

from collections import OrderedDict
from typing import Generic, TypeVar

_T = TypeVar("_T")
_MOST = 64


class Remembered(Generic[_T]):
    """The newest of what was found, by what it was found for."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[str, ...], _T] = OrderedDict()

    def get(self, key: tuple[str, ...]) -> _T | None:
        """What was found; None where nothing was, or long ago."""
        return self._found.get(key)

    def put(self, key: tuple[str, ...], found: _T) -> None:
        """Remember something, and forget the oldest of too much."""
        self._found.pop(key, None)
        self._found[key] = found
        while len(self._found) > _MOST:
            self._found.popitem(last=False)
