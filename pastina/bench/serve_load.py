"""A server's speed: against its own engine, by the number of tasks, half loaded, for a long time, and
beside what people use today."""

import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pastina.bench.broken import broken_archives, packed
from pastina.bench.copies import CLASSES, write_copies
from pastina.bench.load import Found, Orders, run_load
from pastina.bench.served import Bare, Served, call, served
from pastina.bench.serving import ServeWork
from pastina.bench.timing import in_turn, ratio, short
from pastina.bench.work import Measured
from pastina.errors import PastinaError
from pastina.serve.access import token_file

_WARM = 0.25  # of a repetition's seconds, before the first one
_MANY = tuple(range(2, 10))  # numbers of labels by which versions can be told apart
_MEASURES = ("texts_per_s", "mb", "ready_s")
_RIVALS = {"FastAPI + PEFT set_adapter": "peft", "FastAPI + pipelines": "pipelines"}


def _requests(names: Sequence[str], texts: Sequence[str]) -> list[tuple[str, str]]:
    """One short text a request, each for a task drawn at random."""
    draw = random.Random(0)
    return [
        (f"/v1/tasks/{draw.choice(names)}/predict", json.dumps({"inputs": text}))
        for text in [*texts] * 4
    ]


def _load(work: ServeWork, port: int, names: Sequence[str], seed: int, **options: Any) -> Found:
    size = work.size
    values: dict[str, Any] = {"seconds": size.seconds} | options
    requests = _requests(names, work.texts)
    found = run_load(Orders(port, requests, size.connections, seed=seed, **values))
    if set(found.statuses) != {"200"}:  # a rate of refusals is none
        raise PastinaError(f"Not all requests were answered: {found.statuses} by status.")
    return found


def measure_served(work: ServeWork) -> Measured:
    """Texts a second over HTTP against the engine alone, and with all tasks against one, which has as
    many classes as they have on average: answers are as long."""
    size = work.size
    many = work.copies("many", size.tasks)
    one = work.copies("one", 1, [round(statistics.fmean(CLASSES))])
    names = [f"task{i}" for i in range(size.tasks)]
    bare = Bare(many)
    with served(many, work.scratch) as server, served(one, work.scratch) as single:

        def engine(turn: int) -> float:
            return bare.ask(
                verb="rate",
                seconds=size.seconds,
                tasks=names,
                texts=work.texts,
                rows=size.rows,
                seed=turn,
            )

        contestants = {
            "engine": engine,
            "served_all_tasks": lambda turn: _load(work, server.port, names, turn).rate,
            "served_one_task": lambda turn: _load(work, single.port, names[:1], turn).rate,
        }
        for contestant in contestants.values():
            contestant(0)  # warm
        raw = in_turn(contestants, size.repetitions, lambda: work.tick(3 * size.repetitions))
    bare.close()
    about = {"unit": "texts/s", "tasks": size.tasks, "connections": size.connections}
    share = {"engine": raw["engine"], "served": raw["served_all_tasks"]}
    tasks = {key: raw[key] for key in ("served_all_tasks", "served_one_task")}
    return Measured(
        {
            "served_share_1000": ratio(share["served"], share["engine"]),
            "served_1000_vs_1": ratio(tasks["served_all_tasks"], tasks["served_one_task"]),
        },
        {"served_share_1000": about | share, "served_1000_vs_1": about | tasks},
    )


def measure_latency(work: ServeWork) -> Measured:
    """Latency at half of the full load, in times of one bare forward of one text: transformers' own of
    the backbone, in fp32. And in times of the engine's, which is faster."""
    size = work.size
    folder = work.copies("many", size.tasks)
    names = [f"task{i}" for i in range(size.tasks)]
    bare = Bare(folder)
    orders = {"task": names[0], "texts": work.texts[:50], "backbone": str(work.files.folder)}
    units = {"bare_forward": "forwards", "engine_forward": "engine_forwards"}
    rows: dict[str, list[float]] = {key: [] for key in ("full_rate", *units, "p50", "p99")}
    with served(folder, work.scratch) as server:
        _load(work, server.port, names, 0)  # warm
        for turn in range(size.repetitions):
            full = _load(work, server.port, names, turn).rate
            half = _load(work, server.port, names, turn, rate=full / 2)
            latencies = sorted(half.latencies)
            rows["full_rate"].append(full)
            for unit in units:
                rows[unit].append(bare.ask(verb=unit, **orders))
            rows["p50"].append(latencies[len(latencies) // 2])
            rows["p99"].append(latencies[min(int(len(latencies) * 0.99), len(latencies) - 1)])
            work.tick(size.repetitions)
    bare.close()
    figures, raw = {}, {}
    for unit, name in units.items():
        for p in ("p50", "p99"):
            figures[f"{p}_{name}"] = ratio(rows[p], rows[unit])
            about = {"unit": "seconds", "full_rate": rows["full_rate"]}
            raw[f"{p}_{name}"] = about | {unit: rows[unit], p: rows[p]}
    return Measured(figures, raw)


def measure_start(work: ServeWork) -> Measured:
    """From the engine's imports to ready, with many adapters; and from the command to ready."""
    size = work.size
    folder = work.copies("many", size.tasks)
    seconds, whole = [], []
    for _ in range(size.repetitions):
        started = time.monotonic()
        with served(folder, work.scratch) as server:
            whole.append(time.monotonic() - started)
            seconds.append(server.lines("ready")[0]["seconds"])
        work.tick(size.repetitions)
    return Measured(
        {"start_1000_s": short(statistics.median(seconds))},
        {
            "start_1000_s": {
                "unit": "seconds",
                "tasks": size.tasks,
                "after_imports": seconds,
                "from_command": whole,
            }
        },
    )


# ---------------------------------------------------------------------------------------------------
# For a long time


def measure_soak(work: ServeWork) -> Measured:
    """Full load while a task is replaced each second and broken archives come in."""
    size = work.size
    folder = work.copies("many", size.tasks)
    versions = write_copies(work.adapter, work.scratch / "versions", len(_MANY), _MANY)
    names, texts = [f"task{i}" for i in range(size.tasks)], work.texts[: size.soak_texts]
    pairs = [(name, text) for name in names for text in texts]
    bare = Bare(folder, "fp32")
    truth = bare.ask(verb="truth", pairs=pairs)
    for version in versions:  # the first task is the one that is replaced
        bare.ask(verb="add", folder=str(version), name=names[0])
        own = bare.ask(verb="truth", pairs=pairs[: len(texts)])
        for known, more in zip(truth, own, strict=False):
            known.update(more)
    bare.close()
    requests = [
        (f"/v1/tasks/{name}/predict", json.dumps({"inputs": text, "top_k": None}))
        for name, text in pairs
    ]
    # of every four requests one is for the task that is replaced
    often = max(1, len(requests) // len(texts) // 3)
    requests += requests[: len(texts)] * often
    truth += truth[: len(texts)] * often
    tokens, token = token_file(work.scratch / "tokens.toml")
    options = ("--tokens", str(tokens), "--uploads", "--precision", "fp32")
    with (
        served(folder, work.scratch, *options) as server,
        _uploads(server, token, versions, lambda: work.tick(round(size.soak_s))) as seen,
    ):
        found = run_load(
            Orders(
                server.port,
                requests,
                size.connections,
                size.soak_s,
                token=token,
                truth=truth,
            )
        )
        statuses = {status: count for status, count in found.statuses.items() if status != "200"}
        starts = server.process.poll() is None and len(server.lines("ready"))
    if not seen["memory"] or set(seen["replaced"]) != {200}:
        raise PastinaError(
            f"The task was not replaced as it should be: {Counter(seen['replaced'])}."
        )
    broken = [
        status for status in seen["broken"] + seen["replaced"] if status >= 500 or status == 0
    ]
    failed = sum(count for status, count in statuses.items() if status == "0" or status >= "500")
    growth = _growth(seen["memory"], size.soak_s)
    raw = {
        "unit": "counts",
        "answers": len(found.latencies),
        "other_statuses": statuses,
        "wrong_ones": found.wrong_ones,
        "replaced": len(seen["replaced"]),
        "broken_archives": dict(Counter(map(str, seen["broken"]))),
        "engine_starts": starts,
        "texts_per_s": short(found.rate),
    }
    memory = {"unit": "MB", "each_second": [round(mb, 1) for mb in seen["memory"]]}
    return Measured(
        {
            "soak_wrong": found.wrong,
            "soak_5xx": failed + len(broken) + (starts != 1),
            "soak_growth": growth,
        },
        {"soak_wrong": raw, "soak_5xx": raw, "soak_growth": memory},
    )


@contextmanager
def _uploads(
    server: Served, token: str, versions: Sequence[Path], after_each: Callable[[], None]
) -> Iterator[dict[str, list[Any]]]:
    """Meanwhile a task is replaced each second, and something broken is sent for another."""
    contents = [_files(version) for version in versions]
    seen: dict[str, list[Any]] = {"memory": [], "replaced": [], "broken": []}
    is_over = threading.Event()
    failures: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            failures.append(error)

    def work() -> None:
        bad = broken_archives(contents[0], 10**9)
        turn, started = 0, time.monotonic()
        while not is_over.wait(started + turn + 1.0 - time.monotonic()):
            url = f"{server.url}/v1/tasks"
            good = packed(contents[turn % len(contents)])
            seen["replaced"].append(call("PUT", f"{url}/task0", good, token)[0])
            _, archive = next(bad)
            seen["broken"].append(call("PUT", f"{url}/task1-broken", archive, token)[0])
            seen["memory"].append(server.memory())
            turn += 1
            after_each()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()
    if failures:
        raise PastinaError(f"What is sent meanwhile ended: {failures[0]!r}")


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _growth(memory: Sequence[float], seconds: float) -> float:
    """The end over the end of the first minute (of a short run: of its first half), less one."""
    first = max(1, round(len(memory) * min(60.0, seconds / 2) / seconds))
    window = max(1, first // 3)
    before = statistics.median(memory[max(0, first - window) : first])
    return short(statistics.median(memory[-window:]) / before - 1)


# ---------------------------------------------------------------------------------------------------
# Beside others


def measure_compare(work: ServeWork) -> Measured:
    """Texts a second, memory and seconds until ready by the number of tasks, of pastina and of what
    people use today."""
    numbers = list(work.size.peers)
    curve: dict[str, Any] = {"axis": "tasks", "x": numbers, **{key: {} for key in _MEASURES}}
    notes: dict[str, str] = {}
    for name in ("pastina serve", *_RIVALS):
        for key in _MEASURES:
            curve[key][name] = []
        for count in numbers:
            found = _ours(work, count) if name not in _RIVALS else _theirs(work, name, count)
            if isinstance(found, str):
                notes[f"{name}, {count} tasks"] = found
            for key in _MEASURES:
                curve[key][name].append(None if isinstance(found, str) else short(found[key]))
            work.tick((1 + len(_RIVALS)) * len(numbers))
    return Measured({}, {}, notes, {"serve": curve})


def _ours(work: ServeWork, count: int) -> dict[str, float]:
    folder = work.copies(f"tasks{count}", count)
    started = time.monotonic()
    with served(folder, work.scratch) as server:
        ready = time.monotonic() - started
        return {**_under_load(work, count, server.port, server.memory), "ready_s": ready}


def _theirs(work: ServeWork, name: str, count: int) -> dict[str, float] | str:
    """The measures; or why there are none."""
    started = time.monotonic()
    with _rival(work, _RIVALS[name], count) as (port, reason, megabytes):
        if port is None:
            return reason
        ready = time.monotonic() - started
        return {**_under_load(work, count, port, megabytes), "ready_s": ready}


def _under_load(
    work: ServeWork, count: int, port: int, megabytes: Callable[[], float]
) -> dict[str, float]:
    names = [f"task{i}" for i in range(count)]
    _load(work, port, names, 0, seconds=_WARM * work.size.seconds)
    found = [_load(work, port, names, turn).rate for turn in range(work.size.repetitions)]
    return {"texts_per_s": statistics.median(found), "mb": megabytes()}


@contextmanager
def _rival(work: ServeWork, kind: str, count: int) -> Iterator[tuple[int | None, str, Any]]:
    """The port of one of the others; or why it cannot be had."""
    import psutil

    orders = {
        "backbone": str(work.files.folder),
        "count": count,
        "num_labels": 10,
        "limit_s": work.size.peer_limit_s,
    }
    command = [sys.executable, "-m", "pastina.bench.rivals", kind, json.dumps(orders)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        told: dict[str, Any] = (
            json.loads(line) if line else {"reason": "it ended while it was loading"}
        )

        def megabytes() -> float:
            return psutil.Process(process.pid).memory_full_info().pss / 1e6

        yield told.get("port"), told.get("reason", ""), megabytes
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
