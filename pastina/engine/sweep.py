"""One pass through frozen layers, forward and back, as a function of what is added between them.

Shape letters: P packed tokens, R tokens that a vector is added to, H hidden; N states that are read, or
tokens that get a product, and K its rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pastina.engine.addition import Addition, Product
from pastina.engine.frozen import FrozenLayer, Saved
from pastina.engine.packing import Pack
from pastina.engine.passing import can_pass, pass_through
from pastina.engine.readout import Readout
from pastina.engine.rounding import LAYER, keys_at
from pastina.engine.shifting import Shifted


class Sweep:
    """One forward through the layers and, if `first` is a layer, what its backward needs.

    start: the layer whose input is given, the ones below are done already.
    keys_P: of each token, by which int8 gradients are rounded at random; None: to the nearest.
    """

    def __init__(
        self,
        layers: Sequence[FrozenLayer],
        packed: Pack,
        readout: Readout,
        start: int = 0,
        keys_P: Tensor | None = None,
    ) -> None:
        self.layers, self.packed, self.readout, self.start = layers, packed, readout, start
        self.keys_P = keys_P
        self.saved: list[Saved | None] = []
        self.scaled: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # where, what, by what
        self.multiplied: dict[int, list[tuple[Product, Tensor, Tensor]]] = {}  # what, what of it
        self.shifted: dict[int, Shifted] = {}

    def forward(
        self, hidden_PH: Tensor, additions: Mapping[int, Addition], first: int | None
    ) -> Tensor:
        """The last states that are read; writes over hidden_PH."""
        layers = self.layers[self.start :]
        is_plain = not any(addition.products or addition.shifts for addition in additions.values())
        if first is None and is_plain and can_pass(layers, self.packed):
            own = {index - self.start: addition for index, addition in additions.items()}
            return pass_through(layers, self.packed, self.readout, hidden_PH, own)
        for index in range(self.start, len(self.layers)):
            keep = first is not None and index >= first
            layer = self.layers[index]
            if index in additions:
                tokens_R, delta_RH, scale_RH, products, shifts = additions[index]
                factors = [(p, own := hidden_PH[p.tokens_N], own @ p.down_HK) for p in products]
                if keep and products:
                    self.multiplied[index] = factors
                if scale_RH is not None:
                    own_RH = hidden_PH[tokens_R]
                    delta_RH = torch.addcmul(delta_RH, own_RH, scale_RH)
                    if keep:
                        self.scaled[index] = (tokens_R, own_RH, scale_RH)
                hidden_PH.index_add_(0, tokens_R, delta_RH)
                for product, _, inner_NK in factors:
                    hidden_PH.index_add_(0, product.tokens_N, inner_NK @ product.up_KH)
                if shifts:
                    layer = Shifted(layer, shifts, len(hidden_PH))
                    if keep:
                        self.shifted[index] = layer
            hidden_PH, saved = layer.run(hidden_PH, self.packed, *self._read(index), keep)
            self.saved.append(saved)
        return hidden_PH

    def backward(
        self, grad: Tensor, tokens: Mapping[int, Tensor]
    ) -> dict[int, list[Tensor | None]]:
        """Gradients of an addition's `numbers`, by layer; forgets what was kept.

        tokens: those of the vectors, by layer that learns.
        """
        if not self.saved:
            raise RuntimeError("The packed engine can go backward once. Call logits() again.")
        first, grads = min(tokens), {}
        for index in range(len(self.layers) - 1, first - 1, -1):
            saved = self.saved.pop()
            assert saved is not None
            multiplied = self.multiplied.get(index, ())
            only_R = tokens[index] if index == first and not multiplied else None
            keys_P = keys_at(self.keys_P, None, index * LAYER)
            how = (*self._read(index), only_R, keys_P)
            shifted = self.shifted.pop(index, None)
            layer = self.layers[index] if shifted is None else shifted
            grad = layer.back(grad, saved, self.packed, *how)
            if index in tokens:
                grad_RH = grad if only_R is not None else grad[tokens[index]]
                own_RH = self.scaled[index][1] if index in self.scaled else None
                grads[index] = [grad_RH, None if own_RH is None else grad_RH * own_RH]
            passed: list[tuple[Tensor, Tensor]] = []  # to what scale and products were made of
            if index in self.scaled and only_R is None:
                tokens_R, _, scale_RH = self.scaled[index]
                passed.append((tokens_R, grad[tokens_R] * scale_RH))
            for (tokens_N, down_HK, up_KH), own_NH, inner_NK in multiplied:
                grad_NH = grad[tokens_N]
                grad_NK = grad_NH @ up_KH.T
                if index in tokens:
                    grads[index] += [own_NH.T @ grad_NK, inner_NK.T @ grad_NH]
                passed.append((tokens_N, grad_NK @ down_HK.T))
            if shifted is not None and index in tokens:
                grads[index] += shifted.shifts.gradients()
            if passed and index > first:
                grad = grad.clone()
                for tokens_N, more_NH in passed:
                    grad.index_add_(0, tokens_N, more_NH)
        self.saved.clear()
        self.scaled.clear()
        self.multiplied.clear()
        return grads

    def _read(self, index: int) -> tuple[Tensor | None, bool]:
        is_last = index == len(self.layers) - 1
        return (self.readout.read_N, self.readout.one_each) if is_last else (None, False)


class _Encode(torch.autograd.Function):
    """A Sweep for autograd: a function of the added vectors alone."""

    @staticmethod
    def forward(
        ctx: Any,
        sweep: Sweep,
        hidden_PH: Tensor,
        additions: dict[int, Addition],
        *numbers: Tensor | None,  # those of each addition
    ) -> Tensor:
        needs = ctx.needs_input_grad[3:]
        ctx.sweep, ctx.counts, ctx.tokens = sweep, {}, {}
        plain: dict[int, Addition] = {}
        start = 0
        for index, addition in additions.items():
            count = ctx.counts[index] = len(addition.numbers)
            own = slice(start, start + count)
            plain[index] = addition.with_numbers(numbers[own])
            if any(needs[own]):
                ctx.tokens[index] = addition.tokens_R
            start += count
        return sweep.forward(hidden_PH, plain, min(ctx.tokens))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> Any:
        found = ctx.sweep.backward(grads[0].contiguous(), ctx.tokens)
        own = [found.get(index) or [None] * count for index, count in ctx.counts.items()]
        return None, None, None, *(grad for grads in own for grad in grads)


def encode(sweep: Sweep, hidden_PH: Tensor, additions: Mapping[int, Addition]) -> Tensor:
    """The states that are read, (N, H); gradients pass to the vectors that learn. Uses up hidden_PH."""
    numbers = [number for addition in additions.values() for number in addition.numbers]
    learns = any(n is not None and n.requires_grad for n in numbers)
    if learns and torch.is_grad_enabled():
        states = _Encode.apply(sweep, hidden_PH, dict(additions), *numbers)
        assert isinstance(states, Tensor)
        return states
    with torch.no_grad():
        return sweep.forward(hidden_PH, additions, None)
