"""From what was kept of a text to the numbers of a look.

Shape letters: L layers, H heads, T tokens, S slots, E size of a head's output.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from pastina.looking.records import Change, Heads
from pastina.looking.trace import Trace
from pastina.vertical import vertical_heads

Means = TypeVar("Means", Heads, Change)


def measure_heads(
    attention_LHTT: Tensor, slots: Sequence[int], num_slots: int, num_special: int | None = None
) -> Heads:
    """What the heads look at in one text; slots: of each token, 0 for none.

    num_special: how many slots, from the first, are special tokens; None: all.
    """
    last = num_slots if num_special is None else num_special
    columns_LHT = attention_LHTT.mean(2)
    share_LHS = torch.zeros(*attention_LHTT.shape[:2], num_slots)
    for place, slot in enumerate(slots):
        if slot:
            share_LHS[..., slot - 1] = columns_LHT[..., place]
    special = tuple(place for place, slot in enumerate(slots) if 0 < slot <= last)
    published, everywhere = (
        torch.stack([vertical_heads(layer_HTT, columns) for layer_HTT in attention_LHTT]).float()
        for columns in ((0, -1), special)
    )
    return Heads(share_LHS, published, everywhere)


def measure_change(before: Trace, after: Trace, first: int) -> Change:
    """How far the output of each head moves; first: the place of the first special token."""
    size_LTH = before.output_LTHE.norm(dim=-1)
    moved_LTH = (after.output_LTHE - before.output_LTHE).norm(dim=-1)
    relative_LTH = moved_LTH / size_LTH.clamp_min(torch.finfo(size_LTH.dtype).tiny)
    return Change(relative_LTH[:, first], relative_LTH.mean(1))


def mean(parts: Iterable[Means]) -> Means:
    """The mean of each number over the texts."""
    parts = list(parts)
    kind = type(parts[0])
    names = [one.name for one in fields(kind)]
    return kind(*(torch.stack([getattr(p, n) for p in parts]).mean(0) for n in names))
