"""The picture of a result file: what a pass costs, by length, batch and number of tasks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pastina.bench.canvas import drawing, save_twice, tidy
from pastina.bench.curves import FORWARD, OTHERS, OURS, STEP
from pastina.errors import PastinaError

_FLAT = 4  # a curve that grows by less is drawn from 0
TITLE = "What a pass through the backbone costs"
PANELS = {
    "length": "Length of rows",
    "batch": "Rows in a batch",
    "mixed": "Tasks in a batch",
    "resident": "Tasks in memory",
}
STYLES: dict[str, dict[str, Any]] = {
    f"{OURS}, {FORWARD}": {"color": "#0072B2", "marker": "o"},
    f"{OURS}, {STEP}": {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    f"{OTHERS}, {FORWARD}": {"color": "#D55E00", "marker": "^"},
    f"{OTHERS}, {STEP}": {"color": "#D55E00", "marker": "D", "linestyle": "--"},
}


def draw(result: Mapping[str, Any], path: Path) -> tuple[Path, Path]:
    """Write the picture twice, as .png and as .svg, beside each other; returns both.

    Raises:
        PastinaError: matplotlib is missing; the result holds no curves.
    """
    missing = [name for name in PANELS if name not in result.get("curves", {})]
    if missing:
        raise PastinaError("The result holds no curves to draw. Measure them: --only curves")
    with drawing():
        return save_twice(_figure(result), path.with_suffix(""), TITLE, _description(result))


def _figure(result: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.8), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for panel, (name, title) in zip(panels, PANELS.items(), strict=True):
        curve = result["curves"][name]
        for series, numbers in curve["seconds"].items():
            milliseconds = [1000 * number for number in numbers]
            panel.plot(curve["x"], milliseconds, label=series, markersize=5, **STYLES[series])
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(curve["axis"])
        panel.set_ylabel("milliseconds")
        _scale(panel, curve)
        tidy(panel)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2, frameon=False, handlelength=4
    )
    figure.suptitle(f"{TITLE}\n{_settings(result)}", fontsize=10)
    return figure


def _scale(panel: Any, curve: Mapping[str, Any]) -> None:
    """Ticks at the places that were measured; costs by factors, or from 0 where they hardly grow."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(curve["x"], [f"{x:,}" for x in curve["x"]])
    panel.minorticks_off()
    numbers = [1000 * number for series in curve["seconds"].values() for number in series]
    if max(numbers) < _FLAT * min(numbers):
        panel.set_ylim(0, 1.25 * max(numbers))
        return
    bottom, top = min(numbers) / 1.5, max(numbers) * 1.5
    panel.set_yscale("log")
    panel.set_ylim(bottom, top)
    steps = (1, 2, 5) if top < 100 * bottom else (1,)
    ticks = [f * 10.0**e for e in range(-4, 7) for f in steps if bottom <= f * 10.0**e <= top]
    panel.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    panel.minorticks_off()


def _settings(result: Mapping[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    threads = machine["threads"]
    return (
        f"{result['backbone']['name']}, fp32, {machine['gpu'] or machine['cpu']}, "
        f"{threads} thread{'s' * (threads != 1)}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}"
    )


def _description(result: Mapping[str, Any]) -> str:
    parts = []
    for name, title in PANELS.items():
        curve = result["curves"][name]
        ends = "; ".join(
            f"{series}: {_milliseconds(numbers[0])} to {_milliseconds(numbers[-1])} ms"
            for series, numbers in curve["seconds"].items()
        )
        parts.append(f"{title}, {curve['x'][0]} to {curve['x'][-1]}. {ends}.")
    return " ".join(parts)


def _milliseconds(seconds: float) -> str:
    number = 1000 * seconds
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
