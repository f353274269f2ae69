"""Layers that norm after each part, with other biases for some tokens: what the kernels do in one pass,
step by step.

Shape letters: P packed tokens, N states that are read, K shifts, D biases of a layer, H hidden.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pastina.engine.addition import Shift
from pastina.engine.frozen import Activation, NoNorm, Norm
from pastina.engine.rounding import keys_at

PARTS = ("query", "value", "out", "norm1", "up", "down", "norm2")  # in the order of `bias_parts`


class Shifts:
    """The shifts of one layer, and what they learn.

    hidden, inner: sizes of the layer. query_factor: of the queries, in which the scale of attention is.
    """

    def __init__(
        self, shifts: Sequence[Shift], num_tokens: int, hidden: int, inner: int, query_factor: float
    ) -> None:
        sizes = [inner if part == "up" else hidden for part in PARTS]
        values_KD = torch.stack([shift.values_D.float() for shift in shifts])
        if values_KD.shape[1] != sum(sizes):
            raise ValueError(f"{values_KD.shape[1]} biases for the {sum(sizes)} of a layer")
        values: dict[str, Tensor] = dict(zip(PARTS, values_KD.split(sizes, 1), strict=True))
        values["query"] = values["query"] * query_factor
        self._factor, self._count, self._hidden = query_factor, len(shifts), hidden
        self._grads: dict[str, Tensor] = {}
        self.of_P: Tensor | None = (
            None  # the shift of each token, K for none; None: the same for all
        )
        if len(shifts) > 1 or len(shifts[0].tokens_N) < num_tokens:
            self.of_P = torch.full((num_tokens,), len(shifts), device=values_KD.device)
            for number, shift in enumerate(shifts):
                self.of_P[shift.tokens_N] = number
            values = {
                part: torch.cat([v, v.new_zeros(1, v.shape[1])]) for part, v in values.items()
            }
        self._values = values

    def add(self, part: str, outputs: Tensor, tokens_N: Tensor | None) -> None:
        """To what a part puts out for these tokens (None: for all); writes over it."""
        values = self._values[part].to(outputs.dtype)
        if self.of_P is None:
            outputs.add_(values)
        else:
            outputs.add_(values[self._of(tokens_N)])

    def learn(self, part: str, grads: Tensor, tokens_N: Tensor | None) -> None:
        """Keep what follows from the gradient of a part's output for these tokens (None: for all)."""
        grads = grads.float()
        if self.of_P is None:
            found = grads.sum(0, keepdim=True)
        else:
            found = grads.new_zeros(self._count + 1, grads.shape[1])
            found = found.index_add_(0, self._of(tokens_N), grads)[:-1]
        self._grads[part] = found * self._factor if part == "query" else found

    def add_attention(self, queries: Tensor, others: Tensor, read_N: Tensor | None) -> None:
        """To queries of the tokens read_N, first in `queries`, and values of all, last in `others`."""
        self.add("query", queries[:, : self._hidden], read_N)
        self.add("value", others[:, -self._hidden :], None)

    def learn_attention(self, queries: Tensor, others: Tensor, read_N: Tensor | None) -> None:
        """The same for their gradients."""
        self.learn("query", queries[:, : self._hidden], read_N)
        self.learn("value", others[:, -self._hidden :], None)

    def gradients(self) -> list[Tensor]:
        """Of the values of each shift, when all parts have learned."""
        return list(torch.cat([self._grads[part] for part in PARTS], 1).unbind())

    def _of(self, tokens_N: Tensor | None) -> Tensor:
        assert self.of_P is not None
        return self.of_P if tokens_N is None else self.of_P[tokens_N]


class Tail(NamedTuple):
    """All that follows attention in a layer. out, up, down: have `run` and `back`, see Affine."""

    out: Any
    norm1: Norm | NoNorm
    up: Any
    act: Activation
    down: Any
    norm2: Norm | NoNorm

    def run(
        self, context_NH: Tensor, residual_NH: Tensor, shifts: Shifts, read_N: Tensor | None
    ) -> tuple[Tensor, Any]:
        """The layer's output, and what `back` needs."""
        summed = self.out.run(context_NH, residual_NH)
        shifts.add("out", summed, read_N)
        middle, saved1 = self.norm1.run(summed)
        shifts.add("norm1", middle, read_N)
        wide = self.up.run(middle)
        shifts.add("up", wide, read_N)
        summed = self.down.run(self.act.run(wide), middle)
        shifts.add("down", summed, read_N)
        out, saved2 = self.norm2.run(summed)
        shifts.add("norm2", out, read_N)
        return out, (saved1, wide, saved2)

    def back(
        self,
        grad_NH: Tensor,
        saved: Any,
        keys_N: Tensor | None,
        shifts: Shifts,
        read_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of context and residual."""
        saved1, wide, saved2 = saved
        shifts.learn("norm2", grad_NH, read_N)
        grad_NH = self.norm2.back(grad_NH, saved2)
        shifts.learn("down", grad_NH, read_N)
        inner = self.act.back(self.down.back(grad_NH, None, keys_N), wide)
        shifts.learn("up", inner, read_N)
        grad_NH = self.up.back(inner, grad_NH, keys_at(keys_N, None, 1))
        shifts.learn("norm1", grad_NH, read_N)
        grad_NH = self.norm1.back(grad_NH, saved1)
        shifts.learn("out", grad_NH, read_N)
        return self.out.back(grad_NH, None, keys_at(keys_N, None, 2)), grad_NH


class Shifted:
    """A FrozenLayer with other biases for some tokens, for one way forward and back.

    layer: one that norms after each part; it has a method `shifts`, and its `run` and `back` take them.
    """

    def __init__(self, layer: Any, shifts: Sequence[Shift], num_tokens: int) -> None:
        self.layer = layer
        self.shifts: Shifts = layer.shifts(shifts, num_tokens)

    def run(self, *how: Any) -> Any:
        """See FrozenLayer."""
        return self.layer.run(*how, self.shifts)

    def back(self, *how: Any) -> Tensor:
        """See FrozenLayer."""
        return self.layer.back(*how, self.shifts)
