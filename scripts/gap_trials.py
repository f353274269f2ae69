"""Trials for the gap between PASTA and full fine-tuning: variants side by side, scored on dev only.

    python scripts/gap_trials.py snips-slots stsb --variants plain everywhere-3e-3

The variants of one data set train as one fleet. results/gap-trials.json keeps what came out; what is in
it already is not run again.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pastina.errors import PastinaError
from pastina.files import whole_file
from pastina.recipe import Recipe, make_recipe, read_recipe
from pastina.training.fit import machine, train, versions
from pastina.training.fleet import train_fleet

OUT = Path("results/gap-trials.json")
ROWS = {"limit": 600, "dev_rows": 500}
PASTA: dict[str, Any] = {"name": "pasta"}
ALL: dict[str, Any] = {"name": "pasta", "share": "by_token", "everywhere": True}
SHARED: dict[str, Any] = {"name": "pasta", "share": "all", "everywhere": True}
FIT: dict[str, Any] = {"precision": "bf16", "epochs": 12}
WIDE: dict[str, Any] = {"warmup": 0.3, "schedule": "cosine"}

# BitFit on a few layers.
BIASES: dict[str, Any] = {"bias_layers": [3, 4, 5]}

FULL = ({"name": "full"}, {"lr": 2e-4, "epochs": 10})  # the teacher; a fleet cannot train it

# What is tried: the method part of a recipe, and what is particular about how it learns.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (PASTA, {}),
    "everywhere": (ALL, {}),
    "everywhere-1e-3": (ALL, {"everywhere_lr": 1e-3}),
    "everywhere-3e-3": (ALL, {"everywhere_lr": 3e-3}),
    "everywhere-1e-2": (ALL, {"everywhere_lr": 1e-2}),
    "everywhere-batch-8": (ALL, {"everywhere_lr": 3e-3, "batch": 8, "lr": 1.5e-2}),
    "everywhere-no-dropout": (ALL | {"dropout": 0.0}, {"everywhere_lr": 3e-3}),
    "shared-scale-3e-3": (SHARED | {"scale": True}, {"everywhere_lr": 3e-3}),
    "shared-scale-1e-2": (SHARED | {"scale": True}, {"everywhere_lr": 1e-2}),
    "everywhere-warm": (ALL, WIDE),
    "everywhere-warm-5e-2": (ALL, WIDE | {"lr": 5e-2}),
    "plain-warm": (PASTA, WIDE),
    "plain-40": (PASTA, {"epochs": 40}),
    "plain-scale": (PASTA | {"scale": True}, {}),
    "plain-extra-4": (PASTA | {"extra_tokens": 4}, {}),
    "plain-smooth": (PASTA, {"label_smoothing": 0.1}),
    "plain-consistent": (PASTA, {"consistency": 1.0}),
    "plain-decay": (PASTA, {"layer_decay": 0.8}),
    "plain-ema": (PASTA, {"ema": 0.98}),
    "plain-slots": (PASTA | {"share": "by_token"}, {"slot_rates": [1.0, 0.3]}),
    # by how long the special tokens' states are at the input of each layer, over the mean of the layers
    # (`pastina look` tells of them); by Adam's rule a rate is a scale
    "plain-to-scale": (PASTA, {"layer_rates": [0.76, 1.05, 1.02, 1.05, 1.15, 0.97]}),
    "plain-cls": (PASTA, {"pooling": "cls"}),
    "plain-product": (PASTA | {"rank": 2}, {"rank_lr": 1e-2}),
    "plain-top-out": (PASTA, {"num_layers": -1}),
    "wide-product": (ALL | {"rank": 2}, WIDE | {"rank_lr": 1e-2}),
    "wide-product-1": (ALL | {"rank": 1}, WIDE | {"rank_lr": 1e-2}),
    "wide-product-3": (ALL | {"rank": 3}, WIDE | {"rank_lr": 1e-2}),
    "wide-product-40": (ALL | {"rank": 2}, WIDE | {"rank_lr": 1e-2, "epochs": 40}),
    "wide-product-100": (ALL | {"rank": 2}, WIDE | {"rank_lr": 1e-2, "epochs": 100}),
    "wide-product-3-40": (ALL | {"rank": 3}, WIDE | {"rank_lr": 1e-2, "epochs": 40}),
    "wide-product-3-100": (ALL | {"rank": 3}, WIDE | {"rank_lr": 1e-2, "epochs": 100}),
    "wide-product-3-100-1e-2": (
        ALL | {"rank": 3},
        WIDE | {"lr": 1e-2, "rank_lr": 1e-2, "epochs": 100},
    ),
    "wide-product-3-40-consistent": (
        ALL | {"rank": 3},
        WIDE | {"rank_lr": 1e-2, "epochs": 40, "consistency": 1.0},
    ),
    "wide-product-3-40-dropout-3": (
        ALL | {"rank": 3, "dropout": 0.3},
        WIDE | {"rank_lr": 1e-2, "epochs": 40},
    ),
    "wide-product-40-3e-2": (ALL | {"rank": 2}, WIDE | {"rank_lr": 3e-2, "epochs": 40}),
    "wide-product-40-3e-3": (ALL | {"rank": 2}, WIDE | {"rank_lr": 3e-3, "epochs": 40}),
    "wide-product-40-batch-8": (
        ALL | {"rank": 2},
        WIDE | {"lr": 1.5e-2, "rank_lr": 5e-3, "epochs": 40, "batch": 8},
    ),
    "wide-top-out": (ALL, WIDE | {"num_layers": -1}),
    "wide-product-top-out": (ALL | {"rank": 2}, WIDE | {"rank_lr": 1e-2, "num_layers": -1}),
    "wide-product-1-top-out": (ALL | {"rank": 1}, WIDE | {"rank_lr": 1e-2, "num_layers": -1}),
    "plain-taught": (PASTA, {"teacher": "full fine-tuning"}),
    "plain-biases": (PASTA | BIASES, {"bias_lr": 5e-3}),
    "plain-biases-2e-3": (PASTA | BIASES, {"bias_lr": 2e-3}),
    "everywhere-warm-1e-2": (ALL, WIDE | {"everywhere_lr": 1e-2}),
    "wide-40": (ALL, WIDE | {"epochs": 40}),
    "wide-40-5e-2": (ALL, WIDE | {"epochs": 40, "lr": 5e-2}),
    "wide-40-taught": (ALL, WIDE | {"epochs": 40, "teacher": "full fine-tuning"}),
    "wide-scale": (ALL | {"scale": True}, WIDE),
    "wide-scale-1e-2": (ALL | {"scale": True}, WIDE | {"lr": 1e-2}),
    "wide-extra-4": (ALL | {"extra_tokens": 4}, WIDE),
    "wide-smooth": (ALL, WIDE | {"label_smoothing": 0.1}),
    "wide-consistent": (ALL, WIDE | {"consistency": 1.0}),
    "wide-decay": (ALL, WIDE | {"layer_decay": 0.8}),
    "wide-ema": (ALL, WIDE | {"ema": 0.98}),
    "wide-head-3e-2": (ALL, WIDE | {"head_lr": 3e-2}),
    "everywhere-warm-biases": (ALL | BIASES, WIDE | {"bias_lr": 5e-3}),
    "wide-40-biases": (ALL | BIASES, WIDE | {"epochs": 40, "bias_lr": 5e-3}),
    "wide-product-40-biases": (
        ALL | {"rank": 2, "bias_layers": [5]},
        WIDE | {"rank_lr": 1e-2, "epochs": 40, "bias_lr": 5e-3},
    ),
    "wide-product-1-40-biases": (
        ALL | {"rank": 1, "bias_layers": [4, 5]},
        WIDE | {"rank_lr": 1e-2, "epochs": 40, "bias_lr": 5e-3},
    ),
    "lora": ({"name": "lora"}, {"lr": 3e-3}),
    "lora-24": ({"name": "lora"}, {"lr": 3e-3, "epochs": 24}),
    "bitfit": ({"name": "bitfit"}, {"lr": 5e-3}),
    "bitfit-query-up": ({"name": "bitfit", "biases": "query_up"}, {"lr": 1e-2}),
    "ln-tuning": ({"name": "ln_tuning"}, {"lr": 1e-2}),
    "ia3": ({"name": "ia3"}, {"lr": 2e-2}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[13])
    given = parser.parse_args()
    for data in given.sets:
        run(data, given.variants, given.seeds)


def run(data: str, labels: list[str], seeds: list[int]) -> None:
    """Train what is missing for one data set."""
    known = {(t["data"], t["variant"], t["seed"]) for t in trials()}
    wanted = [(v, s) for v in labels for s in seeds if (data, v, s) not in known]
    base = read_recipe(Path(f"recipes/minilm/{data}.toml")).model_dump(
        mode="json", exclude_none=True
    )
    if not wanted:
        return
    work = Path(tempfile.mkdtemp(prefix="gap-trials-"))

    def recipe(name: str, seed: int, method: dict[str, Any], fit: dict[str, Any]) -> Recipe:
        fit = FIT | fit | {"seed": seed}
        parts = {"head": "pooling", "backbone": "num_layers"}
        own = {part: base[part] | _taken(fit, key) for part, key in parts.items()}
        own |= {"method": method, "data": base["data"] | ROWS, "fit": fit}
        return make_recipe({**base, **own, "name": f"{data}-{name}-{seed}"})

    def wanted_recipe(variant: str, seed: int) -> Recipe:
        method, fit = VARIANTS[variant]
        if "teacher" in fit:  # trained on the same rows first
            teacher = work / f"teacher-{seed}"
            if not teacher.exists():
                train(recipe("teacher", seed, *FULL), teacher)
            fit = fit | {"teacher": str(teacher)}
        return recipe(variant, seed, method, fit)

    try:
        recipes = [wanted_recipe(variant, seed) for variant, seed in wanted]
        runs = train_fleet(recipes, [work / f"{v}-{s}" for v, s in wanted])
        for (variant, seed), found in zip(wanted, runs, strict=True):
            method, fit = VARIANTS[variant]
            trial = {"data": data, "variant": variant, "seed": seed, "method": method}
            trial |= {"fit": FIT | fit, "rows": ROWS}
            if isinstance(found, PastinaError):
                trial["error"] = str(found)
            else:
                lines = (found.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                dev = [round(json.loads(line)["dev"][found.metric], 4) for line in lines]
                trial |= {
                    "metric": found.metric,
                    "score": max(dev),
                    "epochs": dev,
                    "trained": found.trained_parameters,
                }
            add(trial)
            print(data, variant, seed, trial.get("score", trial.get("error")), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _taken(settings: dict[str, Any], key: str) -> dict[str, Any]:
    return {key: settings.pop(key)} if key in settings else {}


def trials() -> list[dict[str, Any]]:
    """What was tried so far."""
    return json.loads(OUT.read_text(encoding="utf-8"))["trials"] if OUT.is_file() else []


def add(trial: dict[str, Any]) -> None:
    """Keep one more."""
    content = {"versions": versions(), "machine": machine(), "trials": [*trials(), trial]}
    with whole_file(OUT) as file:
        json.dump(content, file, indent=1)


if __name__ == "__main__":
    main()
