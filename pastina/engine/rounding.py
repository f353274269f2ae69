"""Where the random numbers come from by which int8 gradients are rounded.

A batch has a seed, a token of it a key of its own. So what a token gives depends neither on the tokens
that are packed beside it nor on how they are packed, and a batch ends the same alone and in a fleet.

Shape letters: P packed tokens, B rows, T tokens, N any of the packed ones, M rows of a product.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# sixteen times the odd number whose multiples are spread over all numbers: a token reads sixteen of them
_STEP = 0xE3779B97F4A7C150 - (1 << 64)
_LONGEST = 1 << 20  # tokens of a row
LAYER = 8  # how far apart the keys of two layers are, each with products of its own


def draw_seed() -> int:
    """Of one batch, from PyTorch's generator."""
    return int(torch.randint(1, 1 << 62, (), dtype=torch.int64))


def make_keys(
    seeds: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    places: Sequence[Tensor],
    num_tokens: int,
) -> Tensor:
    """A key for each packed token, (P,) in int64.

    seeds, shapes: of each batch, its (B, T). places: the packed token at each place of it, flat, below 0
    at padding.
    """
    keys_P = torch.empty(num_tokens, dtype=torch.int64)
    for seed, (num_rows, length), place in zip(seeds, shapes, places, strict=True):
        row_B1, token_T = torch.arange(num_rows)[:, None], torch.arange(length)
        key = seed + (row_B1 * _LONGEST + token_T).flatten() * _STEP
        is_token = place >= 0
        keys_P[place[is_token]] = key[is_token]
    return keys_P


def keys_at(keys_P: Tensor | None, tokens_N: Tensor | None, other: int = 0) -> Tensor | None:
    """The keys of some tokens (None: of all), for another product than those with another number."""
    if keys_P is None:
        return None
    own = keys_P if tokens_N is None else keys_P[tokens_N]
    return own + other if other else own
