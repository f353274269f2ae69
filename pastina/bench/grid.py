"""A grid: methods x data sets x seeds x learning rates, as a list of independent jobs.

The rate of a cell (one method on one data set, at one size) is chosen on dev with the first seed; the
other seeds run with the winner only.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pastina.adapter import adapter_folder, read_card
from pastina.data.files import find_file
from pastina.errors import PastinaError, RecipeError
from pastina.recipe import KindName, Recipe, make_recipe

Rate = Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(ge=1)]
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
LOW_DATA_DEV = 1000  # rows; UniPELT, arXiv 2110.07577, section 4


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Choice(_Table):
    """Settings that go together: one of those that a method may choose from.

    lr, head_lr and epochs are those of `fit`, num_layers that of `backbone`; way is one of the method's.
    """

    lr: Rate | None = None
    head_lr: Rate | None = None
    epochs: Annotated[int, Field(ge=1)] | None = None
    num_layers: int | None = None
    way: str | None = None


Settings = dict[str, float | str]


class MethodSpec(_Table):
    """A method of the grid: its part of the recipe, other fixed settings, the rates to choose from.

    rates: numbers are fit.lr (for the linear probe fit.head_lr); tables are a Choice.
    set: sections of the recipe that are this method's own, such as { fit = { epochs = 20 } }.
    kinds: the same for the data sets of one kind, such as { tag = { method = { rank = 2 } } }.
    kind_rates: for the data sets of one kind, what to choose from instead of `rates`.
    ways: sections of the recipe that a Choice takes by their name.
    """

    method: dict[str, Any]
    rates: tuple[Rate | Choice, ...] = Field(min_length=1)
    set: dict[str, dict[str, Any]] = {}
    kinds: dict[KindName, dict[str, dict[str, Any]]] = {}
    kind_rates: dict[KindName, Annotated[tuple[Rate | Choice, ...], Field(min_length=1)]] = {}
    ways: dict[str, dict[str, dict[str, Any]]] = {}

    @field_validator("method", mode="before")
    @classmethod
    def _a_name_is_enough(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def settings(self, kind: KindName | None = None) -> list[Settings]:
        """What each rate stands for; with a kind, each of those that its data sets choose from."""
        number = "head_lr" if self.method.get("name") == "linear" else "lr"
        return [
            rate.model_dump(exclude_none=True) if isinstance(rate, Choice) else {number: rate}
            for rate in (self.kind_rates.get(kind, self.rates) if kind else self.rates)
        ]


class SetSpec(_Table):
    """What is particular about a data set: other sizes than the grid's, other settings."""

    sizes: tuple[Size, ...] | None = None
    set: dict[str, dict[str, Any]] = {}


class GridSpec(_Table):
    """A grid as its file describes it.

    recipes: TOML files, or names of files beside each other in `folder`; both are relative to the grid.
    base: settings of every run. sizes: train on so many rows only, and take another 1,000 as dev.
    budget: "equal" insists on as many rates for each method.
    """

    name: str
    folder: str = "."
    recipes: tuple[str, ...] = Field(min_length=1)
    base: dict[str, dict[str, Any]] = {}
    methods: dict[str, MethodSpec] = Field(min_length=1)
    sets: dict[str, SetSpec] = {}
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    sizes: tuple[Size, ...] | None = None
    budget: Literal["equal", "free"] = "equal"


@dataclass(frozen=True, slots=True)
class Cell:
    """One method on one data set. size: training rows, None: the whole part or the recipe's limit."""

    data: str
    method: str
    size: int | None = None

    @property
    def folder(self) -> str:
        """Where its results lie."""
        return self.data if self.size is None else f"{self.data}-{self.size}"

    def __str__(self) -> str:
        return f"{self.folder}/{self.method}"


@dataclass(frozen=True)
class Job:
    """One run, independent of all others. rate: an index into the method's rates."""

    grid: str
    cell: Cell
    rate: int
    settings: Mapping[str, float | str]
    seed: int
    recipe: Recipe

    @cached_property
    def id(self) -> str:
        """SHA-256 over the recipe and the content of the data files; not over where they lie."""
        return content_id(self.recipe)

    @property
    def name(self) -> str:
        """Its result file, without the ending: "stsb/pasta-lr0.03-seed13"."""
        rates = "-".join(
            f"{key.replace('_', '')}{told(value)}" for key, value in self.settings.items()
        )
        return f"{self.cell}-{rates}-seed{self.seed}"


class Grid:
    """A checked grid and its jobs."""

    def __init__(self, spec: GridSpec, recipes: Mapping[str, dict[str, Any]]) -> None:
        self.spec, self.recipes = spec, dict(recipes)
        self._jobs: dict[tuple[Cell, int, int], Job] = {}

    @cached_property
    def cells(self) -> list[Cell]:
        """Data set by data set, method by method, size by size."""
        return [
            Cell(data, method, size)
            for data in self.recipes
            for size in self._sizes(data)
            for method in self.spec.methods
        ]

    def _sizes(self, data: str) -> Sequence[int | None]:
        own = self.spec.sets.get(data, SetSpec()).sizes
        return own or self.spec.sizes or (None,)

    def job(self, cell: Cell, rate: int, seed: int) -> Job:
        """The run of a cell with one of its rates and a seed.

        Raises:
            RecipeError: a setting that a recipe does not take.
        """
        if (key := (cell, rate, seed)) not in self._jobs:
            self._jobs[key] = self._job(*key)
        return self._jobs[key]

    def _job(self, cell: Cell, rate: int, seed: int) -> Job:
        method = self.spec.methods[cell.method]
        settings = method.settings(self.kind(cell.data))[rate]
        own = self.spec.sets.get(cell.data, SetSpec()).set
        values: dict[str, Any] = merged(self.recipes[cell.data], self.spec.base, own)
        if cell.size is not None and "hub" in values.get("data", {}):
            raise RecipeError(
                f"The grid {self.spec.name!r}, {cell}: sizes draw the dev part from train, but a data "
                "set of the hub brings its own. Leave sizes out for it."
            )
        of_kind = method.kinds.get(self.kind(cell.data), {})
        fit: dict[str, Any] = {**settings, "seed": seed}
        way = method.ways[fit.pop("way")] if "way" in fit else {}
        values = {**values, "method": dict(method.method)}
        values = merged(values, method.set, of_kind, way, _low_data(cell.size))
        layers = {key: fit.pop(key) for key in ("num_layers",) if key in fit}
        values = merged(values, {"fit": fit, "backbone": layers})
        recipe = make_recipe(values, source=f"the grid {self.spec.name!r}, {cell}").resolved()
        return Job(self.spec.name, cell, rate, settings, seed, recipe)

    def kind(self, data: str) -> KindName:
        """Of a data set."""
        return self.recipes[data].get("kind", Recipe().kind)

    def search(self, cell: Cell) -> list[Job]:
        """All rates with the first seed: from these the rate is chosen."""
        rates = self.spec.methods[cell.method].settings(self.kind(cell.data))
        return [self.job(cell, rate, self.spec.seeds[0]) for rate in range(len(rates))]

    def final(self, cell: Cell, rate: int) -> list[Job]:
        """All seeds with the chosen rate: these are tested."""
        return [self.job(cell, rate, seed) for seed in self.spec.seeds]

    def jobs(self) -> Iterator[Job]:
        """Every run that may come to be: each rate with each seed."""
        for cell in self.cells:
            for rate in range(len(self.search(cell))):
                yield from self.final(cell, rate)

    def choose(self, wanted: Sequence[str]) -> list[Cell]:
        """The cells that one of these words names: a data set, a method, or data/method in any order.

        Raises:
            RecipeError: a word that names nothing.
        """
        if not wanted:
            return self.cells
        for word in wanted:
            if not any(word in _names(cell) for cell in self.cells):
                known = ", ".join([*self.recipes, *self.spec.methods])
                raise RecipeError(f"--only {word} names no cell of the grid. It has: {known}.")
        return [cell for cell in self.cells if _names(cell) & set(wanted)]

    def summary(self) -> dict[str, Any]:
        """What tables need of the grid: names, rates, seeds, in order."""
        methods = self.spec.methods
        own = {
            label: {str(kind): method.settings(kind) for kind in method.kind_rates}
            for label, method in methods.items()
            if method.kind_rates
        }
        return {
            "name": self.spec.name,
            "cells": [[cell.data, cell.size, cell.method] for cell in self.cells],
            "rates": {label: method.settings() for label, method in methods.items()},
            **({"kind_rates": own} if own else {}),
            **({"kinds": {data: self.kind(data) for data in self.recipes}} if own else {}),
            "seeds": list(self.spec.seeds),
            "budget": self.spec.budget,
            "ids": sorted({job.id for job in self.jobs()}),
        }


def told(value: float | str) -> str:
    """A setting in a name or a table."""
    return value if isinstance(value, str) else f"{value:g}"


def read_grid(path: str | Path) -> Grid:
    """The grid of a TOML file; all its recipes are read and each cell is checked once.

    Raises:
        RecipeError: no such file, not TOML, unknown keys, a recipe that does not fit, methods with
            different numbers of rates.
    """
    path = Path(path)
    spec = _spec(path, _toml(path))
    recipes = {}
    for entry in spec.recipes:
        file = path.parent / (entry if entry.endswith(".toml") else f"{spec.folder}/{entry}.toml")
        if file.stem in recipes:
            raise RecipeError(f"{path}: two recipes are called {file.stem!r}. Rename one.")
        recipes[file.stem] = _toml(file)
    grid = Grid(spec, recipes)
    _check(path, grid)
    return grid


def merged(values: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables put over each other; the last one wins."""
    result = dict(values)
    for change in changes:
        for key, value in change.items():
            old = result.get(key)
            if isinstance(old, Mapping) and isinstance(value, Mapping):
                value = merged(old, value)
            result[key] = value
    return result


def content_id(recipe: Recipe) -> str:
    """Sixteen letters that stand for a resolved recipe and the content of its data files.

    Settings at their defaults are left out, so that a new key of recipes changes no id.
    """
    values = recipe.resolved().model_dump(
        mode="json", exclude_defaults=True, exclude={"name", "preset"}
    )
    values["method"] = {**values.get("method", {}), "name": recipe.method.name}
    data = dict(values.pop("data", {}))
    if recipe.data.hub is None:
        folder = Path(data.pop("folder", "."))
        for part in {"train", "dev", "test"} & set(data):
            try:
                file = find_file(folder / data[part])
            except PastinaError:  # the run fails and says so; with the file it will be another one
                data[part] = f"not there: {data[part]}"
            else:
                data[part] = _file_digest(file, file.stat().st_mtime_ns, file.stat().st_size)
    fit = values.get("fit", {})
    for key in ("report_to", "save_seconds"):  # they change no result
        fit.pop(key, None)
    if isinstance(teacher := fit.get("teacher"), str) and adapter_folder(teacher).is_dir():
        fit["teacher"] = read_card(adapter_folder(teacher)).digest
    text = json.dumps({**values, "data": data}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(maxsize=256)
def _file_digest(path: Path, changed: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _low_data(size: int | None) -> dict[str, Any]:
    """The given dev part is not used: dev is drawn from train."""
    if size is None:
        return {}
    return {"data": {"limit": size, "dev": None, "dev_rows": LOW_DATA_DEV}}


def _names(cell: Cell) -> set[str]:
    """Everything that --only may call it."""
    sets, method = {cell.data, cell.folder}, cell.method
    return sets | {method} | {f"{s}/{method}" for s in sets} | {f"{method}/{s}" for s in sets}


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"There is no {path}. Name a TOML file that exists.") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder. Name a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not a TOML file: {error}.") from None


def _spec(path: Path, values: dict[str, Any]) -> GridSpec:
    try:
        return GridSpec.model_validate(values)
    except ValidationError as error:
        complaints = "; ".join(dict.fromkeys(_complaints(error)))
        raise RecipeError(f"{path}: {complaints}.") from None


def _complaints(error: ValidationError) -> Iterator[str]:
    for one in error.errors():
        where = ".".join(str(part) for part in one["loc"])
        known = "; see docs/benchmark.md" if one["type"] == "extra_forbidden" else ""
        yield f"{where}: {one['msg']}{known}"


def _check(path: Path, grid: Grid) -> None:
    spec = grid.spec
    for label in (spec.name, *spec.methods):
        if not _LABEL.fullmatch(label):
            raise RecipeError(
                f"{path}: {label!r} becomes the name of a file. Use letters, digits and . _ + - only."
            )
    if len(set(spec.seeds)) != len(spec.seeds):
        raise RecipeError(f"{path}: seeds = {list(spec.seeds)} names a seed twice.")
    if unknown := sorted(set(spec.sets) - set(grid.recipes)):
        raise RecipeError(
            f"{path}: sets.{unknown[0]} is not among the recipes: {', '.join(grid.recipes)}."
        )
    for label, method in spec.methods.items():
        lists = (method.rates, *method.kind_rates.values())
        named = {r.way for rates in lists for r in rates if isinstance(r, Choice) and r.way}
        for way in sorted(named ^ set(method.ways)):
            what = "is not one of its ways" if way in named else "is chosen by none of its rates"
            raise RecipeError(f"{path}: methods.{label}: the way {way!r} {what}.")
        if bad := [way for way in method.ways if not _LABEL.fullmatch(way)]:
            raise RecipeError(
                f"{path}: {bad[0]!r} becomes part of a file's name. Use letters, digits, . _ + - only."
            )
    known = {grid.kind(data) for data in grid.recipes}
    for label, method in spec.methods.items():
        if unused := sorted({*method.kinds, *method.kind_rates} - known):
            raise RecipeError(
                f"{path}: methods.{label} has settings for the kind {unused[0]!r}, of which no data set "
                f"is: {', '.join(sorted(known))}. Leave them out."
            )
    names: dict[str, Job] = {}
    for job in (job for cell in grid.cells for job in grid.search(cell)):
        if (other := names.setdefault(job.name, job)) is not job:
            raise RecipeError(
                f"{path}: {other.cell} and {job.cell} would both have a run called {job.name!r}. Rename "
                "one, or give rates that differ in their first six digits."
            )
    counts = {label: len(method.rates) for label, method in spec.methods.items()}
    counts |= {
        f"{label} for {kind}": len(rates)
        for label, method in spec.methods.items()
        for kind, rates in method.kind_rates.items()
    }
    if spec.budget == "equal" and len(set(counts.values())) > 1:
        seen = ", ".join(f"{label} {count}" for label, count in counts.items())
        raise RecipeError(
            f"{path}: the methods have different numbers of rates ({seen}), which is not a fair choice. "
            'Give each as many, or set budget = "free".'
        )
