"""Heads that look at special tokens: why a change of these reaches every other token.

Shape letters: H heads, T tokens.
"""

import torch
from torch import Tensor


def vertical_heads(
    attention_HTT: Tensor, columns: tuple[int, ...] = (0, -1), share: float = 0.9
) -> Tensor:
    """Which heads are vertical: most rows have their largest weight in one of these columns, (H).

    The published criterion takes the first and the last column and nine rows in ten (Yang et al. 2023,
    https://arxiv.org/abs/2210.04382, code). It is meant for one text without padding; pass the places of
    all special tokens to count a [SEP] in the middle.

    >>> vertical_heads(torch.eye(3).unsqueeze(0))
    tensor([False])
    """
    num_tokens = attention_HTT.shape[-1]
    largest_HT = attention_HTT.argmax(-1)
    wanted = torch.tensor([c % num_tokens for c in columns], device=attention_HTT.device)
    counts_H = torch.isin(largest_HT, wanted).sum(-1)
    # whole numbers: nine tenths is not a binary fraction
    return counts_H * 1000 >= round(share * 1000) * num_tokens
