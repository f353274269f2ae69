"""A padded batch laid out without its padding: the tokens of all rows one after the other.

Shape letters: P packed tokens, B rows, T tokens.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pastina.engine.chunks import Chunk, make_chunks
from pastina.engine.sight import Sight, View, look


@dataclass(frozen=True, slots=True)
class Pack:
    """Where the tokens of a batch went; packed rows are ordered by falling length.

    order_B: the batch's row of each packed row; place_B: the packed row of each row of the batch.
    length_B: of the packed rows; start_B: their first tokens. token_P: the token's place in the batch
    (B * T); position_P: in its row. place_BT: the packed token at a place of the batch, flat, -1 where
    it is padding. lengths: as length_B. spreads: how far the first and the last token of each packed row
    are apart.
    """

    order_B: Tensor
    place_B: Tensor
    length_B: Tensor
    start_B: Tensor
    token_P: Tensor
    position_P: Tensor
    place_BT: Tensor
    lengths: list[int]
    spreads: list[int]
    num_heads: int
    _chunks: list[Chunk] = field(default_factory=list)
    _views: dict[Sight, list[View]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """How many tokens there are, P."""
        return len(self.token_P)

    @property
    def longest(self) -> int:
        """How many tokens the longest row has."""
        return self.lengths[0]

    @property
    def chunks(self) -> list[Chunk]:
        """Neighbouring packed rows whose attention is computed together."""
        if not self._chunks:
            self._chunks.extend(make_chunks(self.lengths, self.num_heads, self.token_P.device))
        return self._chunks

    def views(self, sight: Sight) -> list[View]:
        """The chunks as layers with this sight see them."""
        if sight not in self._views:
            self._views[sight] = [
                look(chunk, sight, self.position_P, max(self.spreads[chunk.rows]))
                for chunk in self.chunks
            ]
        return self._views[sight]


def pack(is_real_BT: Tensor, num_heads: int) -> Pack:
    """Lay the real tokens of a batch one after the other."""
    num_rows, num_tokens = is_real_BT.shape
    device = is_real_BT.device
    length_B, order_B = is_real_BT.sum(1).sort(descending=True, stable=True)
    row_P, column_P = is_real_BT[order_B].nonzero(as_tuple=True)
    token_P = order_B[row_P] * num_tokens + column_P
    place_BT = torch.full((num_rows * num_tokens,), -1, device=device)
    place_BT[token_P] = torch.arange(len(token_P), device=device)
    place_B = torch.empty_like(order_B)
    place_B[order_B] = torch.arange(num_rows, device=device)
    first_B, behind_B = is_real_BT.byte().argmax(1), is_real_BT.flip(1).byte().argmax(1)
    spread_B = (num_tokens - 1 - behind_B - first_B)[order_B]
    lengths, spreads = torch.stack([length_B, spread_B]).tolist()
    return Pack(
        order_B=order_B,
        place_B=place_B,
        length_B=length_B,
        start_B=length_B.cumsum(0) - length_B,
        token_P=token_P,
        position_P=column_P,
        place_BT=place_BT,
        lengths=lengths,
        spreads=spreads,
        num_heads=num_heads,
    )
