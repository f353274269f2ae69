"""How good an adapter is on labelled rows."""

from pathlib import Path
from typing import Literal

from pastina.adapter import Card
from pastina.answering import checked_row
from pastina.data.read import load_dataset, read_rows
from pastina.data.rows import Row
from pastina.engine.affine import Precision
from pastina.errors import DataError
from pastina.kinds import KINDS
from pastina.predict import Predictor, load
from pastina.recipe import DataSpec, make_recipe
from pastina.training.score import Scorer


def evaluate(
    path: str | Path,
    data: str | Path | DataSpec | None = None,
    *,
    part: str = "test",
    backbone: str | None = None,
    precision: Precision | Literal["auto"] = "auto",
) -> dict[str, float]:
    """The metrics of an adapter on a file, or on a part of the data it was trained with.

    data: a file; a DataSpec; None: the recipe's own data, of which `part` ("dev" or "test") is
    taken. Rows must carry labels that the adapter knows.

    Raises:
        DataError: bad rows, an unknown label, no such part. RecipeError: no such precision.
    """
    predictor = load(path, backbone=backbone, precision=precision)
    return evaluate_rows(predictor, _rows(predictor.card, data, part))


def evaluate_rows(predictor: Predictor, rows: list[Row]) -> dict[str, float]:
    """The metrics of a loaded task on these rows."""
    card = predictor.card
    scorer = Scorer(
        KINDS[card.kind],
        card.labels,
        rows,
        predictor.encode([checked_row(row, card) for row in rows]),
        pad_id=predictor.tokenizer.pad_token_id,
        target_scale=(card.target_mean, card.target_std),
    )
    return scorer.score(predictor.engine, predictor.device)


def _rows(card: Card, data: str | Path | DataSpec | None, part: str) -> list[Row]:
    recipe = make_recipe(card.recipe, source=f"the recipe of {card.name!r}")
    if isinstance(data, str | Path):
        return read_rows(data, card.kind, recipe.data.model_copy(update={"format": "auto"}))
    if part not in ("dev", "test"):
        raise DataError(f"There is no part {part!r} to evaluate on; take dev or test.")
    rows = list(getattr(load_dataset(card.kind, data or recipe.data, recipe.fit.seed), part))
    if not rows:
        raise DataError(
            f"The data of {card.name!r} has no {part} part. Name a file with labelled rows."
        )
    return rows
