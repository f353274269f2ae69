"""How fast the queue moves: what a client is told to wait is worked out from it."""

import time

_LEAST_S = 0.5  # seconds of work before the old estimate gives way
_SPAN_S = 20.0  # seconds after which what was before counts half


class Pace:
    """Texts that are answered in a second, as long as there is something to answer.

    >>> pace = Pace()
    >>> pace.begin(now=10.0)
    >>> pace.count(50, now=12.0)
    >>> pace.texts_per_second
    25.0
    """

    def __init__(self) -> None:
        self.texts_per_second = 100.0
        self._since, self._count = time.monotonic(), 0.0

    def begin(self, now: float | None = None) -> None:
        """There was nothing to do, and now there is."""
        self._since, self._count = time.monotonic() if now is None else now, 0.0

    def count(self, texts: int, now: float | None = None) -> None:
        """So many were answered."""
        took = (time.monotonic() if now is None else now) - self._since
        self._count += texts
        if took >= _LEAST_S:
            self.texts_per_second = self._count / took
        if took > _SPAN_S:
            self._since, self._count = self._since + took / 2, self._count / 2
