"""Threads of one piece of work that take turns, and compute side by side.

Python's own work, the random numbers of a process and what the threads share belong to whoever has the
turn; products of many numbers need none of it.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

_POLL = 0.1  # seconds after which whoever waits for the others hears a signal


class Crew:
    """So many threads. Each has the turn, and all cores, except where it says that it is away."""

    def __init__(self, size: int) -> None:
        self.size = self.num_busy = size
        self.is_over = False  # one of them failed: the others shall end
        self._turn = threading.Lock()
        self._cores = torch.get_num_threads()

    def go(self, works: Sequence[Callable[[], None]]) -> None:
        """Do all of these, each in a thread of its own; a single one in this thread.

        Raises:
            BaseException: what the first one raised that failed, when all have ended.
        """
        failures: list[BaseException] = []
        ended = [threading.Event() for _ in works]
        # Not in this thread: whoever is interrupted while it waits for the turn, or has it, breaks it.
        threads = [
            threading.Thread(target=self._do, args=own, name=f"crew {number}", daemon=True)
            for number, own in enumerate(zip(works, ended, [failures] * len(works), strict=True))
        ]
        try:
            if len(works) == 1:
                self._do(works[0], ended[0], failures)
            else:
                for thread in threads:
                    thread.start()
                _wait(ended)
        finally:
            self.is_over = True
            begun = [own for own in zip(ended, threads, strict=True) if own[1].ident is not None]
            _wait([end for end, _ in begun])
            for _, thread in begun:
                thread.join()
            torch.set_num_threads(self._cores)
        if failures:
            raise failures[0]

    def _do(
        self, work: Callable[[], None], end: threading.Event, failures: list[BaseException]
    ) -> None:
        with self._turn:
            torch.set_num_threads(self._cores)
            try:
                if not self.is_over:
                    work()
            except BaseException as error:
                failures.append(error)
                self.is_over = True
            finally:
                self.num_busy -= 1
                end.set()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Meanwhile another one has the turn, and this one its share of the cores."""
        if self.size == 1:
            yield
            return
        torch.set_num_threads(max(1, self._cores // self.num_busy))
        self._turn.release()
        try:
            yield
        finally:
            self._turn.acquire()
            torch.set_num_threads(self._cores)


def _wait(ended: Sequence[threading.Event]) -> None:
    """For all of them; signals are heard meanwhile.

    A thread whose `join` is interrupted counts as ended in some versions of Python, though it runs.
    """
    for end in ended:
        while not end.wait(_POLL):
            pass
