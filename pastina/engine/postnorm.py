"""Frozen layers that norm after each part, as BERT's do: forward, and the backward written by hand.

Shape letters: P packed tokens, N states that are read, R tokens that a vector is added to, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pastina.engine.addition import Shift
from pastina.engine.attention import Attention, spread
from pastina.engine.frozen import FeedForward, NoNorm, Norm, Rows, Saved, back_rows, run_rows
from pastina.engine.packing import Pack
from pastina.engine.rounding import keys_at
from pastina.engine.shifting import Shifts, Tail


@dataclass(frozen=True, slots=True)
class PostNormLayer:
    """norm1(x + attention(x)), then norm2(x + ffn(x))."""

    attention: Attention
    norm1: Norm | NoNorm
    ffn: FeedForward
    norm2: Norm | NoNorm

    def shifts(self, shifts: Sequence[Shift], num_tokens: int) -> Shifts:
        """What `run` and `back` need where tokens have other biases."""
        hidden, inner = self.attention.out.weight.shape[0], self.ffn.up.weight.shape[0]
        return Shifts(shifts, num_tokens, hidden, inner, self.attention.head_size**-0.5)

    def run(
        self,
        hidden_PH: Tensor,
        packed: Pack,
        read_N: Tensor | None,
        one_each: bool,
        keep: bool,
        shifts: Shifts | None = None,
    ) -> tuple[Tensor, Saved | None]:
        """See FrozenLayer."""
        context_NH, heads = self.attention.run(hidden_PH, packed, read_N, one_each, keep, shifts)
        residual_NH = hidden_PH if read_N is None else hidden_PH[read_N]
        if shifts is not None:
            out_NH, own = self._tail.run(context_NH, residual_NH, shifts, read_N)
            return out_NH, Saved(heads, [own]) if keep else None
        out_NH, rows = run_rows(self._run, context_NH, residual_NH, keep)
        return out_NH, Saved(heads, rows) if keep else None

    def back(
        self,
        grad_NH: Tensor,
        saved: Saved,
        packed: Pack,
        read_N: Tensor | None,
        one_each: bool,
        only_R: Tensor | None,
        keys_P: Tensor | None,
        shifts: Shifts | None = None,
    ) -> Tensor:
        """See FrozenLayer."""
        keys_N = keys_at(keys_P, read_N)
        if shifts is None:
            grad_context, grad_NH = back_rows(self._back, grad_NH, saved.rows, keys_N)
        else:
            (own,) = saved.rows
            grad_context, grad_NH = self._tail.back(grad_NH, own, keys_N, shifts, read_N)
        plus_PH = grad_NH if read_N is None else spread(grad_NH, read_N, packed.num_tokens)
        return self.attention.back(
            grad_context, saved.heads, packed, read_N, one_each, only_R, plus_PH, keys_P, shifts
        )

    @property
    def _tail(self) -> Tail:
        up, act, down = self.ffn
        return Tail(self.attention.out, self.norm1, up, act, down, self.norm2)

    def _run(self, context: Tensor, residual: Tensor) -> tuple[Tensor, Rows]:
        middle, saved1 = self.norm1.run(self.attention.out.run(context, residual))
        summed, wide = self.ffn.run(middle, middle)
        out, saved2 = self.norm2.run(summed)
        return out, (saved1, wide, saved2)

    def _back(self, grad: Tensor, saved: Rows, keys_N: Tensor | None) -> tuple[Tensor, Tensor]:
        saved1, wide, saved2 = saved
        grad = self.norm2.back(grad, saved2)
        grad = self.norm1.back(self.ffn.back(grad, wide, grad, keys_N), saved1)
        return self.attention.out.back(grad, None, keys_at(keys_N, None, 2)), grad
