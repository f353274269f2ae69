"""One pass through frozen layers, forward and back, as a function of what is added between them.

Shape letters: P packed tokens, N states that are read, R tokens that a vector is added to, H hidden.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pastina.engine.addition import Addition
from pastina.engine.frozen import FrozenLayer, Saved
from pastina.engine.packing import Pack
from pastina.engine.passing import can_pass, pass_through
from pastina.engine.readout import Readout


class Sweep:
    """One forward through the layers and, if `first` is a layer, what its backward needs.

    start: the layer whose input is given, the ones below are done already.
    """

    def __init__(
        self, layers: Sequence[FrozenLayer], packed: Pack, readout: Readout, start: int = 0
    ) -> None:
        self.layers, self.packed, self.readout, self.start = layers, packed, readout, start
        self.saved: list[Saved | None] = []
        self.scaled: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # where, what, by what

    def forward(
        self, hidden_PH: Tensor, additions: Mapping[int, Addition], first: int | None
    ) -> Tensor:
        """The last states that are read; writes over hidden_PH."""
        layers = self.layers[self.start :]
        if first is None and can_pass(layers, self.packed):
            own = {index - self.start: addition for index, addition in additions.items()}
            return pass_through(layers, self.packed, self.readout, hidden_PH, own)
        for index in range(self.start, len(self.layers)):
            keep = first is not None and index >= first
            if index in additions:
                tokens_R, delta_RH, scale_RH = additions[index]
                if scale_RH is not None:
                    own_RH = hidden_PH[tokens_R]
                    delta_RH = torch.addcmul(delta_RH, own_RH, scale_RH)
                    if keep:
                        self.scaled[index] = (tokens_R, own_RH, scale_RH)
                hidden_PH.index_add_(0, tokens_R, delta_RH)
            hidden_PH, saved = self.layers[index].run(
                hidden_PH, self.packed, *self._read(index), keep
            )
            self.saved.append(saved)
        return hidden_PH

    def backward(
        self, grad: Tensor, tokens: Mapping[int, Tensor]
    ) -> dict[int, tuple[Tensor, Tensor | None]]:
        """Gradients of what was added to `tokens` and of its scale, by layer; forgets what was kept."""
        if not self.saved:
            raise RuntimeError("The packed engine can go backward once. Call logits() again.")
        first, grads = min(tokens), {}
        for index in range(len(self.layers) - 1, first - 1, -1):
            saved = self.saved.pop()
            assert saved is not None
            only_R = tokens[index] if index == first else None
            grad = self.layers[index].back(grad, saved, self.packed, *self._read(index), only_R)
            if index in tokens:
                grad_RH = grad if only_R is not None else grad[tokens[index]]
                own_RH = self.scaled[index][1] if index in self.scaled else None
                grads[index] = grad_RH, None if own_RH is None else grad_RH * own_RH
            if index in self.scaled and only_R is None:
                tokens_R, _, scale_RH = self.scaled[index]
                grad = grad.index_add(0, tokens_R, grad[tokens_R] * scale_RH)
        self.saved.clear()
        self.scaled.clear()
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
        tokens: dict[int, Tensor],
        *numbers: Tensor | None,  # of each layer the deltas and the scales, which may be None
    ) -> Tensor:
        needs = ctx.needs_input_grad[3:]
        learns = dict(zip(tokens, map(any, zip(needs[::2], needs[1::2], strict=True)), strict=True))
        ctx.sweep = sweep
        ctx.tokens = {index: tokens_R for index, tokens_R in tokens.items() if learns[index]}
        ctx.indexes = list(tokens)
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        additions = {
            i: Addition(tokens[i], delta_RH, scale_RH)
            for i, (delta_RH, scale_RH) in zip(tokens, pairs, strict=True)
            if delta_RH is not None
        }
        return sweep.forward(hidden_PH, additions, min(ctx.tokens))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> Any:
        found = ctx.sweep.backward(grads[0].contiguous(), ctx.tokens)
        pairs = [found.get(index, (None, None)) for index in ctx.indexes]
        return None, None, None, *(grad for pair in pairs for grad in pair)


def encode(sweep: Sweep, hidden_PH: Tensor, additions: Mapping[int, Addition]) -> Tensor:
    """The states that are read, (N, H); gradients pass to the vectors that learn. Uses up hidden_PH."""
    numbers = [n for a in additions.values() for n in (a.delta_RH, a.scale_RH)]
    learns = any(n is not None and n.requires_grad for n in numbers)
    if learns and torch.is_grad_enabled():
        tokens = {index: addition.tokens_R for index, addition in additions.items()}
        states = _Encode.apply(sweep, hidden_PH, tokens, *numbers)
        assert isinstance(states, Tensor)
        return states
    with torch.no_grad():
        return sweep.forward(hidden_PH, additions, None)
