"""Rows of many owners: none is ever written over while it is held, and all are used again."""

import gc
import mmap
import random
import sys
import threading
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pastina.table import Gaps, Rows, Table

CPU = torch.device("cpu")


@pytest.fixture(params=["reserved", "grown"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Table:
    """A table with room for everything, and one that has to grow."""
    if request.param == "grown":
        no_addresses(monkeypatch)
    made = Table(3, CPU)
    assert (len(made._room) > 100_000) == (request.param == "reserved")
    return made


def no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", fails)


def is_right(value: float, rows: Rows) -> bool:
    return torch.equal(rows.read(), block(value, rows.num_rows))


def block(value: float, num_rows: int) -> torch.Tensor:
    return torch.full((num_rows, 3), float(value))


# ---------------------------------------------------------------------------------------------------
# Gaps


class Line(RuleBasedStateMachine):
    """What is taken never overlaps, neighbouring gaps are one, and nothing is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps = Gaps()
        self.taken: dict[int, int] = {}

    @rule(size=st.integers(1, 9))
    def take(self, size: int) -> None:
        fits = [gap for gap in self.free() if gap[1] >= size]
        end = self.gaps.end
        start = self.gaps.take(size)
        if fits:
            assert (start, min(g[1] for g in fits)) in fits, "the smallest gap that holds it"
        else:
            assert start == end
        self.taken[start] = size

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        start = data.draw(st.sampled_from(sorted(self.taken)))
        self.gaps.put(start, self.taken.pop(start))

    def free(self) -> list[tuple[int, int]]:
        """The gaps as (start, size), worked out from what is taken."""
        found, place = [], 0
        for start in sorted(self.taken):
            assert start >= place, "two hold the same row"
            if start > place:
                found.append((place, start - place))
            place = start + self.taken[start]
        return found

    @invariant()
    def is_true(self) -> None:
        free = self.free()
        assert self.gaps.end == max((s + n for s, n in self.taken.items()), default=0)
        assert sorted(self.gaps._size_at.items()) == free
        assert self.gaps._start_before == {start + size: start for start, size in free}
        sizes = {size: {s for s, n in free if n == size} for _, size in free}
        assert self.gaps._starts_of == sizes
        assert self.gaps._sizes == sorted(sizes)
        assert len(self.gaps) == len(free)


Line.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestLine = Line.TestCase


# ---------------------------------------------------------------------------------------------------
# Tables


def test_rows_keep_their_numbers_while_others_come_and_go(table: Table) -> None:
    draw = random.Random(1)
    held: dict[int, Rows] = {}
    for value in range(6000):
        rows = table.write(block(value, draw.choice((1, 2, 3, 12, 151))))
        assert torch.equal(rows.read(), block(value, rows.num_rows))
        held[value] = rows
        del rows
        while len(held) > 60 or (held and draw.random() < 0.4):
            del held[draw.choice(list(held))]
        if value % 500 == 0:
            assert all(is_right(kept, own) for kept, own in held.items())
    assert table.gaps.end < 61 * 151 * 1.5, "what is free is used again"
    held.clear()
    table.write(block(0, 1))
    table.write(block(0, 1))
    assert (table.gaps.end, len(table.gaps)) == (1, 0), (
        "all of it is one gap, given back to the end"
    )


def test_what_is_let_go_is_used_again(table: Table) -> None:
    first, second = table.write(block(1, 4)), table.write(block(2, 4))
    view, start = first.read(), first.start
    del first
    assert torch.equal(view, block(1, 4)), "not before somebody needs the room"
    third = table.write(block(3, 4))
    assert third.start == start
    assert torch.equal(second.read(), block(2, 4))


def test_growing_keeps_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    no_addresses(monkeypatch)
    table = Table(3, CPU)
    held = [table.write(block(0, 1000))]
    room, old = table._room, table.numbers
    held.append(table.write(block(1, 24)))
    assert table._room is room
    seen = held[0].read()
    held.append(table.write(block(2, 1)))
    assert (len(table._room), len(table.numbers)) == (2048, 1025)
    held.append(table.write(block(3, 50_000)))
    assert (len(table._room), len(table.numbers)) == (51_025, 51_025)
    assert torch.equal(old, block(0, 1000))
    for value, rows in enumerate(held):
        assert torch.equal(rows.read(), block(value, rows.num_rows))
    assert torch.equal(seen, block(0, 1000)), "who began to read before may go on"


def test_it_is_written_to_in_any_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table made or grown in inference mode could not be written to outside of it."""
    no_addresses(monkeypatch)
    with torch.inference_mode():
        table = Table(3, CPU)
        first = table.write(block(1, 1))
    second = table.write(block(2, 1))
    with torch.inference_mode():
        third = table.write(block(3, 1500))
    fourth = table.write(block(4, 1))
    assert len(table._room) == 2048
    for value, rows in enumerate((first, second, third, fourth), 1):
        assert torch.equal(rows.read(), block(value, rows.num_rows))
        assert not rows.read().requires_grad


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_room_ahead_takes_no_memory() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * mmap.PAGESIZE

    before = resident()
    tables = [Table(400, CPU) for _ in range(5)]
    assert all(table._room.nbytes > 1 << 29 for table in tables)
    rows = [table.write(torch.ones(10, 400)) for table in tables]
    assert len(rows) == 5
    assert all(table.numbers.shape == (10, 400) for table in tables), "nobody copies the room"
    assert resident() - before < 64 << 20


def test_rows_may_go_while_the_table_is_written_to(table: Table) -> None:
    """The garbage collector may let go of rows in the thread that writes, at any line of it."""
    held = {i: [table.write(block(i, i % 7 + 1))] for i in range(300)}
    for rows in held.values():
        rows.append(rows)  # type: ignore[arg-type]  # only the collector finds that it is unused

    def at_every_line(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename.endswith("table.py") and frame.f_code.co_name != "__del__":
            if held:
                held.popitem()
            gc.collect(0)
            return at_every_line
        return None

    kept, tracer = [], sys.gettrace()
    sys.settrace(at_every_line)
    try:
        for i in range(40):
            kept.append(table.write(block(1000 + i, i % 5 + 1)))
    finally:
        sys.settrace(tracer)
    assert len(held) < 200
    for i, rows in enumerate(kept):
        assert torch.equal(rows.read(), block(1000 + i, rows.num_rows))
    spans = sorted((rows.start, rows.start + rows.num_rows) for rows in kept)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_rows_are_let_go_in_other_threads(table: Table) -> None:
    """One thread writes and hands over; three read and let go."""
    ready: SimpleQueue[tuple[float, Rows] | None] = SimpleQueue()
    room = threading.Semaphore(100)
    wrong: list[tuple[float, torch.Tensor]] = []

    def read() -> None:
        while (found := ready.get(timeout=60)) is not None:
            value, rows = found
            if not torch.equal(rows.read(), block(value, rows.num_rows)):
                wrong.append((value, rows.read()))
            del found, rows
            room.release()

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(4000):
        assert room.acquire(timeout=60)
        ready.put((i, table.write(block(i, i % 13 + 1))))
    for _ in threads:
        ready.put(None)
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert table.gaps.end < 104 * 13 * 2
