"""Parts of a fleet compute side by side, and nobody notices."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pastina.engine.packed import Joint
from pastina.errors import PastinaError
from pastina.recipe import Recipe
from pastina.training.crew import Crew
from pastina.training.events import EpochEnd, Event, Note, OfMember, Step
from pastina.training.fleet import train_fleet
from pastina.training.loop import Stopped
from pastina.training.score import Scorer
from tests.test_fleet import FP32, Killed, assert_as_alone, break_member, mixed

Toy = Callable[..., Recipe]


@pytest.fixture
def cores(request: pytest.FixtureRequest) -> Iterator[int]:
    """As if there were so many."""
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize("cores", [3], indirect=True)
def test_turns(cores: int) -> None:
    crew, both, log = Crew(2), threading.Barrier(2, timeout=60), list[tuple[int, int]]()
    holders = 0

    def work(place: int) -> None:
        nonlocal holders
        for number in range(20):
            holders += 1
            assert holders == 1, "somebody else has the turn"
            assert torch.get_num_threads() == 3
            torch.manual_seed(place)
            holders -= 1
            with crew.away():
                assert torch.get_num_threads() == 1
                both.wait()  # both are away at this moment
            log.append((place, number))

    crew.go([lambda: work(0), lambda: work(1)])
    assert sorted(log) == [(place, number) for place in (0, 1) for number in range(20)]
    assert torch.get_num_threads() == 3
    assert crew.num_busy == 0


@pytest.mark.parametrize("cores", [2], indirect=True)
def test_who_is_left_has_all_cores(cores: int) -> None:
    crew, seen = Crew(2), list[int]()

    def stay() -> None:
        while crew.num_busy == 2:
            with crew.away():
                pass
        with crew.away():
            seen.append(torch.get_num_threads())

    crew.go([stay, lambda: None])
    assert seen == [2]


def test_the_first_error_is_raised_and_ends_the_others() -> None:
    def fail() -> None:
        raise Killed

    def go_on() -> None:
        while not crew.is_over:
            with crew.away():
                pass

    for works in ([go_on, fail, go_on], [fail, go_on, go_on]):
        crew = Crew(3)
        with pytest.raises(Killed):
            crew.go(works)
        assert crew.num_busy == 0


def test_a_second_signal_ends_them_after_the_step_at_hand() -> None:
    """It hits who waits for them, and none of those who have the turn or wait for it."""
    crew, steps, main = Crew(2), [0, 0], threading.main_thread().ident
    assert main is not None

    def work(place: int) -> None:
        while not crew.is_over:
            with crew.away():
                time.sleep(0.001)
            steps[place] += 1
            if steps == [20, steps[1]] and place == 0:
                signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            crew.go([lambda: work(0), lambda: work(1)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert crew.num_busy == 0
    assert steps[1] > 0


def test_who_comes_too_late_does_not_begin() -> None:
    crew, begun = Crew(2), list[int]()
    crew.is_over = True
    crew.go([lambda: begun.append(0), lambda: begun.append(1)])
    assert (begun, crew.num_busy) == ([], 0)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Of each pass its thread, its members, and how many threads compute in it."""
    seen: list[tuple[str, int, int]] = []
    inner = Joint.states

    def counted(joint: Joint, *args: Any) -> Any:
        if torch.is_grad_enabled():
            name = threading.current_thread().name
            seen.append((name, len(joint.batches), torch.get_num_threads()))
        return inner(joint, *args)

    monkeypatch.setattr(Joint, "states", counted)
    return seen


@pytest.mark.parametrize("cores", [2], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_members_end_as_if_alone(
    cores: int, precision: str, toy: Toy, tmp_path: Path, seen: list[tuple[str, int, int]]
) -> None:
    """The first part has members that step alone, which draw numbers as well."""
    recipes = []
    for recipe in mixed(toy)[::-1]:
        fit = recipe.fit.model_copy(update={"precision": precision})
        recipes.append(recipe.model_copy(update={"fit": fit}))
    runs = train_fleet(recipes, [tmp_path / f"{i}" for i in range(len(recipes))])
    assert {name for name, _, _ in seen} == {"crew 0", "crew 1"}
    assert {threads for *_, threads in seen} >= {1}, "while both compute each has a core"
    assert max(members for _, members, _ in seen) == 3, "half of them"
    assert torch.get_num_threads() == cores
    for i, (recipe, run) in enumerate(zip(recipes, runs, strict=True)):
        assert_as_alone(recipe, run, tmp_path / f"alone-{i}")


@pytest.mark.parametrize("cores", [2], indirect=True)
def test_others_compute_while_a_member_is_scored(
    cores: int, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first score waits until somebody else has made steps."""
    inner, steps, waited = Scorer.score, 0, 0
    more = threading.Event()

    def score(scorer: Scorer, engine: Any, device: Any, accelerator: Any, away: Any) -> Any:
        nonlocal waited
        if not waited:
            waited = steps
            with away():
                assert more.wait(60), "nobody else computes"
        return inner(scorer, engine, device, accelerator, away)

    def hear(event: Event) -> None:
        nonlocal steps
        steps += isinstance(event, OfMember) and isinstance(event.event, Step)
        if waited and steps > waited:
            more.set()

    monkeypatch.setattr(Scorer, "score", score)
    recipes = [toy(fit=FP32 | {"seed": seed}) for seed in range(4)]
    # of the second part the epochs are longer
    recipes[2:] = [toy(fit=FP32 | {"seed": seed, "batch": 2}) for seed in (2, 3)]
    runs = train_fleet(recipes, [tmp_path / f"{i}" for i in range(4)], on_event=hear)
    assert waited
    monkeypatch.undo()
    for i, (recipe, run) in enumerate(zip(recipes, runs, strict=True)):
        assert_as_alone(recipe, run, tmp_path / f"alone-{i}")


@pytest.mark.parametrize("cores", [4], indirect=True)
@pytest.mark.parametrize(("max_tokens", "most"), [(1, 1), (300, 6)])
def test_the_budget_is_that_of_all_parts(
    cores: int, max_tokens: int, most: int, toy: Toy, tmp_path: Path
) -> None:
    recipes = [toy(fit=FP32 | {"epochs": 1, "seed": seed}) for seed in range(8)]
    running: set[str] = set()
    sizes: list[int] = []

    def hear(event: Event) -> None:
        assert isinstance(event, OfMember)
        if isinstance(event.event, Step):
            running.add(event.name)
            sizes.append(len(running))
        if isinstance(event.event, EpochEnd):
            running.discard(event.name)

    outs = [tmp_path / f"{i}" for i in range(8)]
    runs = train_fleet(recipes, outs, on_event=hear, max_tokens=max_tokens)
    assert not any(isinstance(run, PastinaError) for run in runs)
    assert 0 < max(sizes) <= most


@pytest.mark.parametrize("cores", [2], indirect=True)
def test_failures_stay_with_their_member(
    cores: int, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_member(monkeypatch, "1")
    recipes = [toy(fit=FP32 | {"seed": seed}) for seed in range(5)]
    recipes[4] = toy(fit=FP32 | {"lr": 1e30, "clip": 0})
    runs = train_fleet(recipes, [tmp_path / str(i) for i in range(5)])
    assert [isinstance(run, PastinaError) for run in runs] == [False, True, False, False, True]
    for i in (0, 2, 3):
        assert_as_alone(recipes[i], runs[i], tmp_path / f"alone-{i}")


@pytest.mark.parametrize("cores", [2], indirect=True)
@pytest.mark.parametrize("how", ["killed", "asked"])
def test_stopped_and_resumed(cores: int, how: str, toy: Toy, tmp_path: Path) -> None:
    fit = FP32 | {"save_seconds": 0}
    recipes = [toy(fit=fit | {"seed": seed}) for seed in range(3)] + [toy("tag", fit=fit)]
    outs = [tmp_path / f"{i}" for i in range(4)]
    steps, before = 0, threading.active_count()

    def stop(event: Event) -> None:
        nonlocal steps
        steps += isinstance(event, OfMember) and isinstance(event.event, Step)
        if steps == 11:
            if how == "killed":
                raise Killed
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Killed if how == "killed" else Stopped):
        train_fleet(recipes, outs, on_event=stop)
    assert threading.active_count() == before
    runs = train_fleet(recipes, outs, resume=True)
    for i, (recipe, run) in enumerate(zip(recipes, runs, strict=True)):
        assert_as_alone(recipe, run, tmp_path / f"alone-{i}")


def test_who_failed_is_not_counted_as_done(toy: Toy, tmp_path: Path) -> None:
    recipes = [toy(fit=FP32), toy(fit=FP32 | {"lr": 1e30, "clip": 0})]
    is_failed = False

    def stop(event: Event) -> None:
        nonlocal is_failed
        assert isinstance(event, OfMember)
        is_failed |= isinstance(event.event, Note) and "is dropped" in event.event.text
        if is_failed and isinstance(event.event, Step):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped, match="0 of 2 members are done, 1 failed, 1 are saved"):
        train_fleet(recipes, [tmp_path / "0", tmp_path / "1"], on_event=stop)
