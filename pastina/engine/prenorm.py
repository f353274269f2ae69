"""Frozen layers that norm before each part, as ModernBERT's do: forward, and the backward by hand.

Shape letters: P packed tokens, N states that are read, R tokens that a vector is added to, H hidden.
"""

from dataclasses import dataclass

from torch import Tensor

from pastina.engine.attention import Attention, spread
from pastina.engine.frozen import FeedForward, NoNorm, Norm, Rows, Saved, back_rows, run_rows
from pastina.engine.packing import Pack
from pastina.engine.rounding import keys_at


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
        context_NH, heads = self.attention.run(states_PH, packed, read_N, one_each, keep)
        residual_NH = hidden_PH if read_N is None else hidden_PH[read_N]
        out_NH, rows = run_rows(self._run, context_NH, residual_NH, keep)
        return out_NH, Saved(heads, rows, saved1) if keep else None

    def back(
        self,
        grad_NH: Tensor,
        saved: Saved,
        packed: Pack,
        read_N: Tensor | None,
        one_each: bool,
        only_R: Tensor | None,
        keys_P: Tensor | None,
    ) -> Tensor:
        """See FrozenLayer."""
        saved1: tuple[Tensor, ...] = saved.norm
        grad_context, grad_NH = back_rows(self._back, grad_NH, saved.rows, keys_at(keys_P, read_N))
        grad_states = self.attention.back(
            grad_context, saved.heads, packed, read_N, one_each, only_R, None, keys_P
        )
        if read_N is not None:
            grad_NH = spread(grad_NH, read_N, packed.num_tokens)
        if only_R is not None:
            grad_NH, saved1 = grad_NH[only_R], tuple(tensor[only_R] for tensor in saved1)
        return grad_NH + self.norm1.back(grad_states, saved1)

    def _run(self, context: Tensor, residual: Tensor) -> tuple[Tensor, Rows]:
        middle = self.attention.out.run(context, residual)
        normed, saved2 = self.norm2.run(middle)
        summed, wide = self.ffn.run(normed, middle)
        out, saved3 = self.last.run(summed)
        return out, (saved2, wide, saved3)

    def _back(self, grad: Tensor, saved: Rows, keys_N: Tensor | None) -> tuple[Tensor, Tensor]:
        saved2, wide, saved3 = saved
        grad = self.last.back(grad, saved3)
        grad = grad + self.norm2.back(self.ffn.back(grad, wide, None, keys_N), saved2)
        return self.attention.out.back(grad, None, keys_at(keys_N, None, 2)), grad
