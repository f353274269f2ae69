"""What all pictures share: colours, the look, and files that are the same bytes each time."""

import html
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pastina.errors import need
from pastina.files import whole_file

# Okabe and Ito's colours, which people with any colour vision can tell apart (yellow is too pale on
# white); the shape of the marker says it once more
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_LINES = ("-", "--", ":", "-.")


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour, a marker and a line for each name, none of them twice together."""
    return {
        name: {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": _LINES[i // len(COLORS) % len(_LINES)],
        }
        for i, name in enumerate(names)
    }


@contextmanager
def drawing() -> Iterator[None]:
    """Settings under which a figure is made and saved.

    Raises:
        PastinaError: matplotlib is missing.
    """
    matplotlib = need("matplotlib", "bench")
    need("matplotlib.figure", "bench")
    with matplotlib.rc_context({"svg.hashsalt": "pastina", "svg.fonttype": "none", "font.size": 9}):
        yield


def save_twice(figure: Any, path: Path, title: str, description: str) -> tuple[Path, Path]:
    """The figure as .png and as .svg, which carries a description for those who do not see it."""
    png, svg = (path.with_name(f"{path.name}.{ending}") for ending in ("png", "svg"))
    with whole_file(png, "wb") as file:
        figure.savefig(file, format="png", dpi=160, metadata={"Title": title})
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Title": title, "Date": None})
    described = f"</title>\n <desc>{html.escape(description)}</desc>"
    lines = text.getvalue().replace("</title>", described, 1).splitlines()
    with whole_file(svg) as file:
        file.write("\n".join(line.rstrip() for line in lines) + "\n")
    return png, svg


def tidy(panel: Any) -> None:
    """A pale grid and no frame on the sides that carry no numbers."""
    panel.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
