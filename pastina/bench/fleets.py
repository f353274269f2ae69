"""Many small runs: as one fleet, against one after the other."""

from collections.abc import Sequence
from pathlib import Path

import torch

from pastina.bench.timing import in_turn, ratio, seconds
from pastina.bench.work import Measured, Work
from pastina.errors import PastinaError
from pastina.recipe import Recipe
from pastina.training.fit import train
from pastina.training.fleet import train_fleet

_LOWEST, _HIGHEST = 1e-3, 5e-2


def measure_fleet(work: Work) -> Measured:
    """The time of runs with different learning rates on one small set, over that of their fleet."""
    size = work.size
    recipes = [_recipe(work, lr) for lr in _rates(size.fleet)]

    def outs(kind: str, turn: int) -> list[Path]:
        return [work.scratch / f"{kind}{turn}" / f"run{i}" for i in range(len(recipes))]

    def alone(recipes: Sequence[Recipe], outs: Sequence[Path]) -> None:
        for recipe, out in zip(recipes, outs, strict=True):
            train(recipe, out)

    def together(recipes: Sequence[Recipe], outs: Sequence[Path]) -> None:
        for run in train_fleet(recipes, outs):
            if isinstance(run, PastinaError):
                raise run

    contestants = {
        "alone": lambda turn: seconds(lambda: alone(recipes, outs("alone", turn))),
        "fleet": lambda turn: seconds(lambda: together(recipes, outs("fleet", turn))),
    }
    raw = in_turn(contestants, size.repetitions, lambda: work.tick(2 * size.repetitions))
    here, other = ("gpu", "cpu") if torch.cuda.is_available() else ("cpu", "gpu")
    why = "a GPU is there, and training takes it" if here == "gpu" else "there is no CUDA device"
    key = f"fleet_16_{here}"
    figures = {key: ratio(raw["alone"], raw["fleet"]), f"fleet_16_{other}": None}
    return Measured(
        figures,
        {key: {"unit": "seconds", "members": len(recipes), **raw}},
        {f"fleet_16_{other}": f"Not measured: {why}."},
    )


def _recipe(work: Work, lr: float) -> Recipe:
    size = work.size
    return work.recipe(
        "clinc150",
        data={"limit": size.fleet_rows, "dev": None, "dev_share": 0.03},
        fit={"epochs": size.fleet_epochs, "lr": lr},
    )


def _rates(count: int) -> list[float]:
    """Learning rates at equal distances of their logarithms."""
    step = (_HIGHEST / _LOWEST) ** (1 / max(count - 1, 1))
    return [_LOWEST * step**i for i in range(count)]
