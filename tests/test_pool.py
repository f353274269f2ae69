"""Memory that is used again."""

import torch

from pastina.engine.pool import Pool


def test_what_is_given_back_is_lent_again() -> None:
    pool = Pool()
    first, other = pool.take(30, 40), pool.take(30, 40)
    assert first.shape == (30, 40)
    assert first.data_ptr() != other.data_ptr()
    place = first.data_ptr()
    pool.give(first, None)
    small = pool.take(29, 40)
    assert small.data_ptr() == place
    pool.give(small)
    half = pool.take(60, 40, dtype=torch.bfloat16)
    assert half.data_ptr() == place
    assert half.dtype == torch.bfloat16


def test_the_smallest_that_holds_it_is_taken() -> None:
    pool = Pool()
    small, large = pool.take(10), pool.take(100_000)
    places = small.data_ptr(), large.data_ptr()
    pool.give(large, small)
    assert pool.take(5).data_ptr() == places[0]
    assert pool.take(5).data_ptr() == places[1]
    assert pool.take(0, 5).shape == (0, 5)


def test_growing_batches_leave_no_heap_of_memory() -> None:
    pool = Pool()
    for size in range(1000, 100_000, 500):
        lent = [pool.take(size) for _ in range(3)]
        lent[0].fill_(1.0)
        pool.give(*lent)
    assert len(pool._free) == 3


def test_what_was_lent_for_an_answer_can_be_lent_for_training() -> None:
    pool = Pool()
    with torch.inference_mode():
        lent = pool.take(4)
        pool.give(lent)
    again = pool.take(4)
    again.zero_()
    assert not again.is_inference()
