"""The queue and the batches, with the real engine on a tiny backbone."""

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pastina.answers import Prediction
from pastina.serve.lanes import Lanes
from pastina.serve.worker import Worker
from pastina.tasks import Tasks
from tests.adapter_folder import LONG

SOON = 60.0


class Heard:
    """What a worker sent."""

    def __init__(self) -> None:
        self.answers: dict[int, Any] = {}
        self.batches: list[dict[str, Any]] = []
        self.taken_at: dict[int, int] = {}  # request -> the batch that took the last of it, from 1

    def __call__(self, message: tuple[Any, ...]) -> None:
        verb, done, measures = message
        assert verb == "answers"
        if measures is not None:
            self.batches.append(measures)
        for number, answers, waited in done:
            assert waited >= 0
            assert number not in self.answers, "answered twice"
            self.answers[number] = answers

    def watch(self, worker: Worker) -> None:
        """See which batch takes what: in this order, whichever thread works on it and however long."""
        on_time, num_taken = worker._on_time, 0

        def seen(batch: list[Any]) -> list[Any]:
            nonlocal num_taken
            num_taken += bool(batch)
            self.taken_at.update({line.asked.id: num_taken for line, _ in batch})
            return on_time(batch)

        worker._on_time = seen  # called by one thread at a time


@pytest.fixture(scope="module")
def tasks(bert: Path, folder: Path) -> Tasks:
    found = Tasks(str(bert), precision="fp32")
    for name in ("acme/topics", "acme/many", "acme/spans", "globex/sets", "globex/number"):
        found.add(folder / name, name)
    return found


@pytest.fixture(params=[1, 3])
def work(tasks: Tasks, request: pytest.FixtureRequest) -> Callable[..., tuple[Worker, Heard]]:
    usual = {"max_tokens": 256, "wait_s": 0.0, "threads": request.param}

    def make(**options: Any) -> tuple[Worker, Heard]:
        heard = Heard()
        worker = Worker(tasks, heard, **(usual | options))
        heard.watch(worker)
        return worker, heard

    return make


def run(worker: Worker, is_done: Callable[[], bool]) -> None:
    """Let it work until this is so."""
    thread = threading.Thread(target=worker.run)
    thread.start()
    stop = time.monotonic() + SOON
    while not is_done() and time.monotonic() < stop:
        time.sleep(0.001)
    worker.stop()
    thread.join(SOON)
    assert not thread.is_alive()
    assert is_done()


def soon() -> float:
    return time.monotonic() + SOON


def text(task: str, text: str = "saw") -> tuple[str, str, None]:
    return (task, text, None)


def put(worker: Worker, id: int, deadline: float, texts: list[Any], caller: str = "us") -> None:
    worker.put(id, deadline, texts, caller)


def test_raw_scores_of_every_kind(work: Callable[..., tuple[Worker, Heard]]) -> None:
    """Raw and usual requests in the same batches."""
    worker, heard = work()
    texts = [text(name) for name in ("globex/sets", "acme/many", "globex/number", "acme/spans")]
    for number in range(1, 9):
        worker.put(number, soon(), texts, "us", is_raw=number % 2 == 0)
    run(worker, lambda: len(heard.answers) == 8)
    usual, raw = heard.answers[1], heard.answers[2]
    for label, logit in raw[0]["scores"].items():
        assert usual[0]["scores"][label] == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6)
    assert sum(map(math.exp, raw[1]["scores"].values())) != pytest.approx(1.0, abs=0.1)
    assert raw[2] == pytest.approx(usual[2])
    assert raw[3]["spans"] == usual[3]["spans"]
    for number in range(3, 9):
        assert heard.answers[number][0]["scores"] == pytest.approx(
            (raw if number % 2 == 0 else usual)[0]["scores"], abs=1e-5
        )


def test_long_texts_do_not_hold_up_short_ones(work: Callable[..., tuple[Worker, Heard]]) -> None:
    """A short text behind a thousand windows is in the first batch, and they all get answered."""
    worker, heard = work()
    put(worker, 1, soon(), [text("acme/spans", LONG * 40)] * 8)
    put(worker, 2, soon(), [text("acme/many", LONG * 40)] * 30)
    put(worker, 3, soon(), [text("acme/topics")])
    run(worker, lambda: len(heard.answers) == 3)
    assert heard.taken_at[3] <= 2
    assert heard.taken_at[1] > 10
    assert all("refused" not in answer for own in heard.answers.values() for answer in own)


def test_short_texts_do_not_hold_up_long_ones(work: Callable[..., tuple[Worker, Heard]]) -> None:
    worker, heard = work()
    put(worker, 1, soon(), [text("acme/topics")] * 2000)
    put(worker, 2, soon(), [text("acme/spans", LONG)])
    run(worker, lambda: len(heard.answers) == 2)
    assert heard.taken_at[2] <= 2 < heard.taken_at[1]


def test_somebody_with_many_texts_takes_turns(work: Callable[..., tuple[Worker, Heard]]) -> None:
    worker, heard = work(max_tokens=64)
    put(worker, 1, soon(), [text("acme/topics")] * 500)
    for number in range(2, 8):
        put(worker, number, soon(), [text("globex/number")])
    run(worker, lambda: len(heard.answers) == 7)
    assert max(heard.taken_at[number] for number in range(2, 8)) <= 2


def test_callers_take_turns_however_many_requests_they_have(
    work: Callable[..., tuple[Worker, Heard]],
) -> None:
    worker, heard = work(max_tokens=64)
    for number in range(300):
        put(worker, number, soon(), [text("acme/topics")], "many")
    for number in range(300, 310):
        put(worker, number, soon(), [text("globex/number")], "few")
    run(worker, lambda: len(heard.answers) == 310)
    few = max(heard.taken_at[number] for number in range(300, 310))
    assert few < max(heard.taken_at.values()) / 5


def test_what_a_short_text_waits_for_is_short(
    work: Callable[..., tuple[Worker, Heard]],
) -> None:
    """Its batch holds no long pieces, and no batch of long ones is long, unless one piece is."""
    worker, heard = work(max_tokens=1024)
    put(worker, 1, soon(), [text("acme/spans", LONG * 40)] * 8)
    for number in range(2, 30):
        put(worker, number, soon(), [text("acme/topics")])
    run(worker, lambda: len(heard.answers) == 29)
    assert len(heard.batches) > 50
    for batch in heard.batches:
        assert batch["tasks"] == 1, "short texts and pieces of long ones are apart"
        assert batch["tokens"] <= 128 or batch["tokens"] / batch["rows"] < 20, batch
    assert max(heard.taken_at[number] for number in range(2, 30)) <= 2


def test_batches_mix_tasks_and_keep_the_budget(
    work: Callable[..., tuple[Worker, Heard]], tasks: Tasks
) -> None:
    names = ("acme/topics", "acme/many", "acme/spans", "globex/number")
    worker, heard = work(max_tokens=128)
    for number in range(40):
        put(worker, number, soon(), [text(names[number % 4], LONG[: 10 + number])])
    run(worker, lambda: len(heard.answers) == 40)
    assert max(batch["tasks"] for batch in heard.batches) == 4
    assert all(batch["tokens"] <= 128 for batch in heard.batches)
    assert sum(batch["rows"] for batch in heard.batches) == 40
    for number, (answer,) in heard.answers.items():
        (alone,) = tasks.predict([(names[number % 4], LONG[: 10 + number])])
        assert_same(answer, alone)


def assert_same(answer: dict[str, Any], alone: Prediction) -> None:
    expected = alone.as_dict()
    assert set(answer) == set(expected) | {"task", "digest", "kind"}
    for field in ("score", "value"):
        if field in expected:
            assert answer[field] == pytest.approx(expected[field], abs=1e-4)
    spans = [(s["start"], s["end"], s["label"]) for s in answer.get("spans", ())]
    assert spans == [(s["start"], s["end"], s["label"]) for s in expected.get("spans", ())]


def test_a_bug_ends_all_threads(tasks: Tasks) -> None:
    """It is raised where the worker runs, so that the process ends and is started again."""
    seen: list[str] = []

    def send(message: tuple[Any, ...]) -> None:
        seen.append(threading.current_thread().name)
        raise RuntimeError("nobody hears")

    worker = Worker(tasks, send, max_tokens=256, wait_s=0.0, threads=3)
    for number in range(300):
        put(worker, number, soon(), [text("acme/topics")])
    with pytest.raises(RuntimeError, match="nobody hears"):
        worker.run()
    assert 1 <= len(seen) <= 3
    assert not any(t.name in seen and t.is_alive() for t in threading.enumerate()[1:])


def test_no_time_left(work: Callable[..., tuple[Worker, Heard]]) -> None:
    worker, heard = work()
    put(worker, 1, time.monotonic() - 1, [text("acme/topics")] * 3)
    put(worker, 2, soon(), [text("acme/topics")])
    run(worker, lambda: len(heard.answers) == 2)
    assert [answer["refused"] for answer in heard.answers[1]] == ["deadline"] * 3
    assert sum(batch["rows"] for batch in heard.batches) == 1


def test_called_off(work: Callable[..., tuple[Worker, Heard]]) -> None:
    worker, heard = work()
    put(worker, 1, soon(), [text("acme/topics")] * 50)
    worker.call_off(1)
    put(worker, 2, soon(), [text("acme/topics")])
    run(worker, lambda: 2 in heard.answers)
    assert set(heard.answers) == {2}
    assert sum(batch["rows"] for batch in heard.batches) == 1
    worker, heard = work()
    put(worker, 1, soon(), [text("acme/spans", LONG * 40)] * 50)

    is_off = False

    def call_off_in_the_middle() -> bool:
        nonlocal is_off
        if len(heard.batches) >= 2 and not is_off:
            is_off = True
            worker.call_off(1)
            put(worker, 2, soon(), [text("acme/topics")])
        return 2 in heard.answers

    run(worker, call_off_in_the_middle)
    assert sum(batch["rows"] for batch in heard.batches) < 1000


def test_texts_that_cannot_be_read(work: Callable[..., tuple[Worker, Heard]]) -> None:
    """One that cannot be read takes none of its neighbours with it."""
    worker, heard = work()
    bad = (" ", "\ud800", "[SEP] " * 9, "")
    put(worker, 1, soon(), [text("acme/topics", one) for one in (*bad, "saw")])
    texts = [text("acme/nobody"), ("acme/topics", "saw", "plum"), text("acme/topics")]
    put(worker, 2, soon(), texts)
    put(worker, 3, soon(), [text("acme/nobody")])
    put(worker, 4, soon(), [text("acme/spans", "\u200b"), text("acme/spans", "\0 plum")])
    run(worker, lambda: len(heard.answers) == 4)
    assert [answer.get("refused") for answer in heard.answers[1]] == ["unreadable"] * 4 + [None]
    codes = [answer.get("refused") for answer in heard.answers[2]]
    assert codes == ["unknown_task", "unreadable", None]
    assert heard.answers[3][0]["refused"] == "unknown_task"
    assert all("refused" not in answer for answer in heard.answers[4])


def test_an_engine_that_fails(
    work: Callable[..., tuple[Worker, Heard]], tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch fails, the next one does not."""
    worker, heard = work()
    logits = tasks.engine.logits

    def fail_once(*args: Any) -> Any:
        monkeypatch.setattr(tasks.engine, "logits", logits)
        raise MemoryError("a text")

    monkeypatch.setattr(tasks.engine, "logits", fail_once)
    put(worker, 1, soon(), [text("acme/topics")])

    def then_another() -> bool:
        if 1 in heard.answers and 2 not in heard.answers:
            put(worker, 2, soon(), [text("acme/topics")])
            time.sleep(0.05)
        return 2 in heard.answers

    run(worker, then_another)
    (failed,) = heard.answers[1]
    assert (failed["refused"], failed["sentence"]) == (
        "engine",
        "The engine failed with MemoryError.",
    )
    assert heard.answers[2][0]["label"]


def test_numbers_too_large_to_answer(make: Callable[..., Path], bert: Path, tmp_path: Path) -> None:
    tasks = Tasks(str(bert), precision="fp32")
    read = tasks.bank.read(make(tmp_path / "x"))
    read.head.fill_(3e38)
    tasks.bank.put(read, "x")
    heard = Heard()
    worker = Worker(tasks, heard, max_tokens=64, wait_s=0)
    put(worker, 1, soon(), [text("x")])
    run(worker, lambda: 1 in heard.answers)
    assert heard.answers[1][0]["refused"] == "not_finite"


def test_one_request_one_version(
    work: Callable[..., tuple[Worker, Heard]],
    tasks: Tasks,
    make: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """A request that takes many batches is answered by the version that was there when it came."""
    first = tasks.add(make(tmp_path / "first", "tag", seed=11), "changing")
    second = tasks.bank.read(make(tmp_path / "second", "tag", seed=12))
    worker, heard = work(max_tokens=64)
    put(worker, 1, soon(), [text("changing", LONG)] * 60)
    is_changed = False

    def change_in_the_middle() -> bool:
        nonlocal is_changed
        if len(heard.batches) > 3 and not is_changed:
            is_changed = True
            tasks.bank.put(second, "changing")
            put(worker, 2, soon(), [text("changing", LONG)])
        return len(heard.answers) == 2

    run(worker, change_in_the_middle)
    tasks.remove("changing")
    assert {answer["digest"] for answer in heard.answers[1]} == {first.digest}
    assert heard.answers[2][0]["digest"] == second.card.digest


def test_lanes_lose_nothing() -> None:
    lanes = Lanes[int](short=10, long=40)
    for i in range(200):
        lanes.put("ab"[i % 7 % 2], i % 7, i, i % 23)
    lanes.drop(3)
    found: list[int] = []
    while lanes:
        some = lanes.take(50)
        assert some
        found += some
    assert sorted(found) == [i for i in range(200) if i % 7 != 3]


def test_a_text_that_makes_the_engine_fail(
    work: Callable[..., tuple[Worker, Heard]], tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails alone: not the others of its request, nor those of its batch."""
    worker, heard = work()
    logits = tasks.engine.logits

    def fail(examples: Any, its: Any, *rest: Any) -> Any:
        if any(task.name == "globex/number" for task in its):
            raise IndexError("a text")
        return logits(examples, its, *rest)

    monkeypatch.setattr(tasks.engine, "logits", fail)
    put(worker, 1, soon(), [text("acme/topics"), text("globex/number"), text("acme/spans", LONG)])
    put(worker, 2, soon(), [text("acme/topics")] * 5)
    put(worker, 3, soon(), [text("globex/number")])
    run(worker, lambda: len(heard.answers) == 3)
    assert [answer.get("refused") for answer in heard.answers[1]] == [None, "engine", None]
    assert heard.answers[1][1]["sentence"] == "The engine failed with IndexError."
    assert all("refused" not in answer for answer in heard.answers[2])
    assert heard.answers[3][0]["refused"] == "engine"


def test_a_long_text_of_which_a_window_makes_the_engine_fail(
    work: Callable[..., tuple[Worker, Heard]], tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused once, and its other windows hold up nobody."""
    worker, heard = work(max_tokens=64)
    encode, logits, bad = tasks.encode, tasks.engine.logits, list[Any]()

    def choose(its: Any, rows: Any) -> Any:
        found = encode(its, rows)
        bad.extend(own[5] for own in found if len(own) > 20)
        return found

    def fail(examples: Any, its: Any, *rest: Any) -> Any:
        if any(example is one for example in examples for one in bad):
            raise MemoryError
        return logits(examples, its, *rest)

    monkeypatch.setattr(tasks, "encode", choose)
    monkeypatch.setattr(tasks.engine, "logits", fail)
    put(worker, 1, soon(), [text("acme/spans", LONG * 30), text("acme/topics")])
    put(worker, 2, soon(), [text("acme/spans", LONG)])
    run(worker, lambda: len(heard.answers) == 2)
    assert len(bad) == 1
    assert "refused" not in heard.answers[2][0]
    assert [answer.get("refused") for answer in heard.answers[1]] == ["engine", None]
