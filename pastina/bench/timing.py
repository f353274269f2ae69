"""Timing contestants in turn: whatever else the machine does meanwhile hits all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

import torch

Raw = dict[str, list[float]]
Name = TypeVar("Name")


def now() -> float:
    """Seconds on a clock, when everything that was begun on a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], Any]) -> float:
    """How long this takes."""
    started = now()
    work()
    return now() - started


def in_turn(
    contestants: Mapping[Name, Callable[[int], float]],
    repetitions: int,
    after_each: Callable[[], None] = lambda: None,
) -> dict[Name, list[float]]:
    """What each contestant makes of each repetition's number; every second time they go backwards.

    >>> in_turn({"one": lambda turn: 1.0, "more": lambda turn: turn + 2.0}, 2)
    {'one': [1.0, 1.0], 'more': [2.0, 3.0]}
    """
    raw: dict[Name, list[float]] = {name: [] for name in contestants}
    for turn in range(repetitions):
        for name in list(contestants)[:: -1 if turn % 2 else 1]:
            raw[name].append(contestants[name](turn))
            after_each()
    return raw


def by_turns(works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The seconds of each after so many rounds, in which all have their turn: for short works."""
    total = dict.fromkeys(works, 0.0)
    for turn in range(rounds):
        for name in list(works)[:: -1 if turn % 2 else 1]:
            total[name] += seconds(works[name])
    return total


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the repetitions' ratios; both were measured in the same repetitions.

    >>> ratio([2.0, 3.0, 40.0], [1.0, 1.0, 10.0])
    3.0
    """
    return short(median(a / b for a, b in zip(over, under, strict=True)))


def short(number: float) -> float:
    """Four digits; more would be noise.

    >>> short(1234.567), short(0.00123456)
    (1235.0, 0.001235)
    """
    return float(f"{number:.4g}")
