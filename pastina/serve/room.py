"""How much may wait for the engine, and how much of it may be one caller's."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_LITTLE = 16  # part of the queue that a caller may have in it when it is full of others' texts
_BEYOND = 2  # times the queue: so much waits at most


class Room:
    """The queue's room, in texts and characters.

    Callers who have little waiting are let in beyond it, so that no one shuts the others out.

    >>> room = Room(texts=32, chars=1000)
    >>> with room.taken("one", 32, 100):
    ...     room.fits("one", 1, 5), room.fits("another", 2, 10), room.fits("another", 3, 10)
    (False, True, False)
    """

    def __init__(self, texts: int, chars: int) -> None:
        self._limits = (texts, chars)
        self._held: dict[str, Counter[str]] = {}
        self._all: Counter[str] = Counter()

    @property
    def texts(self) -> int:
        """How many wait."""
        return self._all["texts"]

    def fits(self, caller: str, texts: int, chars: int) -> bool:
        """Whether so much more may wait; a request that finds nobody waiting always may."""
        if not self.texts:
            return True
        return self._is_within(self._all, texts, chars, 1.0) or (
            self._is_within(self._held.get(caller, Counter()), texts, chars, 1 / _LITTLE)
            and self._is_within(self._all, texts, chars, _BEYOND)
        )

    def _is_within(self, held: Counter[str], texts: int, chars: int, part: float) -> bool:
        limits = [limit * part for limit in self._limits]
        return held["texts"] + texts <= limits[0] and held["chars"] + chars <= limits[1]

    @contextmanager
    def taken(self, caller: str, texts: int, chars: int) -> Iterator[None]:
        """So much waits, for as long as the block runs."""
        more = Counter(texts=texts, chars=chars)
        own = self._held.setdefault(caller, Counter())
        own.update(more)
        self._all.update(more)
        try:
            yield
        finally:
            own.subtract(more)
            self._all.subtract(more)
            if not own["texts"]:
                self._held.pop(caller, None)
