"""One pass through frozen layers, forward and back, as a function of the vectors that are added.

Shape letters: P packed tokens, N states that are read, R tokens that a vector is added to, H hidden.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pastina.engine.frozen import FrozenLayer, Saved
from pastina.engine.packing import Pack
from pastina.engine.readout import Readout


class Addition(NamedTuple):
    """Vectors that one layer adds to its input."""

    tokens_R: Tensor
    delta_RH: Tensor


class Sweep:
    """One forward through the layers and, if `first` is a layer, what its backward needs.

    start: the layer whose input is given, the ones below are done already.
    """

    def __init__(
        self, layers: Sequence[FrozenLayer], packed: Pack, readout: Readout, start: int = 0
    ) -> None:
        self.layers, self.packed, self.readout, self.start = layers, packed, readout, start
        self.saved: list[Saved | None] = []

    def forward(
        self, hidden_PH: Tensor, additions: Mapping[int, Addition], first: int | None
    ) -> Tensor:
        """The last states that are read; writes over hidden_PH."""
        for index in range(self.start, len(self.layers)):
            if index in additions:
                hidden_PH.index_add_(0, *additions[index])
            keep = first is not None and index >= first
            hidden_PH, saved = self.layers[index].run(
                hidden_PH, self.packed, *self._read(index), keep
            )
            self.saved.append(saved)
        return hidden_PH

    def backward(self, grad: Tensor, tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The gradient of what was added to `tokens`, by layer; forgets what was kept."""
        if not self.saved:
            raise RuntimeError("The packed engine can go backward once. Call logits() again.")
        first, grads = min(tokens), {}
        for index in range(len(self.layers) - 1, first - 1, -1):
            saved = self.saved.pop()
            assert saved is not None
            only_R = tokens[index] if index == first else None
            grad = self.layers[index].back(grad, saved, self.packed, *self._read(index), only_R)
            if index in tokens:
                grads[index] = grad if only_R is not None else grad[tokens[index]]
        self.saved.clear()
        return grads

    def _read(self, index: int) -> tuple[Tensor | None, bool]:
        is_last = index == len(self.layers) - 1
        return (self.readout.read_N, self.readout.one_each) if is_last else (None, False)


class _Encode(torch.autograd.Function):
    """A Sweep for autograd: a function of the added vectors alone."""

    @staticmethod
    def forward(
        ctx: Any, sweep: Sweep, hidden_PH: Tensor, tokens: dict[int, Tensor], *deltas: Tensor
    ) -> Tensor:
        learns = dict(zip(tokens, ctx.needs_input_grad[3:], strict=True))
        ctx.sweep = sweep
        ctx.tokens = {index: tokens_R for index, tokens_R in tokens.items() if learns[index]}
        ctx.indexes = list(tokens)
        additions = {i: Addition(*a) for i, *a in zip(tokens, tokens.values(), deltas, strict=True)}
        return sweep.forward(hidden_PH, additions, min(ctx.tokens))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> Any:
        found = ctx.sweep.backward(grads[0].contiguous(), ctx.tokens)
        return None, None, None, *(found.get(index) for index in ctx.indexes)


def encode(sweep: Sweep, hidden_PH: Tensor, additions: Mapping[int, Addition]) -> Tensor:
    """The states that are read, (N, H); gradients pass to the vectors that learn. Uses up hidden_PH."""
    learns = any(addition.delta_RH.requires_grad for addition in additions.values())
    if learns and torch.is_grad_enabled():
        tokens = {index: addition.tokens_R for index, addition in additions.items()}
        deltas = [addition.delta_RH for addition in additions.values()]
        states = _Encode.apply(sweep, hidden_PH, tokens, *deltas)
        assert isinstance(states, Tensor)
        return states
    with torch.no_grad():
        return sweep.forward(hidden_PH, additions, None)
