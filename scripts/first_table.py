"""The first table: linear probe, PASTA and full fine-tuning on eight real data sets, one seed.

    .venv/bin/python scripts/first_table.py [--only banking77 qnli/pasta]

Reads recipes/minilm/*.toml, trains each set with each method by the same loop and writes
results/first-table.json after each run. The epoch is chosen on dev; test is looked at
once, at the end of a run. Stop it at any time; the next start goes on where it was.
"""

import argparse
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pastina import evaluate, read_recipe, train
from pastina.files import whole_file
from pastina.recipe import Recipe
from pastina.training.events import EpochEnd, Event

SETS = ("banking77", "clinc150", "snips-intent", "snips-slots", "wnut17", "bc5cdr", "stsb", "qnli")
METHODS = ("linear", "pasta", "full")
RESULT = Path("results/first-table.json")
log = logging.getLogger("first-table")


def method_recipe(name: str, method: str, limit: int) -> Recipe:
    """The recipe of a data set with a method at its default rates."""
    overrides = [f"method={method}"]
    if limit:
        overrides.append(f"data.limit={limit}")
    return read_recipe(f"recipes/minilm/{name}.toml", overrides)


def run_one(name: str, method: str, limit: int, runs: Path) -> dict[str, Any]:
    """Train (or go on training) one cell and look at its test part."""
    folder = runs / f"{name}-{method}"
    recipe = method_recipe(name, method, limit)

    def tell(event: Event) -> None:
        if isinstance(event, EpochEnd):
            log.info("%s %s epoch %d: %s", name, method, event.epoch, event.metrics)

    run = train(recipe, folder, resume=(folder / "recipe.toml").is_file(), on_event=tell)
    test = evaluate(run.adapter)
    result = json.loads((folder / "result.json").read_text())
    entry = {
        "data": name,
        "method": method,
        "metric": run.metric,
        "dev": run.metrics[run.metric],
        "test": test[run.metric],
        "trained_parameters": run.trained_parameters,
        "seconds": round(run.seconds, 1),
        "seed": recipe.fit.seed,
        "best_epoch": run.best_epoch,
        "test_all": test,
        **{key: result[key] for key in ("engine", "adapter_bytes", "rows", "recipe")},
        **{key: result[key] for key in ("backbone", "data_digest", "versions", "machine")},
    }
    shutil.rmtree(folder / "state", ignore_errors=True)
    return entry


def read_entries() -> list[dict[str, Any]]:
    """The cells that are done."""
    return json.loads(RESULT.read_text()) if RESULT.is_file() else []


def main() -> None:
    """Run what is missing, cell by cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=Path, default=Path("runs/first-table"))
    parser.add_argument("--limit", type=int, default=0, help="training rows; 0: all")
    parser.add_argument("--only", nargs="*", default=[], help="sets, methods, or set/method")
    wanted = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for method in METHODS:
        for name in SETS:
            names = {name, method, f"{name}/{method}"}
            is_done = any((e["data"], e["method"]) == (name, method) for e in read_entries())
            if is_done or (wanted.only and not names & set(wanted.only)):
                continue
            entry = run_one(name, method, wanted.limit, wanted.runs)
            entries = [*read_entries(), entry]  # another process may have added some
            order = {key: i for i, key in enumerate((s, m) for s in SETS for m in METHODS)}
            entries.sort(key=lambda entry: order[entry["data"], entry["method"]])
            with whole_file(RESULT) as file:
                json.dump(entries, file, indent=1)
            log.info("%s %s: test %.4f", name, method, entry["test"])


if __name__ == "__main__":
    main()
