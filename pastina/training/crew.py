"""Threads of one piece of work that take turns, and compute side by side.

Python's own work, the random numbers of a process and what the threads share belong to whoever has the
turn; products of many numbers need none of it.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


class Crew:
    """So many threads. Each has the turn, and all cores, except where it says that it is away."""

    def __init__(self, size: int) -> None:
        self.size = self.num_busy = size
        self.is_over = False  # one of them failed: the others shall end
        self._turn = threading.Lock()
        self._cores = torch.get_num_threads()

    def go(self, works: Sequence[Callable[[], None]]) -> None:
        """Do all of these, one in each thread, the first in this one.

        Raises:
            BaseException: what the first one raised that failed, when all have ended.
        """
        failures: list[BaseException] = []
        others = [
            threading.Thread(target=self._do, args=(work, failures), name=f"crew {number}")
            for number, work in enumerate(works[1:], 1)
        ]
        try:
            for other in others:
                other.start()
            self._do(works[0], failures)
            for other in others:
                other.join()
        finally:
            self.is_over = True
            torch.set_num_threads(self._cores)
        if failures:
            raise failures[0]

    def _do(self, work: Callable[[], None], failures: list[BaseException]) -> None:
        with self._turn:
            torch.set_num_threads(self._cores)
            try:
                work()
            except BaseException as error:
                failures.append(error)
                self.is_over = True
            finally:
                self.num_busy -= 1

    @contextmanager
    def away(self) -> Iterator[None]:
        """Meanwhile another one has the turn, and this one its share of the cores."""
        torch.set_num_threads(max(1, self._cores // self.num_busy))
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()
            torch.set_num_threads(self._cores)
