"""Frozen layers that norm after each part, as BERT's do: forward, and the backward written by hand.

Shape letters: P packed tokens, N states that are read, R tokens that a vector is added to, H hidden.
"""

from dataclasses import dataclass

from torch import Tensor

from pastina.engine.attention import Attention, spread
from pastina.engine.frozen import FeedForward, NoNorm, Norm, Saved
from pastina.engine.packing import Pack


@dataclass(frozen=True, slots=True)
class PostNormLayer:
    """norm1(x + attention(x)), then norm2(x + ffn(x))."""

    attention: Attention
    norm1: Norm | NoNorm
    ffn: FeedForward
    norm2: Norm | NoNorm

    def run(
        self, hidden_PH: Tensor, packed: Pack, read_N: Tensor | None, one_each: bool, keep: bool
    ) -> tuple[Tensor, Saved | None]:
        """See FrozenLayer."""
        residual_NH = hidden_PH if read_N is None else hidden_PH[read_N]
        mixed_NH, heads = self.attention.run(hidden_PH, residual_NH, packed, read_N, one_each, keep)
        middle_NH, saved1 = self.norm1.run(mixed_NH)
        summed_NH, wide = self.ffn.run(middle_NH, middle_NH, keep)
        out_NH, saved2 = self.norm2.run(summed_NH)
        return out_NH, Saved(heads, (saved1, saved2), wide) if keep else None

    def back(
        self,
        grad_NH: Tensor,
        saved: Saved,
        packed: Pack,
        read_N: Tensor | None,
        one_each: bool,
        only_R: Tensor | None,
    ) -> Tensor:
        """See FrozenLayer."""
        saved1, saved2 = saved.norms
        grad_NH = self.norm2.back(grad_NH, saved2)
        grad_NH = self.norm1.back(self.ffn.back(grad_NH, saved.wide, residual=True), saved1)
        plus_PH = grad_NH if read_N is None else spread(grad_NH, read_N, packed.num_tokens)
        return self.attention.back(grad_NH, saved.heads, packed, read_N, one_each, only_R, plus_PH)
