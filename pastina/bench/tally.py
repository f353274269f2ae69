"""What the result files of a grid say about each cell; nothing else is read, nothing is rerun."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pastina.bench.grid import Cell, Settings
from pastina.bench.results import SUMMARY, Record, best_rate, rates_of, read_record, read_summary
from pastina.errors import PastinaError
from pastina.kinds import LOWER_IS_BETTER


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over seeds, in points (0 to 100) but for errors such as rmse. std: None for one seed."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class CellResult:
    """A cell as far as it ran.

    tried: the run of each rate with the first seed, None where it is missing. rate: index of the
    chosen one, None before there is a choice. runs: those with the chosen rate, by seed.
    """

    cell: Cell
    tried: tuple[Record | None, ...]
    rate: int | None
    runs: dict[int, Record]

    @cached_property
    def good(self) -> dict[int, Record]:
        """The runs that came to their end, test included, by seed."""
        return {seed: r for seed, r in self.runs.items() if "error" not in r and "test" in r}

    @property
    def failed(self) -> list[Record]:
        """Runs that failed, those of rates that were not chosen included."""
        records = [*(r for r in self.tried if r is not None), *self.runs.values()]
        return [record for record in {id(r): r for r in records}.values() if "error" in record]

    @cached_property
    def metric(self) -> str | None:
        """The metric of the cell; None: no run of it ended."""
        return next((record["metric"] for record in self.good.values()), None)

    @property
    def is_on_dev(self) -> bool:
        """Whether no test row has a label, so that dev is all there is to report."""
        return any(not record["test"] for record in self.good.values())

    def scores(self, part: str = "test") -> dict[int, float]:
        """The metric by seed, in points."""
        return {seed: _points(record, part) for seed, record in self.good.items()}

    def score(self, part: str = "test") -> Score | None:
        """The mean over seeds; None: no run ended."""
        return mean_score(list(self.scores(part).values()))

    def mean_of(self, *keys: str) -> float | None:
        """The mean over seeds of a number in the records; None where one of them lacks it."""
        values = [_at(record, keys) for record in self.good.values()]
        if not values or any(value is None for value in values):
            return None
        return statistics.fmean(value for value in values if value is not None)


class Tally:
    """All results of a grid, in its order."""

    def __init__(self, summary: dict[str, Any], records: Sequence[Record]) -> None:
        self.summary = summary
        self.seeds: list[int] = summary["seeds"]
        ids = set(summary["ids"]) if "ids" in summary else None
        valid = [record for record in records if ids is None or record["id"] in ids]
        self.num_others = len(records) - len(valid)  # of settings that the grid had once
        found = {_key(record): record for record in valid}
        cells = (Cell(data, method, size) for data, size, method in summary["cells"])
        self.results = {cell: self._result(cell, found) for cell in cells}
        self.methods: list[str] = list(summary["rates"])
        self.sizes = list(dict.fromkeys(cell.size for cell in self.results))

    def _result(self, cell: Cell, found: dict[str, Record]) -> CellResult:
        def look(rate: Settings, seed: int) -> Record | None:
            return found.get(_key_of(cell, rate, seed))

        rates = rates_of(self.summary, cell)
        tried = [look(rate, self.seeds[0]) for rate in rates]
        ended = [record for record in tried if record is not None]
        best = best_rate(ended) if len(ended) == len(tried) else None
        runs: dict[int, Record] = {}
        if best is not None:
            seen = {seed: look(rates[best], seed) for seed in self.seeds}
            runs = {seed: record for seed, record in seen.items() if record is not None}
        return CellResult(cell, tuple(tried), best, runs)

    def sets(self, size: int | None) -> list[str]:
        """The data sets that the grid has at this size."""
        return list(dict.fromkeys(cell.data for cell in self.results if cell.size == size))

    def of(self, method: str, size: int | None) -> list[CellResult]:
        """The cells of a method, set by set."""
        return [self.results[Cell(data, method, size)] for data in self.sets(size)]

    def is_on_dev(self, size: int | None) -> bool:
        """Whether a data set of this size has no test labels, so that means are not of test alone."""
        return any(cell.is_on_dev for cell in self.results.values() if cell.cell.size == size)

    def over_sets(self, method: str, size: int | None, part: str = "test") -> Score | None:
        """The mean over data sets of each seed, then over seeds; None unless every cell is whole."""
        cells = self.of(method, size)
        by_set = [cell.scores(part) for cell in cells]
        if any(cell.metric in LOWER_IS_BETTER for cell in cells):
            return None
        if not by_set or any(set(scores) != set(self.seeds) for scores in by_set):
            return None
        means = [statistics.fmean(scores[seed] for scores in by_set) for seed in self.seeds]
        return mean_score(means)

    def goods(self) -> Iterator[Record]:
        """Every tested run."""
        for result in self.results.values():
            yield from result.good.values()


def read_tally(folder: str | Path) -> Tally:
    """The results in a folder that `pastina bench run` filled, those of a part of the grid included.

    Raises:
        PastinaError: no results are there; a file is not a result.
    """
    folder = Path(folder)
    summary = read_summary(folder)
    records = [
        record
        for path in sorted(folder.glob("*/*.json"))
        if path.name != SUMMARY
        and not path.name.startswith(".")
        and not path.parent.name.startswith(".")
        and (record := read_record(path)) is not None
    ]
    if not records:
        raise PastinaError(f"{folder} holds no results yet. Make them: pastina bench run")
    return Tally(summary, records)


def mean_score(values: Sequence[float]) -> Score | None:
    """The mean of some numbers with their standard deviation; None of none."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Score(statistics.fmean(values), std, len(values))


def _points(record: Record, part: str) -> float:
    metric = record["metric"]
    value = (record[part] or record["dev"])[metric]
    return value if metric in LOWER_IS_BETTER else 100 * value


def _at(record: Record, keys: Sequence[str]) -> float | None:
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _key(record: Record) -> str:
    cell = Cell(record["data"], record["method"], record["size"])
    return _key_of(cell, record["rate"], record["seed"])


def _key_of(cell: Cell, rate: Settings, seed: int) -> str:
    return json.dumps([cell.data, cell.size, cell.method, rate, seed], sort_keys=True)
