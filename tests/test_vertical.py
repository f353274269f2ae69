"""The published criterion, on the published examples."""

import pytest
import torch
from torch import Tensor

from pastina.vertical import vertical_heads


def head(num_tokens: int, num_rows: int, columns: tuple[int, ...]) -> Tensor:
    """A map whose first rows have their largest weight in these columns in turn, the others do not."""
    weights = torch.rand(1, num_tokens, num_tokens) * 0.5
    for row in range(num_tokens):
        column = columns[row % len(columns)] if row < num_rows else 1 + row % (num_tokens - 2)
        weights[0, row, column] = 1.0
    return weights


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "is_vertical"),
    [(10, 8, False), (10, 9, True), (10, 10, True), (100, 89, False), (100, 90, True)],
)
def test_nine_rows_in_ten(num_tokens: int, num_rows: int, is_vertical: bool) -> None:
    for columns in ((0,), (num_tokens - 1,), (0, num_tokens - 1)):
        assert vertical_heads(head(num_tokens, num_rows, columns)).tolist() == [is_vertical]


def test_a_middle_column_counts_only_where_it_is_named() -> None:
    middle = head(10, 10, (4,))
    assert vertical_heads(middle).tolist() == [False]
    assert vertical_heads(middle, columns=(0, 4, -1)).tolist() == [True]


def test_heads_are_judged_one_by_one() -> None:
    both = torch.cat([head(10, 9, (0,)), head(10, 8, (0,))])
    assert vertical_heads(both).tolist() == [True, False]
