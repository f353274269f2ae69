"""Frozen layers that norm before each part, as ModernBERT's do: forward, and the backward by hand.

Shape letters: P packed tokens, N states that are read, R tokens that a vector is added to, H hidden.
"""

from dataclasses import dataclass

from torch import Tensor

from pastina.engine.attention import Attention, spread
from pastina.engine.frozen import FeedForward, NoNorm, Norm, Saved
from pastina.engine.packing import Pack


@dataclass(frozen=True, slots=True)
class PreNormLayer:
    """x + attention(norm1(x)), then x + ffn(norm2(x)); last: the norm after the last layer."""

    norm1: Norm | NoNorm
    attention: Attention
    norm2: Norm | NoNorm
    ffn: FeedForward
    last: Norm | NoNorm

    def run(
        self, hidden_PH: Tensor, packed: Pack, read_N: Tensor | None, one_each: bool, keep: bool
    ) -> tuple[Tensor, Saved | None]:
        """See FrozenLayer."""
        states_PH, saved1 = self.norm1.run(hidden_PH)
        residual_NH = hidden_PH if read_N is None else hidden_PH[read_N]
        middle_NH, heads = self.attention.run(
            states_PH, residual_NH, packed, read_N, one_each, keep
        )
        normed_NH, saved2 = self.norm2.run(middle_NH)
        summed_NH, wide = self.ffn.run(normed_NH, middle_NH, keep)
        out_NH, saved3 = self.last.run(summed_NH)
        return out_NH, Saved(heads, (saved1, saved2, saved3), wide) if keep else None

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
        saved1, saved2, saved3 = saved.norms
        grad_NH = self.last.back(grad_NH, saved3)
        grad_ffn = self.ffn.back(grad_NH, saved.wide, residual=False)
        grad_NH = grad_NH + self.norm2.back(grad_ffn, saved2)
        grad_states = self.attention.back(
            grad_NH, saved.heads, packed, read_N, one_each, only_R, None
        )
        if read_N is not None:
            grad_NH = spread(grad_NH, read_N, packed.num_tokens)
        if only_R is not None:
            grad_NH, saved1 = grad_NH[only_R], tuple(tensor[only_R] for tensor in saved1)
        return grad_NH + self.norm1.back(grad_states, saved1)
