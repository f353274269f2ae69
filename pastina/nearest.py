"""The name that was perhaps meant, among thousands."""

from bisect import bisect_left
from collections.abc import Sequence
from difflib import get_close_matches

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
        begin = _neighbors(name, sorted(names))
        end = _neighbors(name[::-1], sorted(n[::-1] for n in names))
        names = sorted({*begin, *(n[::-1] for n in end)})
    return get_close_matches(name, names, n=count)


def _neighbors(name: str, ordered: Sequence[str]) -> Sequence[str]:
    """Those that have the most first letters in common with it: they stand around its place."""
    place = bisect_left(ordered, name)
    return ordered[max(0, place - _COMPARED // 4) : place + _COMPARED // 4]
