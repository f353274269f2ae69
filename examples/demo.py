"""The whole way on the samples that come with the package: train, evaluate, predict.

A classifier of support messages (8 intents) and a tagger of order messages (product, date, amount),
both on the same frozen backbone. Run it through scripts/demo, or `python examples/demo.py [FOLDER]`.
"""

import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

import pastina
from pastina.adapter import size_on_disk
from pastina.data.samples import sample_path
from pastina.errors import PastinaError
from pastina.progress import show_progress
from pastina.recipe import Recipe, make_recipe

console = Console(stderr=True, highlight=False)
TEXTS = {
    "intents": "I sent the shoes back two weeks ago and still have no money",
    "orders": "Please send two espresso machines by 3 March, I can pay 250 euros",
}


def sample_recipe(task: str, kind: str) -> Recipe:
    """The recipe for one of the sample data sets."""
    parts = {part: str(sample_path(f"{task}_{part}.jsonl")) for part in ("train", "dev", "test")}
    return make_recipe(
        {"name": task, "kind": kind, "data": parts, "fit": {"epochs": 20, "batch": 16}}
    )


def main() -> None:
    """Train, evaluate and use both tasks; the folder holds the runs afterwards."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="pastina-"))
    started = time.monotonic()
    for task, kind in (("intents", "classify"), ("orders", "tag")):
        console.print(f"[bold]{task}[/bold]: training a task of kind {kind} ...")
        with show_progress(console) as on_event:
            run = pastina.train(sample_recipe(task, kind), folder / task, on_event=on_event)
        metrics = pastina.evaluate(run.adapter)
        answer = pastina.load(run.adapter).predict([TEXTS[task]])[0]
        print(f"\n{task}: {run.metric} {metrics[run.metric]:.3f} on held-out messages")
        print(f"  {TEXTS[task]!r}")
        if answer.spans is None:
            print(f"  -> {answer.label} ({answer.score:.2f})")
        else:
            found = ", ".join(f"{s.label}: {TEXTS[task][s.start : s.end]}" for s in answer.spans)
            print(f"  -> {found}")
        print(f"  {run.adapter}: {size_on_disk(run.adapter) / 1000:.0f} kB, of which ", end="")
        print(f"{run.trained_parameters:,} trained numbers; the backbone has 22.7 million\n")
    print(f"Both done in {time.monotonic() - started:.0f} s. List them: pastina tasks {folder}")


if __name__ == "__main__":
    try:
        main()
    except PastinaError as error:
        sys.exit(f"demo: {error}")
