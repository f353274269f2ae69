"""What waits: short things and long ones in lanes of their own, and in a lane owners take turns.

So a long text cannot hold up the short ones behind it, nor can somebody with a thousand texts hold up
somebody with one.
"""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Lane(Generic[T]):
    """Things of owners, each with a cost; taken one of each owner in turn."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[int, deque[tuple[int, T]]] = OrderedDict()
        self.cost = 0  # of all that waits

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, owner: int, thing: T, cost: int) -> None:
        self._waiting.setdefault(owner, deque()).append((cost, thing))
        self.cost += cost

    def take(self, budget: int) -> tuple[list[T], int]:
        """The next things that together cost no more than this, or one thing; and their cost."""
        found: list[T] = []
        spent = 0
        while self._waiting:
            owner, own = next(iter(self._waiting.items()))
            if found and spent + own[0][0] > budget:
                break
            cost, thing = own.popleft()
            found.append(thing)
            spent += cost
            if own:
                self._waiting.move_to_end(owner)
            else:
                del self._waiting[owner]
        self.cost -= spent
        return found, spent

    def drop(self, owner: int) -> None:
        """Forget what this owner has waiting."""
        self.cost -= sum(cost for cost, _ in self._waiting.pop(owner, ()))


class Lanes(Generic[T]):
    """A lane for things that cost up to `short`, and one for all others.

    >>> lanes = Lanes[str](short=5)
    >>> for owner, (thing, cost) in enumerate([("LONG", 90), ("LONG TOO", 90), ("a", 1), ("b", 2)]):
    ...     lanes.put(owner, thing, cost)
    >>> lanes.take(100), lanes.take(100), lanes.take(100)
    (['a', 'b', 'LONG'], ['LONG TOO'], [])
    """

    def __init__(self, short: int) -> None:
        self.short = short
        self._lanes: tuple[Lane[T], Lane[T]] = (Lane(), Lane())

    def __bool__(self) -> bool:
        return any(self._lanes)

    @property
    def cost(self) -> int:
        """What all that waits costs."""
        return sum(lane.cost for lane in self._lanes)

    def put(self, owner: int, thing: T, cost: int) -> None:
        """Let something wait at the end of its lane."""
        self._lanes[cost > self.short].put(owner, thing, cost)

    def take(self, budget: int) -> list[T]:
        """Short things, and long ones for half of the budget while short ones wait too.

        From a lane with something in it comes at least one thing, whatever it costs.
        """
        short, long = self._lanes
        some, spent = long.take(budget // 2 if short else budget) if long else ([], 0)
        return (short.take(budget - spent)[0] if short else []) + some

    def drop(self, owner: int) -> None:
        """Forget what this owner has waiting."""
        for lane in self._lanes:
            lane.drop(owner)
