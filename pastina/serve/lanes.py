"""What waits: short things and long ones in lanes of their own, and in a lane callers take turns.

So a long text cannot hold up the short ones behind it, nor can somebody with a thousand texts hold up
somebody with one.
"""

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Lane(Generic[T]):
    """Things with a cost each. Callers take turns, and so do the requests of one caller."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, OrderedDict[int, deque[tuple[int, T]]]] = OrderedDict()
        self._callers: dict[int, str] = {}  # of each request
        self.cost = 0  # of all that waits

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, caller: str, request: int, thing: T, cost: int) -> None:
        requests = self._waiting.setdefault(caller, OrderedDict())
        requests.setdefault(request, deque()).append((cost, thing))
        self._callers[request] = caller
        self.cost += cost

    def take(self, budget: int) -> list[T]:
        """The next things that together cost no more than this, or one thing."""
        found: list[T] = []
        spent = 0
        while self._waiting:
            caller, requests = next(iter(self._waiting.items()))
            request, own = next(iter(requests.items()))
            if found and spent + own[0][0] > budget:
                break
            cost, thing = own.popleft()
            found.append(thing)
            spent += cost
            self._waiting.move_to_end(caller)
            requests.move_to_end(request)
            if not own:
                self._forget(request)
        self.cost -= spent
        return found

    def drop(self, request: int) -> None:
        """Forget what this request has waiting."""
        self.cost -= sum(cost for cost, _ in self._forget(request))

    def _forget(self, request: int) -> deque[tuple[int, T]]:
        caller = self._callers.pop(request, None)
        if caller is None:
            return deque()
        requests = self._waiting[caller]
        own = requests.pop(request)
        if not requests:
            del self._waiting[caller]
        return own


class Lanes(Generic[T]):
    """A lane for things that cost up to `short`, or are of such a whole, and one for all others.

    long: what others may cost that are taken at a time, unless it is a single one.

    >>> lanes = Lanes[str](short=5, long=100)
    >>> for request, (thing, cost) in enumerate([("LONG", 90), ("LONG TOO", 90), ("a", 1), ("b", 2)]):
    ...     lanes.put("somebody", request, thing, cost)
    >>> lanes.take(100), lanes.take(100), lanes.take(100)
    (['a', 'b'], ['LONG'], ['LONG TOO'])
    """

    def __init__(self, short: int, long: int) -> None:
        self.short, self.long = short, long
        self._lanes: tuple[Lane[T], Lane[T]] = (Lane(), Lane())
        self._was_short = False

    def __bool__(self) -> bool:
        return any(self._lanes)

    @property
    def cost(self) -> int:
        """What all that waits costs."""
        return sum(lane.cost for lane in self._lanes)

    def put(self, caller: str, request: int, thing: T, cost: int, whole: int = 0) -> None:
        """Let something wait at the end of its lane. whole: the cost of what it is a piece of."""
        self._lanes[max(cost, whole) > self.short].put(caller, request, thing, cost)

    def take(self, budget: int) -> list[T]:
        """Short things, or long ones; in turn, while both wait. At least one, whatever it costs."""
        short, long = self._lanes
        self._was_short = bool(short) and not (long and self._was_short)
        return short.take(budget) if self._was_short else long.take(min(budget, self.long))

    def drop(self, request: int) -> None:
        """Forget what this request has waiting."""
        for lane in self._lanes:
            lane.drop(request)
