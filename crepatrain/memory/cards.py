"""Graphics cards, by the memory that they are sold with."""

_GIB = 1 << 30

CARDS = {8: 7.8, 12: 11.8, 16: 15.8, 24: 23.6, 32: 31.5, 48: 47.5, 80: 79.1, 141: 139.7}
"""Usable GiB of a card that is sold as so many GB."""


def usable(gigabytes: float) -> int:
    """Bytes of a card of so many GB."""
    room = CARDS.get(int(gigabytes), gigabytes) if gigabytes == int(gigabytes) else gigabytes
    return int(room * _GIB)
