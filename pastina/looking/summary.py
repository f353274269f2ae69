"""A look as a table: a line for each layer, and one for all."""

from collections.abc import Iterator

from pastina.looking.records import Look

COLUMNS = (
    "layer",
    "vertical heads",
    "on all special",
    "attention on special",
    "moves at the first",
    "moves on average",
)


def summary(look: Look) -> Iterator[list[str]]:
    """The cells of COLUMNS: before → after, and how far the outputs of the heads move."""
    for layer in range(look.num_layers):
        yield _line(look, str(layer + 1), slice(layer, layer + 1))
    yield _line(look, "all", slice(None))


def _line(look: Look, name: str, layers: slice) -> list[str]:
    before, after = look.before, look.after
    counts = [
        f"{round(float(was[layers].sum()), 2):g} → {round(float(now[layers].sum()), 2):g}"
        for was, now in (
            (before.vertical_LH, after.vertical_LH),
            (before.vertical_all_LH, after.vertical_all_LH),
        )
    ]
    shares = [100 * float(side.share_LHS[layers].sum(-1).mean()) for side in (before, after)]
    moves = [float(grid[layers].mean()) for grid in (look.change.first_LH, look.change.mean_LH)]
    return [
        name,
        *counts,
        f"{shares[0]:.1f} % → {shares[1]:.1f} %",
        *(f"{move:.2f} ×" for move in moves),
    ]
