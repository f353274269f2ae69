"""How much may wait for the engine, and how much of it may be one caller's."""

from dataclasses import dataclass

_LITTLE = 16  # part of the queue that a caller may have in it when it is full of others' texts
_BEYOND = 2  # times the queue: so much waits at most


@dataclass(slots=True)
class _Held:
    texts: int = 0
    chars: int = 0

    def add(self, texts: int, chars: int) -> None:
        self.texts += texts
        self.chars += chars


class Room:
    """The queue's room, in texts and characters.

    Callers who have little waiting are let in beyond it, so that no one shuts the others out.

    >>> room = Room(texts=32, chars=1000)
    >>> room.take("one", 32, 100)
    >>> room.fits("one", 1, 5), room.fits("another", 2, 10), room.fits("another", 3, 10)
    (False, True, False)
    >>> room.leave("one", 32, 100)
    >>> room.fits("one", 1, 5)
    True
    """

    def __init__(self, texts: int, chars: int) -> None:
        self._limits = (texts, chars)
        self._held: dict[str, _Held] = {}
        self._all = _Held()

    @property
    def texts(self) -> int:
        """How many wait."""
        return self._all.texts

    def fits(self, caller: str, texts: int, chars: int) -> bool:
        """Whether so much more may wait; a request that finds nobody waiting always may."""
        if not self._all.texts or self._is_within(self._all, texts, chars, 1.0):
            return True
        own = self._held.get(caller, _Held())
        return self._is_within(own, texts, chars, 1 / _LITTLE) and self._is_within(
            self._all, texts, chars, _BEYOND
        )

    def _is_within(self, held: _Held, texts: int, chars: int, part: float) -> bool:
        most_texts, most_chars = self._limits
        return held.texts + texts <= most_texts * part and held.chars + chars <= most_chars * part

    def take(self, caller: str, texts: int, chars: int) -> None:
        """So much waits from now on, until it is said to `leave`."""
        own = self._held.get(caller)
        if own is None:
            own = self._held[caller] = _Held()
        own.add(texts, chars)
        self._all.add(texts, chars)

    def leave(self, caller: str, texts: int, chars: int) -> None:
        """So much of what was taken waits no more."""
        own = self._held[caller]
        own.add(-texts, -chars)
        self._all.add(-texts, -chars)
        if not own.texts:
            del self._held[caller]
