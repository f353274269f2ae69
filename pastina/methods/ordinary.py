"""Ordinary tokens in the place of special ones: the control that asks whether special ones matter.

A row gets as many vectors as it has special tokens, or as it has ordinary ones where these are fewer.
Which tokens that are depends on the row alone: not on its padding, nor on other rows.

Shape letters: B rows, T tokens.
"""

import torch
from torch import Tensor

_PRIME, _FACTOR = 2**31 - 1, 48271  # squares and products below stay within 64 bits
_LAST = 2**62


def rank_ordinary(
    input_ids_BT: Tensor, special_rank_BT: Tensor, attention_mask_BT: Tensor | None, which: str
) -> Tensor:
    """From the left the rank of every chosen token, (B, T); 0 elsewhere.

    special_rank_BT: above 0 at special tokens. which: "first": the first ordinary tokens of the row;
    "random": drawn, with the row's token ids as the seed.
    """
    is_special_BT = special_rank_BT > 0
    is_real_BT = torch.ones_like(is_special_BT)
    if attention_mask_BT is not None:
        is_real_BT = attention_mask_BT != 0
    is_ordinary_BT = is_real_BT & ~is_special_BT
    if which == "first":
        order_BT = is_ordinary_BT.cumsum(1)
    else:
        keys_BT = _keys(input_ids_BT, is_real_BT).masked_fill(~is_ordinary_BT, _LAST)
        order_BT = keys_BT.argsort(dim=1, stable=True).argsort(dim=1) + 1
    is_chosen_BT = is_ordinary_BT & (order_BT <= is_special_BT.sum(1, keepdim=True))
    return is_chosen_BT.cumsum(1) * is_chosen_BT


def _keys(input_ids_BT: Tensor, is_real_BT: Tensor) -> Tensor:
    """A number for each token that looks random and follows from the real tokens of its row."""
    place_BT = is_real_BT.cumsum(1)
    mixed_BT = _mix(_mix(input_ids_BT.long()) + place_BT) * is_real_BT
    return _mix(_mix(mixed_BT.sum(1, keepdim=True)) + place_BT)


def _mix(numbers: Tensor) -> Tensor:
    for _ in range(3):  # the square matters: with sums alone, swapped tokens would look the same
        numbers = numbers % _PRIME
        numbers = (numbers * numbers % _PRIME * _FACTOR + 11) % _PRIME
    return numbers
