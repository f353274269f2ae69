"""The open connections of a server: so many at most. When one more comes, the one goes that has had
nothing to do for longest: no request of it is being answered, whatever its client has begun to send."""

from collections.abc import Callable
from typing import Any


class Places:
    """Places for `most` connections. on_lost: hears "idle" for one that makes room for another, "new"
    for one that finds no room. Connections have a method `give_way`.
    """

    def __init__(self, most: int, on_lost: Callable[[str], None] = lambda which: None) -> None:
        self.most, self.on_lost = most, on_lost
        self._open: set[Any] = set()
        self._idle: dict[Any, None] = {}  # in the order in which they became so

    def enter(self, connection: Any) -> bool:
        """Whether there is a place for a new one, which has nothing to do yet."""
        if len(self._open) >= self.most:
            if not self._idle:
                self.on_lost("new")
                return False
            longest = next(iter(self._idle))
            del self._idle[longest]
            self.on_lost("idle")
            longest.give_way()
        self._open.add(connection)
        self._idle[connection] = None
        return True

    def see(self, connection: Any, *, is_idle: bool) -> None:
        """Note that it has something to do now, or nothing any more."""
        if not is_idle:
            self._idle.pop(connection, None)
        elif connection in self._open:
            self._idle.setdefault(connection)

    def leave(self, connection: Any) -> None:
        """Forget one that is closed."""
        self._open.discard(connection)
        self._idle.pop(connection, None)
