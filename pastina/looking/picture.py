"""The picture of a look, for papers and pages: the same numbers as the report, drawn by matplotlib.

Shape letters: L layers, H heads, T tokens, S slots.
"""

import io
import re
import warnings
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from torch import Tensor

from pastina.errors import PastinaError, need
from pastina.files import whole_file
from pastina.looking.records import Look, TextLook

# Okabe and Ito's colours, which people with any colour vision can tell apart
BEFORE, AFTER = "#D55E00", "#0072B2"
SLOTS = ("#009E73", "#E69F00", "#56B4E9", "#CC79A7")
OTHER = "#e7eaee"
HATCHES = ("", "///", "...", "xxx")  # where the colours begin again
DASHES = ("-", "--", "-.", ":")
_LABELS = 40  # tokens, above which only the special ones are labelled
_WIDE = 14  # letters of a name, above which fewer stand beside each other
_FEW = 3  # slots, above which their legend needs a place of its own
_LISTED = 12  # of these at most


def draw(look: Look, path: Path) -> Path:
    """Write the picture, .png or .svg by its name; returns its path.

    Raises:
        PastinaError: matplotlib is missing; the name ends otherwise.
    """
    if path.suffix not in (".png", ".svg"):
        raise PastinaError(
            f"{path.name}: a picture is a .png or a .svg. Name the file accordingly."
        )
    matplotlib = need("matplotlib", "bench")
    need("matplotlib.figure", "bench")
    title = _clean(f"What {look.name} changes inside the backbone")
    # a text is a text, also with dollar signs in it
    settings = {
        "svg.hashsalt": "pastina",
        "svg.fonttype": "none",
        "font.size": 9,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as empty squares
        figure = _figure(look, title)
        if path.suffix == ".png":
            with whole_file(path, "wb") as file:
                figure.savefig(file, format="png", dpi=160, metadata={"Title": title})
            return path
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Title": title, "Date": None})
    with whole_file(path) as file:
        description = f"</title>\n <desc>{escape(_description(look))}</desc>"
        file.write(text.getvalue().replace("</title>", description, 1))
    return path


def _figure(look: Look, title: str) -> Any:
    from matplotlib.figure import Figure

    shown = next((text for text in look.texts if text.maps is not None), None)
    heights = [1.0 + 0.37 * look.num_layers * (12 / look.num_heads), 3.6] if shown else []
    figure = Figure(figsize=(9, sum(heights) + 5.9), layout="constrained")
    rows: Any = figure.subfigures(len(heights) + 2, 1, height_ratios=[*heights, 2.95, 2.95])
    if shown is not None:
        _overview(rows[0], look, shown)
        _one_head(rows[1], shown)
    numbers = rows[-2].subplots(1, 2)
    _draw_shares(numbers[0], look)
    _draw_vertical(numbers[1], look)
    last = rows[-1].subplots(1, 2)
    _draw_outputs(rows[-1], last[0], look)
    _draw_vectors(last[1], look)
    texts = "one text" if look.num_texts == 1 else f"means over {look.num_texts} texts"
    figure.suptitle(
        f"{title}\n{look.method} on {look.backbone.rpartition('/')[2]}, {texts}", fontsize=10
    )
    return figure


def _overview(part: Any, look: Look, text: TextLook) -> None:
    """All heads of both sides, small; vertical ones have a frame."""
    assert text.maps is not None
    panels = part.subplots(1, 2)
    sides = (
        ("without the adapter", text.maps.before_LHTT, text.before),
        ("with the adapter", text.maps.after_LHTT, text.after),
    )
    num_tokens = len(text.tokens)
    step = num_tokens + max(1, round(num_tokens / 8))
    for panel, (name, maps_LHTT, heads) in zip(panels, sides, strict=True):
        tiles = _mosaic(maps_LHTT, step)
        panel.imshow(tiles, cmap=_colours(), vmin=0, vmax=1, interpolation="nearest")
        for layer, head in heads.vertical_LH.nonzero().tolist():
            corner = (head * step - 0.5, layer * step - 0.5)
            _frame(panel, corner, num_tokens)
        middle = (num_tokens - 1) / 2
        panel.set_xticks(
            [h * step + middle for h in range(look.num_heads)], range(1, look.num_heads + 1)
        )
        panel.set_yticks(
            [i * step + middle for i in range(look.num_layers)], range(1, look.num_layers + 1)
        )
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("head")
        _bare(panel)
    panels[0].set_ylabel("layer")
    words = _clean(" ".join(text.tokens))
    words = words if len(words) <= 110 else f"{words[:109]}…"
    part.suptitle(f"Attention of each head; a frame marks a vertical head\n{words}", fontsize=9)


def _mosaic(maps_LHTT: Tensor, step: int) -> np.ndarray:
    """The roots of the weights, as small ones would not be seen; gaps are not numbers."""
    num_layers, num_heads, num_tokens, _ = maps_LHTT.shape
    roots = maps_LHTT.sqrt().numpy()
    tiles = np.full((num_layers * step, num_heads * step), np.nan)
    for layer in range(num_layers):
        for head in range(num_heads):
            top, left = layer * step, head * step
            tiles[top : top + num_tokens, left : left + num_tokens] = roots[layer, head]
    gap = step - num_tokens
    return tiles[:-gap, :-gap]


def _one_head(part: Any, text: TextLook) -> None:
    """The head whose output at the first special token moves furthest, with its tokens."""
    assert text.maps is not None
    layer, head = divmod(int(text.change.first_LH.argmax()), text.change.first_LH.shape[1])
    panels = part.subplots(1, 2)
    sides = (("without", text.maps.before_LHTT), ("with the adapter", text.maps.after_LHTT))
    tokens = [_clean(token) for token in text.tokens]
    image = None
    for panel, (name, maps_LHTT) in zip(panels, sides, strict=True):
        image = panel.imshow(
            maps_LHTT[layer, head].sqrt().numpy(),
            cmap=_colours(),
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        shown = [i for i, slot in enumerate(text.slots) if slot or len(tokens) <= _LABELS]
        size = 7 if len(tokens) <= 24 else 4.5
        labels = [tokens[i] for i in shown]
        panel.set_xticks(shown, labels, rotation=90, fontsize=size)
        panel.set_yticks(shown, labels, fontsize=size)
        panel.set_title(name, fontsize=10)
        _bare(panel)
    shares = (0, 0.05, 0.25, 0.5, 1)
    bar = part.colorbar(image, ax=list(panels), ticks=np.sqrt(shares), fraction=0.03, pad=0.02)
    bar.ax.set_yticklabels([f"{100 * share:g} %" for share in shares])
    bar.outline.set_visible(False)
    part.suptitle(
        f"Layer {layer + 1}, head {head + 1}: rows look at columns "
        "(its output moves furthest at the first special token)",
        fontsize=9,
    )


def _draw_shares(panel: Any, look: Look) -> None:
    layers = np.arange(look.num_layers)
    handles = {}
    for side, place in ((look.before, -0.2), (look.after, 0.2)):
        bottom = np.zeros(look.num_layers)
        share_LS = side.share_LHS.mean(1).numpy()
        for slot, name in enumerate(look.slots):
            height = share_LS[:, slot]
            handles[name] = panel.bar(
                layers + place,
                height,
                0.36,
                bottom=bottom,
                color=SLOTS[slot % len(SLOTS)],
                hatch=HATCHES[slot // len(SLOTS) % len(HATCHES)],
                edgecolor="white",
                linewidth=0,
            )
            bottom += height
        panel.bar(layers + place, 1 - bottom, 0.36, bottom=bottom, color=OTHER)
    names = [_clean(name) for name in handles]
    top, drawn = 1.0, list(handles.values())
    if len(names) <= _FEW:
        panel.legend(drawn, names, frameon=True, framealpha=0.9, edgecolor="none", fontsize=8)
    else:
        top = _legend_above(panel, drawn, names, 1)
        panel.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    what = "special tokens" if look.num_special == len(look.slots) else "tokens"
    panel.set_title(f"Attention on {what} (left bar without, right bar with)", fontsize=9)
    _by_layer(panel, range(look.num_layers), "share of the attention", top)


def _draw_vertical(panel: Any, look: Look) -> None:
    for name, side, colour, marker in (
        ("without the adapter", look.before, BEFORE, "^"),
        ("with the adapter", look.after, AFTER, "o"),
    ):
        style = {"color": colour, "marker": marker, "markersize": 5}
        panel.plot(side.vertical_LH.sum(1).numpy(), label=f"{name}, as published", **style)
        panel.plot(
            side.vertical_all_LH.sum(1).numpy(),
            label=f"{name}, over all special tokens",
            linestyle=":",
            **style,
            markerfacecolor="white",
        )
    panel.legend(frameon=False, fontsize=8, loc="upper center")
    panel.set_title("Vertical heads of a layer", fontsize=9)
    top = look.num_heads / (1 - 0.04 - 0.075 * 4)  # four lines of the legend above what is drawn
    _by_layer(panel, range(look.num_layers), f"heads of {look.num_heads}", top)
    panel.set_yticks(range(0, look.num_heads + 1, max(1, look.num_heads // 4)))


def _draw_outputs(part: Any, panel: Any, look: Look) -> None:
    from matplotlib.colors import LogNorm

    change_LH = look.change.first_LH.clamp_min(1e-3).numpy()
    top = max(10.0, float(change_LH.max()))
    image = panel.imshow(change_LH, cmap="Blues", norm=LogNorm(0.1, top, clip=True), aspect="auto")
    panel.set_xticks(range(look.num_heads), range(1, look.num_heads + 1), fontsize=7)
    panel.set_yticks(range(look.num_layers), range(1, look.num_layers + 1))
    panel.set_xlabel("head")
    panel.set_ylabel("layer")
    _bare(panel)
    bar = part.colorbar(image, ax=panel, format="%g ×")
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    panel.set_title("How far a head's output moves at the first special token", fontsize=9)


def _draw_vectors(panel: Any, look: Look) -> None:
    vectors = look.vectors
    if vectors is None:
        panel.plot(look.change.mean_LH.mean(1).numpy(), color=AFTER, marker="o", markersize=5)
        panel.set_title("How far outputs move, mean over heads and tokens", fontsize=9)
        _by_layer(panel, range(look.num_layers), "times its length", None)
        return
    for index, name in enumerate(vectors.names):
        style: dict[str, Any] = {
            "color": SLOTS[index % len(SLOTS)],
            "marker": "osD^"[index % 4],
            "markersize": 5,
        }
        dashes = DASHES[index // len(SLOTS) % len(DASHES)]
        panel.plot(
            vectors.layers,
            vectors.ratio_LV[:, index].numpy(),
            linestyle=dashes,
            label=_clean(name),
            **style,
        )
        if vectors.scale_ratio_LV is not None:
            panel.plot(
                vectors.layers,
                vectors.scale_ratio_LV[:, index].numpy(),
                linestyle=":",
                markerfacecolor="white",
                label=f"scale, {_clean(name)}",
                **style,
            )
    if vectors.product_ratio_L is not None:
        panel.plot(
            vectors.layers,
            vectors.product_ratio_L.numpy(),
            color="black",
            marker="x",
            label="product, every token",
        )
    known = [float(n) for line in panel.lines for n in line.get_ydata() if np.isfinite(n)]
    highest = max(known, default=0) or 1
    handles, names = panel.get_legend_handles_labels()
    top = _legend_above(panel, handles, names, highest)
    is_more = vectors.scale_ratio_LV is not None or vectors.product_ratio_L is not None
    what = "what is learned" if is_more else "the learned vector"
    panel.set_title(f"Length of {what} over length of the state", fontsize=9)
    _by_layer(panel, vectors.layers, "times the state", top)


def _legend_above(panel: Any, handles: Any, names: Any, highest: float) -> float:
    """A legend above what is drawn, as high as `highest`; returns the end of the axis."""
    if len(names) > _LISTED:
        handles = handles[:_LISTED]
        names = [*names[: _LISTED - 1], f"and {len(names) - _LISTED + 1} more"]
    is_wide = max(map(len, names)) > _WIDE
    columns = 1 if len(names) < 3 else 2 if len(names) < 7 or is_wide else 4
    rows = -(-len(names) // columns)
    panel.legend(
        handles,
        names,
        loc="upper center",
        ncols=columns,
        frameon=False,
        fontsize=8 if columns < 3 and len(names) < 7 else 6.5,
    )
    return highest / (1 - 0.04 - 0.075 * rows)


def _by_layer(panel: Any, layers: Any, name: str, top: float | None) -> None:
    panel.set_xticks(list(layers), [layer + 1 for layer in layers])
    panel.set_ylim(0, top)
    panel.set_xlabel("layer")
    panel.set_ylabel(name)
    panel.grid(visible=True, axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _frame(panel: Any, corner: tuple[float, float], size: int) -> None:
    from matplotlib.patches import Rectangle

    panel.add_patch(Rectangle(corner, size, size, fill=False, edgecolor="black", linewidth=0.8))


def _bare(panel: Any) -> None:
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0, pad=2)


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps["Blues"].with_extremes(bad="white")


def _clean(text: str) -> str:
    """Without signs that an XML file cannot hold."""
    return re.sub(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _description(look: Look) -> str:
    before, after = (
        (
            float(s.vertical_LH.sum()),
            float(s.vertical_all_LH.sum()),
            float(look.on_special(s).mean()),
        )
        for s in (look.before, look.after)
    )
    heads = look.num_layers * look.num_heads
    added = (
        look.extra_tokens
        and f"Special tokens written behind each text on both sides: {look.extra_tokens}."
    )
    parts = (
        f"{look.num_layers} layers of {look.num_heads} heads, texts: {look.num_texts}.",
        f"Vertical heads as published: {before[0]:.1f} of {heads} without the adapter,",
        f"{after[0]:.1f} with it; over all special tokens {before[1]:.1f} and {after[1]:.1f}.",
        f"Attention on special tokens, mean over heads: {100 * before[2]:.0f} %",
        f"and {100 * after[2]:.0f} %. The largest change of a head's output at the first special",
        f"token is {float(look.change.first_LH.max()):.1f} times its length.",
        *([added] if added else []),
        *([look.vectors.about] if look.vectors else []),
    )
    return " ".join(parts)
