"""A look as a table: a line for each layer, and one for all."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pastina.looking.records import Look

COLUMNS = (
    "layer",
    "vertical heads",
    "on all special",
    "attention on special",
    "moves at the first",
    "moves on average",
)


def columns(look: Look) -> tuple[str, ...]:
    """COLUMNS, and behind them one for each kind of number that the adapter has learned."""
    has_ordinary = look.num_special < len(look.slots)
    ordinary = ("attention on ordinary",) if has_ordinary else ()
    return (*COLUMNS, *ordinary, *(name for name, _ in _learned(look)))


def summary(look: Look) -> Iterator[list[str]]:
    """The cells of the columns: before → after, how far the outputs of the heads move, and the length
    of what is added over that of the state."""
    for layer in range(look.num_layers):
        yield _line(look, str(layer + 1), [layer])
    yield _line(look, "all", list(range(look.num_layers)))


def _line(look: Look, name: str, layers: list[int]) -> list[str]:
    before, after = look.before, look.after
    counts = [
        f"{round(float(was[layers].sum()), 2):g} → {round(float(now[layers].sum()), 2):g}"
        for was, now in (
            (before.vertical_LH, after.vertical_LH),
            (before.vertical_all_LH, after.vertical_all_LH),
        )
    ]
    special = _change(*(look.on_special(side)[layers] for side in (before, after)))
    moves = [float(grid[layers].mean()) for grid in (look.change.first_LH, look.change.mean_LH)]
    others = [side.share_LHS[layers, :, look.num_special :] for side in (before, after)]
    ordinary = [_change(*(other.sum(-1) for other in others))] if others[0].shape[-1] else []
    return [
        name,
        *counts,
        special,
        *(f"{move:.2f} ×" for move in moves),
        *ordinary,
        *(_times(look, numbers, layers) for _, numbers in _learned(look)),
    ]


def _learned(look: Look) -> Iterator[tuple[str, Tensor]]:
    """What is added, by its name: its length over that of the state, or of the biases that there were,
    (layers, vectors)."""
    vectors = look.vectors
    if vectors is None:
        return
    last = len(vectors.names) - vectors.everywhere
    for name, ratio_LV in (("vector", vectors.ratio_LV), ("scale", vectors.scale_ratio_LV)):
        if ratio_LV is not None:
            yield f"{name}s", ratio_LV[:, :last]
            if vectors.everywhere:
                yield f"{name} of every token", ratio_LV[:, last:]
    if vectors.product_ratio_L is not None:
        yield "product", vectors.product_ratio_L[:, None]
    if vectors.bias_ratio_L is not None:
        yield "biases", vectors.bias_ratio_L[:, None]


def _change(was: Tensor, now: Tensor) -> str:
    return f"{100 * float(was.mean()):.1f} % → {100 * float(now.mean()):.1f} %"


def _times(look: Look, ratio_LV: Tensor, layers: list[int]) -> str:
    """The mean over these layers; what is not there does not count."""
    assert look.vectors is not None
    rows = [at for at, layer in enumerate(look.vectors.layers) if layer in layers]
    mean = float(torch.nanmean(ratio_LV[rows])) if rows else math.nan
    return "–" if math.isnan(mean) else f"{mean:.2f} ×"
