"""The name that was perhaps meant, among thousands."""

from collections.abc import Sequence
from difflib import get_close_matches
from heapq import nlargest

_COMPARED = 100  # names that are compared well; all of them would take too long


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The name most like this one; None if none is much like it.

    >>> nearest("acme/tikets", ["acme/orders", "acme/tickets"])
    'acme/tickets'
    """
    return next(iter(nearest_names(name, names, 1)), None)


def nearest_names(name: str, names: Sequence[str], count: int = 3) -> list[str]:
    """At most so many names that are much like this one, the nearest first."""
    if len(names) > _COMPARED:
        backwards = name[::-1]
        names = nlargest(
            _COMPARED, names, key=lambda n: _in_common(name, n) + _in_common(backwards, n[::-1])
        )
    return get_close_matches(name, names, n=count)


def _in_common(one: str, other: str) -> int:
    """How many first letters are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
