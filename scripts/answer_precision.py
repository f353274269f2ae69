"""What int8 changes in answers: adapters trained as by default, dev metric by the precision of answers.

    .venv/bin/python scripts/answer_precision.py

Two seeds each with plain PASTA, on a cut; a tagger and pairs with the presets as well. Writes
results/answer-precision.json after each set; the next start goes on where this one stopped, and does
again what was done with other settings. The test parts are not read.
"""

import json
import logging
import os
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pastina import read_recipe, train_fleet
from pastina.engine.affine import Precision, choose_precision
from pastina.files import whole_file
from pastina.training.evaluate import evaluate
from pastina.training.fit import Run, machine, versions

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
SEEDS = (13, 14)
CUT = ["data.limit=1200", "fit.epochs=5"]
SETS: dict[str, list[str]] = {
    "stsb": [],
    "wnut17": [],
    "clinc150": [],
    "snips-intent": [],
    "snips-slots": [],
    "banking77": [],
    "bc5cdr": [],
    "qnli": [],
    "snips-slots, pasta-tagger": ["preset=pasta-tagger", "fit.epochs=8"],
    "stsb, pasta-wide": ["preset=pasta-wide"],
}
RESULT = Path("results/answer-precision.json")
log = logging.getLogger("precision")


def entry(name: str, folder: Path) -> dict[str, Any]:
    """Train, and score on dev in each precision."""
    settings = [*CUT, *SETS[name]]
    path = f"recipes/minilm/{name.partition(',')[0]}.toml"
    recipes = [read_recipe(path, [*settings, f"fit.seed={seed}"]) for seed in SEEDS]
    found = train_fleet(recipes, [folder / f"{name}-{seed}" for seed in SEEDS])
    for run in found:
        if not isinstance(run, Run):
            raise run
    runs = [run for run in found if isinstance(run, Run)]
    scores = {
        precision: [
            evaluate(run.adapter, part="dev", precision=precision)[run.metric] for run in runs
        ]
        for precision in PRECISIONS
    }
    return {
        "data": name,
        "metric": runs[0].metric,
        "trained": choose_precision("auto", "cpu"),
        "seeds": SEEDS,
        "by_seed": scores,
        "mean": {key: statistics.fmean(own) for key, own in scores.items()},
        "settings": settings,
        "versions": versions(),
        "machine": machine(),
    }


def main() -> None:
    """What is missing."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    entries = json.loads(RESULT.read_text()) if RESULT.is_file() else []
    for name in SETS:
        old = next((e for e in entries if e["data"] == name), None)
        if old and (old["settings"], old["seeds"]) == ([*CUT, *SETS[name]], [*SEEDS]):
            continue
        with TemporaryDirectory() as folder:
            entries = [e for e in entries if e is not old] + [entry(name, Path(folder))]
        with whole_file(RESULT) as file:
            json.dump(entries, file, indent=1)
        log.info("%s %s", name, entries[-1]["mean"])


if __name__ == "__main__":
    main()
