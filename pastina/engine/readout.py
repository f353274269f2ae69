"""What heads read of the last states of a packed batch.

Shape letters: P packed tokens, B rows, T tokens, N items or states that are read, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pastina.engine.packing import Pack


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring rows of a batch whose heads read alike.

    items: for pooling "tokens" (row_N, token_N), rows counted in the whole batch.
    """

    rows: slice
    pooling: str
    items: tuple[Tensor, Tensor] | None = None


class Readout:
    """Which packed tokens are read for the parts of a batch, and what each part makes of them.

    read_N: the packed tokens, None: all; one_each: one token of each packed row.
    """

    def __init__(self, packed: Pack, parts: Sequence[Part]) -> None:
        self.packed, self.parts = packed, parts
        poolings = {part.pooling for part in parts}
        self.one_each = poolings <= {"cls", "pooler"}
        self.is_mean = poolings == {"mean"}
        if self.one_each:
            self.read_N: Tensor | None = packed.start_B
        elif self.is_mean:
            self.read_N = None
        else:
            tokens = [self._tokens(part) for part in parts]
            self.counts = [len(part) for part in tokens]
            self.read_N = tokens[0] if len(tokens) == 1 else torch.cat(tokens)

    def _tokens(self, part: Part) -> Tensor:
        """The packed tokens that a part reads."""
        if part.pooling in ("cls", "pooler"):
            return self.packed.start_B[self.packed.place_B[part.rows]]
        place_BT = self.packed.place_BT.view(len(self.packed.order_B), -1)
        if part.pooling == "mean":
            own = place_BT[part.rows]
            return own[own >= 0]
        assert part.items is not None
        return place_BT[part.items]

    def pool(self, states: Tensor, pooler: Any) -> list[Tensor]:
        """Of the states at read_N what each part's head is given, (N, H), rows in the batch's order."""
        if self.one_each:
            first_BH = states.index_select(0, self.packed.place_B)
            return [self._first(first_BH[part.rows], part, pooler) for part in self.parts]
        if self.is_mean:
            packed = self.packed
            row_P = packed.order_B.repeat_interleave(packed.length_B, output_size=len(states))
            length_B = packed.length_B[packed.place_B]
            means_BH = _means(states, row_P, length_B)
            return [means_BH[part.rows] for part in self.parts]
        return [
            self._one(own, part, pooler)
            for own, part in zip(states.split(self.counts), self.parts, strict=True)
        ]

    def _one(self, states: Tensor, part: Part, pooler: Any) -> Tensor:
        if part.pooling == "tokens":
            return states
        if part.pooling != "mean":
            return self._first(states, part, pooler)
        length_B = self.packed.length_B[self.packed.place_B[part.rows]]
        rows = torch.arange(len(length_B), device=states.device)
        return _means(states, rows.repeat_interleave(length_B, output_size=len(states)), length_B)

    def _first(self, first_BH: Tensor, part: Part, pooler: Any) -> Tensor:
        return pooler(first_BH.unsqueeze(1)) if part.pooling == "pooler" else first_BH


def _means(states: Tensor, row_N: Tensor, length_B: Tensor) -> Tensor:
    sum_BH = states.new_zeros(len(length_B), states.shape[1]).index_add(0, row_N, states)
    return sum_BH / length_B[:, None]
