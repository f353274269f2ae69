"""The plot of what many tasks cost a server."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pastina.errors import PastinaError, need
from pastina.files import whole_file

TITLE = "Many tasks in one server"
STYLES: dict[str, dict[str, Any]] = {
    "pastina serve": {"color": "#0b5fa5", "marker": "o", "linestyle": "-"},
    "FastAPI + PEFT set_adapter": {"color": "#b3541e", "marker": "s", "linestyle": "--"},
    "FastAPI + pipelines": {"color": "#5b5b5b", "marker": "^", "linestyle": ":"},
}
_PANELS = {
    "texts_per_s": ("texts a second", "log"),
    "mb": ("memory, MB", "linear"),
    "ready_s": ("seconds until ready", "log"),
}


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """Write the plot as .svg; its name.

    Raises:
        PastinaError: there is nothing to draw; matplotlib is not installed.
    """
    curve = result["curves"].get("serve")
    if curve is None:
        raise PastinaError("There is nothing to draw. Measure it as well: --only compare")
    need("matplotlib", "bench")
    import io

    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    panels = figure.subplots(1, len(_PANELS))
    for panel, (key, (label, scale)) in zip(panels, _PANELS.items(), strict=True):
        for name, numbers in curve[key].items():
            points = [(x, y) for x, y in zip(curve["x"], numbers, strict=True) if y is not None]
            panel.plot(*zip(*points, strict=True), label=name, **STYLES[name])
        panel.set_xscale("log")
        panel.set_yscale(scale)
        if scale == "linear":
            panel.set_ylim(bottom=0)
        else:
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            panel.yaxis.set_minor_locator(NullLocator())
        panel.set_xticks(curve["x"], [f"{x:,}" for x in curve["x"]])
        panel.set_xlabel("tasks")
        panel.set_ylabel(label)
        panel.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(TITLE, fontsize=11)
    svg = path.with_suffix(".svg")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Title": TITLE, "Date": None})
    words = ". ".join(
        f"{label}: " + "; ".join(f"{name} {_told(own)}" for name, own in curve[key].items())
        for key, (label, _) in _PANELS.items()
    )
    description = f"</title>\n <desc>At {_told(curve['x'])} tasks. {words}.</desc>"
    with whole_file(svg) as file:
        file.write(text.getvalue().replace("</title>", description, 1))
    return svg


def _told(numbers: Sequence[float | None]) -> str:
    return ", ".join("none" if number is None else f"{number:g}" for number in numbers)
