"""What products in bf16 and int8 change: PASTA on four real sets, dev metric by precision.

    .venv/bin/python scripts/precision_table.py

"train": trained and scored in each precision, by a fleet of seeds on a cut of each set. "predict": the
adapters that fp32 trained, scored on dev in each precision. Writes results/precision.json after each
fleet; the next start goes on where this one stopped, and does again what was done with other seeds or on
another cut. The test parts are not read.
"""

import json
import logging
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pastina import read_recipe, train_fleet
from pastina.engine.affine import Precision
from pastina.files import whole_file
from pastina.predict import load
from pastina.training.evaluate import evaluate
from pastina.training.fit import Run, machine, versions

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
# QNLI's runs differ most from seed to seed
SEEDS = {
    "qnli": (13, 14, 15, 16, 17, 18),
    "stsb": (13, 14),
    "wnut17": (13, 14),
    "clinc150": (13, 14),
}
CUT = ["data.limit=1200", "fit.epochs=5"]
RESULT = Path("results/precision.json")
RUNS = Path("runs/precision")
log = logging.getLogger("precision")


def run_fleet(name: str, precision: str) -> list[Run]:
    """One run for each seed, all trained together."""
    settings = [*CUT, f"fit.precision={precision}"]
    path = f"recipes/minilm/{name}.toml"
    recipes = [read_recipe(path, [*settings, f"fit.seed={seed}"]) for seed in SEEDS[name]]
    outs = [RUNS / f"{name}-{precision}-{seed}" for seed in SEEDS[name]]
    found = train_fleet(recipes, outs, resume=True)
    for run in found:
        if not isinstance(run, Run):
            raise run
    return [run for run in found if isinstance(run, Run)]


def entry(name: str, precision: Precision) -> dict[str, Any]:
    """Train in this precision, and score in it what fp32 trained."""
    runs = run_fleet(name, precision)
    scores = [run.metrics[run.metric] for run in runs]
    trained = [run.adapter for run in run_fleet(name, "fp32")]  # done already, mostly
    metric = runs[0].metric
    predicted = [evaluate(path, part="dev", precision=precision)[metric] for path in trained]
    return {
        "data": name,
        "precision": precision,
        "metric": metric,
        "train": statistics.fmean(scores),
        "train_by_seed": dict(zip(map(str, SEEDS[name]), scores, strict=True)),
        "predict": statistics.fmean(predicted),
        "engine": load(runs[0].adapter, precision=precision).engine.name,
        "settings": CUT,
        "versions": versions(),
        "machine": machine(),
    }


def main() -> None:
    """What is missing, fp32 first."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    entries = json.loads(RESULT.read_text()) if RESULT.is_file() else []
    for name in SEEDS:
        for precision in PRECISIONS:
            old = next(
                (e for e in entries if (e["data"], e["precision"]) == (name, precision)), None
            )
            seeds = [str(seed) for seed in SEEDS[name]]
            if old and old["settings"] == CUT and [*old["train_by_seed"]] == seeds:
                continue
            one = entry(name, precision)
            entries = [e for e in entries if e is not old] + [one]
            with whole_file(RESULT) as file:
                json.dump(entries, file, indent=1)
            log.info("%s %s: %.4f %.4f", name, precision, one["train"], one["predict"])
    shutil.rmtree(RUNS)


if __name__ == "__main__":
    main()
