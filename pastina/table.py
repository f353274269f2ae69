"""Rows of numbers of many owners in one tensor: taken, given back, taken again.

A row that somebody holds is never written over, so who holds it may read it at any time.
"""

import mmap
import os
from bisect import bisect_left, insort
from collections import deque

import torch
from torch import Tensor

_FIRST_ROWS = 1024
_MOST_BYTES = 1 << 34  # of addresses for one table


class Rows:
    """Neighbouring rows of a table; free again when nobody holds this any more."""

    __slots__ = ("_table", "num_rows", "start")

    def __init__(self, table: "Table", start: int, num_rows: int) -> None:
        self._table, self.start, self.num_rows = table, start, num_rows

    def __del__(self) -> None:
        # In any thread, at any moment, while a table is being written as well: no lock, one atomic act.
        self._table.let_go.append((self.start, self.num_rows))

    def read(self) -> Tensor:
        """The numbers, (num_rows, width): a view, to be used while this is held."""
        return self._table.numbers[self.start : self.start + self.num_rows]


class Table:
    """Rows in one tensor, `numbers`. On a CPU only rows that were ever written take memory.

    One thread writes at a time. Any number may read meanwhile: rows that are held stand at the same
    place of any `numbers` that was seen since they were written.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.let_go: deque[tuple[int, int]] = deque()
        self.gaps = Gaps()
        with torch.inference_mode(False):
            self._room = _reserve(width, device)
            self.numbers = self._room[:0]

    def write(self, numbers: Tensor) -> Rows:
        """Copy (rows, width), at least one row, into free rows."""
        while self.let_go:
            self.gaps.put(*self.let_go.popleft())
        start = self.gaps.take(len(numbers))
        rows = Rows(self, start, len(numbers))
        if self.gaps.end > len(self.numbers):
            self._lengthen(self.gaps.end)
        self.numbers[start : start + len(numbers)] = numbers
        return rows

    def _lengthen(self, num_rows: int) -> None:
        with torch.inference_mode(False):  # else nobody outside of it could write here again
            if num_rows > len(self._room):
                factor = 2 if self._room.device.type == "cpu" else 1.1
                size = max(num_rows, int(len(self._room) * factor))
                larger = self._room.new_empty(size, self._room.shape[1])
                larger[: len(self.numbers)] = self.numbers
                self._room = larger
            self.numbers = self._room[:num_rows]


def _reserve(width: int, device: torch.device) -> Tensor:
    """Rows for a long time: on a CPU as many as fit into the machine's memory, where the system has
    addresses for them; a page of them takes memory when something is written there. So a table need
    not be copied, and there are never two of it.
    """
    if device.type == "cpu" and hasattr(mmap, "MAP_PRIVATE"):
        num_bytes = min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _MOST_BYTES)
        num_rows = num_bytes // (4 * width)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            memory = mmap.mmap(-1, 4 * width * num_rows, flags=flags)
        except OSError:
            pass  # addresses are limited here
        else:
            return torch.frombuffer(memory, dtype=torch.float32).view(num_rows, width)
    return torch.empty(_FIRST_ROWS, width, device=device)


class Gaps:
    """The free stretches of a line without end; neighbours are one. Nothing is taken from `end` on."""

    def __init__(self) -> None:
        self.end = 0
        self._size_at: dict[int, int] = {}  # start of a gap -> its size
        self._start_before: dict[int, int] = {}  # end of a gap -> its start
        self._starts_of: dict[int, set[int]] = {}  # size -> starts of the gaps of this size
        self._sizes: list[int] = []  # in order

    def __len__(self) -> int:
        return len(self._size_at)

    def take(self, size: int) -> int:
        """Where a stretch of this size begins: in the smallest gap that holds it, else at the end."""
        place = bisect_left(self._sizes, size)
        if place == len(self._sizes):
            start, self.end = self.end, self.end + size
            return start
        found = self._sizes[place]
        start = next(iter(self._starts_of[found]))
        self._remove(start, found)
        if found > size:
            self._insert(start + size, found - size)
        return start

    def put(self, start: int, size: int) -> None:
        """Give a stretch back."""
        if (before := self._start_before.get(start)) is not None:
            size += start - before
            self._remove(before, start - before)
            start = before
        if (after := self._size_at.get(start + size)) is not None:
            self._remove(start + size, after)
            size += after
        if start + size == self.end:
            self.end = start
        else:
            self._insert(start, size)

    def _insert(self, start: int, size: int) -> None:
        self._size_at[start], self._start_before[start + size] = size, start
        if size not in self._starts_of:
            self._starts_of[size] = set()
            insort(self._sizes, size)
        self._starts_of[size].add(start)

    def _remove(self, start: int, size: int) -> None:
        del self._size_at[start], self._start_before[start + size]
        self._starts_of[size].remove(start)
        if not self._starts_of[size]:
            del self._starts_of[size]
            del self._sizes[bisect_left(self._sizes, size)]
