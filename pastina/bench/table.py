"""The table of a grid's results, built from the result files alone: the same bytes each time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pastina.bench.grid import told
from pastina.bench.notes import notes
from pastina.bench.results import rates_of
from pastina.bench.tally import CellResult, Score, Tally, read_tally
from pastina.bench.write import WRITERS
from pastina.errors import PastinaError


@dataclass(frozen=True, slots=True)
class Section:
    """One table. title: empty where there is only one; rows: a name, then as many cells as columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def bench_table(folder: str | Path, format: str = "md") -> str:
    """Rows are methods, columns data sets; then the mean over sets and what a method costs.

    format: md, latex or html; csv is another view of the same: a line for each method and data set,
    unrounded.

    Raises:
        PastinaError: no such format, no results.
    """
    tally = read_tally(folder)
    if format == "csv":
        return csv_table(tally)
    if format not in WRITERS:
        raise PastinaError(
            f"There is no format {format!r}; take csv, {', '.join(sorted(WRITERS))}."
        )
    return WRITERS[format](tally.summary["name"], sections(tally), notes(tally))


def sections(tally: Tally) -> list[Section]:
    """A table for each size of the training part."""
    return [_section(tally, size) for size in tally.sizes]


def _section(tally: Tally, size: int | None) -> Section:
    sets = tally.sets(size)
    title = "" if size is None else f"{size:,} training rows"
    cost = ("adapter parameters", "share", "kB", seconds_column(tally))
    rows = tuple(_row(tally, method, size) for method in tally.methods)
    return Section(title, ("method", *sets, "mean", *cost), rows)


def _row(tally: Tally, method: str, size: int | None) -> tuple[str, ...]:
    cells, mean = tally.of(method, size), tally.over_sets(method, size)
    adapter, backbone = (
        _mean(cells, "parameters", "adapter"),
        _mean(cells, "parameters", "backbone"),
    )
    file, seconds = _mean(cells, "bytes"), _mean(cells, seconds_key(tally))
    return (
        method,
        *(_cell(cell, len(tally.seeds)) for cell in cells),
        _text(mean) + ("*" if mean and tally.is_on_dev(size) else ""),
        "" if adapter is None else f"{adapter:,.0f}",
        "" if adapter is None or not backbone else f"{100 * adapter / backbone:.3g} %",
        "" if file is None else f"{file / 1000:,.0f}",
        "" if seconds is None else f"{seconds:,.0f}",
    )


def seconds_key(tally: Tally) -> str:
    """CPU seconds where every run has them and none used a GPU: other work does not count in them."""
    has_all = all("cpu_seconds" in r and not r["machine"]["gpu"] for r in tally.goods())
    return "cpu_seconds" if has_all else "seconds"


def seconds_column(tally: Tally) -> str:
    """The head of the column with training times."""
    return "CPU s" if seconds_key(tally) == "cpu_seconds" else "s"


def _cell(cell: CellResult, num_seeds: int) -> str:
    score = cell.score()
    if score is None:
        return "failed" if cell.failed else "–"
    missing = "" if score.count == num_seeds else f" ({score.count} of {num_seeds})"
    return _text(score) + ("*" if cell.is_on_dev else "") + missing


def _text(score: Score | None) -> str:
    if score is None:
        return "–"
    return f"{score.mean:.1f}" if score.std is None else f"{score.mean:.1f} ± {score.std:.1f}"


def _mean(cells: Sequence[CellResult], *keys: str) -> float | None:
    """Over the cells that ran."""
    values = [value for cell in cells if (value := cell.mean_of(*keys)) is not None]
    return sum(values) / len(values) if values else None


_CSV = (
    "data,size,method,metric,rate,seeds,test_mean,test_std,dev_mean,dev_std,adapter_parameters,"
    "head_parameters,backbone_parameters,bytes,seconds,cpu_seconds,memory_mb"
)


def csv_table(tally: Tally) -> str:
    """A line for each cell; empty where there is no number."""
    lines = [_CSV]
    for cell, result in tally.results.items():
        test, dev = None if result.is_on_dev else result.score(), result.score("dev")
        chosen = {} if result.rate is None else rates_of(tally.summary, cell)[result.rate]
        numbers = [
            *(() if test is None else (test.mean, test.std)),
            *((None, None) if test is None else ()),
            *((None, None) if dev is None else (dev.mean, dev.std)),
            result.mean_of("parameters", "adapter"),
            result.mean_of("parameters", "head"),
            result.mean_of("parameters", "backbone"),
            *(result.mean_of(k) for k in ("bytes", "seconds", "cpu_seconds", "memory_mb")),
        ]
        rate = " ".join(f"{key}={told(value)}" for key, value in chosen.items())
        words = [cell.data, str(cell.size or ""), cell.method, result.metric or "", rate]
        cells = ["" if n is None else f"{n:.10g}" for n in numbers]
        lines.append(",".join([*words, str(len(result.good)), *cells]))
    return "\n".join(lines) + "\n"
