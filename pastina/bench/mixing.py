"""Many tasks on one backbone: in one batch, in memory, and on their way into memory."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pastina.bench.copies import write_copies
from pastina.bench.timing import by_turns, now, ratio, short
from pastina.bench.work import Measured, Work
from pastina.errors import PastinaError
from pastina.tasks import Tasks

_HUNDRED = 100
_NO_NOISE = 3  # times as many repetitions: these differ by a few per cent at most, and take no time


def measure_mixed(work: Work) -> Measured:
    """The time of a batch in which every row has its own task, over that of the same rows with one."""
    size = work.size
    folders = write_copies(work.adapter, work.scratch / "mixed", size.mixed_tasks)
    tasks = Tasks(work.backbone)
    for folder in folders:
        tasks.add(folder)
    texts = [work.test_texts[i % len(work.test_texts)] for i in range(len(folders))]
    batches = {
        "one_task": [(folders[0].name, text) for text in texts],
        "all_tasks": [(folder.name, text) for folder, text in zip(folders, texts, strict=True)],
    }
    works = {name: lambda batch=batch: tasks.predict(batch) for name, batch in batches.items()}
    by_turns(works, size.rounds)
    raw: dict[str, list[float]] = {name: [] for name in works}
    repetitions = _NO_NOISE * size.repetitions
    for _ in range(repetitions):
        for name, total in by_turns(works, size.rounds).items():
            raw[name].append(total / size.rounds)
        work.tick(repetitions)
    key = "batch_64_tasks"
    about = {"unit": "seconds", "tasks": len(folders), "precision": tasks.engine.encoder.precision}
    return Measured({key: ratio(raw["all_tasks"], raw["one_task"])}, {key: about | raw})


def measure_resident(work: Work) -> Measured:
    """What many tasks in memory cost, and loading them; each repetition is a process of its own."""
    size = work.size
    folder = work.scratch / "resident"
    write_copies(work.adapter, folder, size.resident_tasks)
    orders = {
        "backbone": work.backbone,
        "folder": str(folder),
        "count": size.resident_tasks,
        "rounds": size.rounds,
        "texts": list(work.test_texts[:64]),
        "threads": torch.get_num_threads(),
    }
    found = []
    for _ in range(size.repetitions):
        found.append(_in_process(orders))
        work.tick(size.repetitions)
    columns = {name: [one[name] for one in found] for name in found[0]}
    one, many, first, last = (columns[name] for name in ("one", "many", "first", "last"))
    figures: dict[str, float | None] = {
        "resident_1000_time": ratio(many, one),
        "resident_1000_mb": short(median(columns["mb"])),
        "load_1000_s": short(median(columns["load"])),
        "load_last_vs_first": ratio(last, first),
    }
    counted = {"tasks": size.resident_tasks}
    repetitions = {
        "resident_1000_time": {"unit": "seconds", **counted, "one_task": one, "all_tasks": many},
        "resident_1000_mb": {"unit": "MB", **counted, "added": columns["mb"]},
        "load_1000_s": {"unit": "seconds", **counted, "all": columns["load"]},
        "load_last_vs_first": {"unit": "seconds", **counted, "first": first, "last": last},
    }
    return Measured(figures, repetitions)


def _in_process(orders: Mapping[str, Any]) -> dict[str, float]:
    """What `_look` finds in a new process, whose memory holds nothing else."""
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=json.dumps(orders), capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        raise PastinaError(f"The process that loads many tasks failed: {last}")
    return json.loads(done.stdout)


def _look(orders: Mapping[str, Any]) -> dict[str, float]:
    torch.set_num_threads(orders["threads"])
    folders = [Path(orders["folder"]) / f"task{i}" for i in range(orders["count"])]
    batch = [(folders[0].name, text) for text in orders["texts"]]
    few, many = Tasks(orders["backbone"]), Tasks(orders["backbone"])
    few.add(folders[0])
    few.predict(batch)
    many.add(folders[0])
    many.predict(batch)
    many.remove(folders[0].name)
    before, loading = _memory(), []
    for folder in folders:
        started = now()
        many.add(folder)
        loading.append(now() - started)
    many.predict(batch)
    after = _memory()
    part = min(_HUNDRED, len(folders) // 2)
    works = {"one": lambda: few.predict(batch), "many": lambda: many.predict(batch)}
    by_turns(works, orders["rounds"])
    times = by_turns(works, _NO_NOISE * orders["rounds"])
    return {
        **{name: total / (_NO_NOISE * orders["rounds"]) for name, total in times.items()},
        "mb": (after - before) / 1e6,
        "load": sum(loading),
        "first": sum(loading[:part]),
        "last": sum(loading[-part:]),
    }


def _memory() -> int:
    import psutil  # accelerate brings it

    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    print(json.dumps(_look(json.load(sys.stdin))))
