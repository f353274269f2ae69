"""Result files: one small JSON per run, written whole, read with suspicion."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pastina.bench.grid import Cell, Grid, Job, Settings
from pastina.errors import PastinaError
from pastina.files import whole_file
from pastina.kinds import LOWER_IS_BETTER
from pastina.recipe import Recipe

Record = dict[str, Any]
SUMMARY = "grid.json"
_NEEDED = ("id", "data", "size", "method", "rate", "seed", "recipe")


def result_path(folder: Path, job: Job) -> Path:
    """The result file of a job."""
    return folder / f"{job.name}.json"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """One line for each key, so that a person can read it and git can compare it."""
    lines = ",\n".join(
        f" {json.dumps(key)}: {json.dumps(_kept(key, value), ensure_ascii=False, allow_nan=False)}"
        for key, value in record.items()
    )
    with whole_file(path) as file:
        file.write(f"{{\n{lines}\n}}\n")


def read_record(path: Path) -> Record | None:
    """A run's result; None where there is none.

    Raises:
        PastinaError: the file is not a result.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if missing := [key for key in _NEEDED if key not in record]:
            raise ValueError(f"{missing[0]!r} is missing")
        if "error" not in record and record["metric"] not in record["dev"]:
            raise ValueError("it lacks its dev metric")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
        raise PastinaError(
            f"{path} is not a result of a run ({error}). Delete it; `pastina bench run` makes it again."
        ) from None
    return record


def read_of(folder: Path, job: Job) -> Record | None:
    """The result of exactly this job; None where it is missing, broken, or of other settings."""
    try:
        record = read_record(result_path(folder, job))
    except PastinaError:
        return None
    return record if record is not None and _is_of(record, job) else None


def read_twin(folder: Path, job: Job) -> Record | None:
    """The result of the very same run in another cell of the data set, told as this job's; or None."""
    for path in sorted(result_path(folder, job).parent.glob("*.json")):
        try:
            record = read_record(path)
        except PastinaError:
            continue
        if record is not None and "error" not in record and _is_of(record, job):
            return record | about(job)
    return None


def about(job: Job) -> Record:
    """Which run a record is of."""
    return {
        "id": job.id,
        "grid": job.grid,
        "data": job.cell.data,
        "size": job.cell.size,
        "method": job.cell.method,
        "rate": dict(job.settings),
        "seed": job.seed,
        "recipe": job.recipe.model_dump(mode="json", exclude_none=True),
    }


def _is_of(record: Record, job: Job) -> bool:
    if record["id"] != job.id:
        return False
    try:  # an id leaves defaults out; a default that changed since is another run
        recipe = Recipe.model_validate(record["recipe"])
    except ValidationError:
        return False
    return _without_place(recipe) == _without_place(job.recipe)


def _without_place(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(exclude={"name": True, "preset": True, "data": {"folder"}})
    for key in ("report_to", "save_seconds"):
        values["fit"].pop(key)
    return values


def dev_score(record: Record) -> float:
    """The dev metric of the best epoch, turned so that more is better; without one, the worst."""
    if "dev" not in record:
        return -math.inf
    return record["dev"][record["metric"]] * (-1 if record["metric"] in LOWER_IS_BETTER else 1)


def best_rate(records: Sequence[Record]) -> int | None:
    """Which of these runs, one for each rate, is best on dev; the first of equals; None: all failed."""
    scores = [dev_score(record) for record in records]
    best = max(scores)
    return None if best == -math.inf else scores.index(best)


def check_grid(folder: Path, grid: Grid) -> None:
    """Nothing, if the results in this folder, should it hold any, are this grid's.

    Raises:
        PastinaError: they belong to another grid.
    """
    if not (folder / SUMMARY).is_file():
        return
    if (name := read_summary(folder)["name"]) != grid.spec.name:
        raise PastinaError(
            f"{folder} holds the results of the grid {name!r}, not of {grid.spec.name!r}. Name "
            "another folder with --out."
        )


def write_summary(folder: Path, grid: Grid) -> None:
    """Put down which cells the results in this folder belong to.

    Raises:
        PastinaError: they belong to another grid.
    """
    check_grid(folder, grid)
    path, summary = folder / SUMMARY, grid.summary()
    if not path.is_file() or read_summary(folder) != summary:
        write_record(path, summary)


def read_summary(folder: Path) -> dict[str, Any]:
    """What `write_summary` put down.

    Raises:
        PastinaError: nothing is there, or something else.
    """
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if missing := {"name", "cells", "rates", "seeds", "budget"} - set(summary):
            raise ValueError(f"{min(missing)!r} is missing")
        for data, size, method in summary["cells"]:
            rates_of(summary, Cell(data, method, size))
    except FileNotFoundError:
        raise PastinaError(
            f"{folder} holds no results of a grid: {SUMMARY} is missing. Make them: pastina bench run"
        ) from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError) as error:
        raise PastinaError(f"{path} does not describe a grid ({error}).") from None
    return summary


def rates_of(summary: Record, cell: Cell) -> list[Settings]:
    """The settings that a cell chooses from, as a grid's summary has them."""
    own = summary.get("kind_rates", {}).get(cell.method, {})
    default = summary["rates"][cell.method]
    return own.get(summary["kinds"][cell.data], default) if own else default


def _kept(key: str, value: Any) -> Any:
    """Measurements in seven digits; settings as they are."""
    return _rounded(value) if key in ("dev", "test", "epochs", "seconds") else value


def _rounded(value: Any) -> Any:
    if isinstance(value, float):  # JSON has no word for what is not finite
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return value
