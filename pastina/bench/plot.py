"""Pictures of a grid: score against parameters, learning curves, score against training rows."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pastina.bench.canvas import drawing, save_twice, styles, tidy
from pastina.bench.labels import place_labels
from pastina.bench.tally import CellResult, Score, Tally, mean_score, read_tally
from pastina.errors import PastinaError
from pastina.kinds import LOWER_IS_BETTER

PARETO, CURVES, ROWS = "pareto", "curves", "rows"
_ACROSS = 4  # panels in a row


def bench_plot(folder: str | Path, out: str | Path, only: Sequence[str] = ()) -> list[Path]:
    """Draw what the results hold, as OUT-pareto, OUT-curves and OUT-rows (.png and .svg each).

    "rows" needs a grid with several sizes, "pareto" methods that ran on every data set.

    Raises:
        PastinaError: no results; no such picture; nothing to draw; matplotlib is missing.
    """
    tally, out = read_tally(folder), Path(out)
    if unknown := sorted(set(only) - set(_PICTURES)):
        raise PastinaError(f"There is no picture {unknown[0]!r}; take {', '.join(_PICTURES)}.")
    written: list[Path] = []
    with drawing():
        for name, draw in _PICTURES.items():
            if only and name not in only:
                continue
            if (drawn := draw(tally)) is not None:
                path = out.with_name(f"{out.name}-{name}")
                written += save_twice(drawn[0], path, drawn[1], drawn[2])
    if not written:
        raise PastinaError(f"{folder} holds nothing to draw yet; see `pastina bench run --list`.")
    return written


Drawn = tuple[Any, str, str]  # figure, title, description


def _pareto(tally: Tally) -> Drawn | None:
    """The mean over data sets by the number of adapter parameters, one panel for each size."""
    sizes = [size for size in tally.sizes if _points(tally, size)]
    if not sizes:
        return None
    name = tally.summary["name"]
    figure = _figure(6.4 * len(sizes) if len(sizes) < 3 else 5 * len(sizes), 4.4)
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    looks, told = styles(tally.methods), []
    for panel, size in zip(panels, sizes, strict=True):
        points = _points(tally, size)
        _draw_points(panel, points, looks)
        panel.set_title("" if size is None else f"{size:,} training rows", fontsize=10)
        panel.set_xlabel("adapter parameters, without the head (mean over data sets)")
        told += [
            f"{method}: {count:,.0f} parameters, {score.mean:.1f}"
            for method, count, score in points
        ]
    what = _what(tally, sizes)
    panels[0].set_ylabel(f"{what}, mean over {len(tally.sets(sizes[0]))} data sets")
    title = f"{name}: score against trained parameters"
    figure.suptitle(title, fontsize=11)
    return figure, title, ". ".join(told) + "."


def _what(tally: Tally, sizes: Sequence[int | None]) -> str:
    """What the scores of these sizes are."""
    is_mixed = any(tally.is_on_dev(size) for size in sizes)
    return "score on test, or on dev where test has no labels" if is_mixed else "test score"


def _points(tally: Tally, size: int | None) -> list[tuple[str, float, Score]]:
    """Method, adapter parameters and score of those that ran on every data set."""
    points = []
    for method in tally.methods:
        score = tally.over_sets(method, size)
        counts = [cell.mean_of("parameters", "adapter") for cell in tally.of(method, size)]
        known = [count for count in counts if count is not None]
        if score is not None and known:
            points.append((method, statistics.fmean(known), score))
    return points


def _draw_points(
    panel: Any, points: Sequence[tuple[str, float, Score]], looks: dict[str, dict[str, Any]]
) -> None:
    trained = [point for point in points if point[1] > 0]
    for method, _, score in (point for point in points if point[1] == 0):
        panel.axhline(score.mean, color="#777777", linewidth=1, linestyle=(0, (4, 3)))
        panel.annotate(
            f"{method}: no parameters but the head",
            (1, score.mean),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#555555",
        )
    front = _front([(count, score.mean) for _, count, score in trained])
    panel.step(
        [x for x, _ in front], [y for _, y in front], where="post", color="#bbbbbb", linewidth=1
    )
    for method, count, score in trained:
        look = {**looks[method], "linestyle": "none"}
        panel.errorbar(count, score.mean, score.std or 0, capsize=2, elinewidth=1, **look)
    panel.set_xscale("log")
    if trained:
        low, high = min(p[1] for p in trained), max(p[1] for p in trained)
        panel.set_xlim(low / 2.5, high * 2.5)
    panel.margins(y=0.12)
    tidy(panel)
    place_labels(panel, [(method, count, score.mean) for method, count, score in trained])


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats with as many or fewer parameters, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _curves(tally: Tally) -> Drawn | None:
    """The dev metric after each epoch, mean over seeds, a panel for each data set and size."""
    shown = [
        (data, size, cells)
        for size in tally.sizes
        for data in tally.sets(size)
        if (cells := [r for m in tally.methods if (r := _of(tally, data, m, size)).good])
    ]
    if not shown:
        return None
    figure, panels = _panels(len(shown), len(tally.methods))
    looks = styles(tally.methods)
    for panel, (data, size, cells) in zip(panels, shown, strict=False):
        for cell in cells:
            epochs, mean, spread = _history(cell)
            look = looks[cell.cell.method]
            panel.plot(epochs, mean, label=cell.cell.method, markersize=3, linewidth=1.2, **look)
            low, high = ([m + s * d for m, d in zip(mean, spread, strict=True)] for s in (-1, 1))
            panel.fill_between(epochs, low, high, color=look["color"], alpha=0.12, linewidth=0)
        panel.set_title(data if size is None else f"{data}, {size:,} rows", fontsize=10)
        panel.set_ylabel(f"{cells[0].metric} on dev", fontsize=8)
        panel.xaxis.get_major_locator().set_params(integer=True)
        tidy(panel)
    _legend(figure, panels)
    _below(panels, "epoch")
    title = f"{tally.summary['name']}: dev metric by epoch, with the chosen rate"
    figure.suptitle(title, fontsize=11)
    ends = [
        f"{cell.cell}: {scores[0]:.1f} after epoch {epochs[0]}, {scores[-1]:.1f} after epoch "
        f"{epochs[-1]}"
        for _, _, cells in shown
        for cell in cells
        for epochs, scores, _ in [_history(cell)]
    ]
    return figure, title, ". ".join(ends) + "."


def _history(cell: CellResult) -> tuple[list[int], list[float], list[float]]:
    """Epochs, and the mean and deviation over seeds of the dev metric, as long as all runs went on."""
    metric = cell.metric
    assert metric is not None
    times = 1 if metric in LOWER_IS_BETTER else 100
    series = [record["epochs"][metric] for record in cell.good.values()]
    columns = [[times * value for value in column] for column in zip(*series, strict=False)]
    scores = [score for column in columns if (score := mean_score(column)) is not None]
    told = next(iter(cell.good.values()))["epochs"].get("epoch")
    epochs = (told or list(range(1, len(scores) + 1)))[: len(scores)]
    return epochs, [score.mean for score in scores], [score.std or 0.0 for score in scores]


def _rows(tally: Tally) -> Drawn | None:
    """The test score by the number of training rows, a panel for each data set."""
    sizes = [size for size in tally.sizes if size is not None]
    names = list(dict.fromkeys(data for size in sizes for data in tally.sets(size)))
    if len(sizes) < 2:
        return None
    figure, panels = _panels(len(names), len(tally.methods))
    looks, told = styles(tally.methods), []
    for panel, data in zip(panels, names, strict=False):
        for method in tally.methods:
            own = [size for size in sizes if data in tally.sets(size)]
            seen = {size: _of(tally, data, method, size).score() for size in own}
            points = [(size, score) for size, score in seen.items() if score is not None]
            if not points:
                continue
            panel.errorbar(
                [size for size, _ in points],
                [score.mean for _, score in points],
                [score.std or 0.0 for _, score in points],
                label=method,
                capsize=2,
                markersize=4,
                linewidth=1.2,
                **looks[method],
            )
            told.append(
                f"{data}, {method}: " + ", ".join(f"{s.mean:.1f} at {n:,}" for n, s in points)
            )
        panel.set_xscale("log")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.minorticks_off()
        panel.set_title(data, fontsize=10)
        tidy(panel)
    if not told:
        return None
    _legend(figure, panels)
    _below(panels, "training rows")
    figure.supylabel(_what(tally, sizes), fontsize=9)
    title = f"{tally.summary['name']}: score against the number of training rows"
    figure.suptitle(title, fontsize=11)
    return figure, title, ". ".join(told) + "."


_PICTURES: dict[str, Callable[[Tally], Drawn | None]] = {
    PARETO: _pareto,
    CURVES: _curves,
    ROWS: _rows,
}


def _of(tally: Tally, data: str, method: str, size: int | None) -> CellResult:
    return next(result for result in tally.of(method, size) if result.cell.data == data)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # text can be measured
    return figure


def _panels(count: int, entries: int) -> tuple[Any, list[Any]]:
    """Panels beside and below each other, and room for a legend with so many entries."""
    across = min(count, _ACROSS)
    down = math.ceil(count / across)
    width = max(3.1 * across, 5)
    lines = -(-entries // max(1, int(width / 1.6)))  # of the legend
    figure = _figure(width, 2.5 * down + 0.6 + 0.22 * lines)
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def _below(panels: Sequence[Any], text: str) -> None:
    """What runs along the bottom, said under the lowest panel of each column."""
    for panel in panels[-_ACROSS:]:
        panel.set_xlabel(text)


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    """One for all panels, each method once."""
    found: dict[str, Any] = {}
    for panel in panels:
        handles, names = panel.get_legend_handles_labels()
        found |= {n: h for n, h in zip(names, handles, strict=True) if n not in found}
    inches = 0.8 + 0.08 * max(map(len, found), default=0)  # of an entry, about
    fitting = max(1, int(figure.get_figwidth() / inches))
    figure.legend(
        list(found.values()),
        list(found),
        loc="outside lower center",
        ncols=max(1, min(len(found), 6, fitting)),
        frameon=False,
        handlelength=3,
    )
