"""What frozen transformer layers are made of; weights never get a gradient.

Shape letters: P packed tokens, N states that are read, R tokens that a vector is added to, H hidden,
I intermediate.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pastina.engine.affine import BLOCK, Affine
from pastina.engine.packing import Pack
from pastina.engine.rounding import keys_at

_aten = torch.ops.aten


class Saved(NamedTuple):
    """What the backward of a layer needs. norm: of a norm before attention; rows: see `run_rows`."""

    heads: Sequence[Any]  # the layer's own
    rows: list["Rows"]
    norm: "SavedNorm" = ()


class FrozenLayer(Protocol):
    """A layer on packed tokens: the tokens of all rows one after the other, without padding."""

    def run(
        self, hidden_PH: Tensor, packed: Pack, read_N: Tensor | None, one_each: bool, keep: bool
    ) -> tuple[Tensor, Saved | None]:
        """The layer's output at read_N (None: everywhere), and what the backward needs if `keep`.

        one_each: read_N is the first token of each row; then there is one query per row.
        """
        ...

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
        """The gradient of the input: (P, H), or (R, H) at the tokens only_R.

        keys_P: of each token, by which int8 gradients are rounded at random; None: to the nearest.
        """
        ...


# ---------------------------------------------------------------------------------------------------
# Activations


class Activation(NamedTuple):
    """An activation and the gradient of its input, given the output's, which it uses up."""

    run: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda x: F.gelu(x, approximate=approximate),
        lambda grad, x: _aten.gelu_backward.grad_input(
            grad, x, approximate=approximate, grad_input=grad
        ),
    )


ACTIVATIONS: dict[str, Activation] = {
    "gelu": _gelu("none"),
    "gelu_new": _gelu("tanh"),
    "gelu_pytorch_tanh": _gelu("tanh"),
    "relu": Activation(F.relu, lambda grad, x: grad.masked_fill_(x <= 0, 0.0)),
}


def gated(act: Activation) -> Activation:
    """act(first half) * second half."""

    def run(x: Tensor) -> Tensor:
        first, gate = x.chunk(2, -1)
        return act.run(first).mul_(gate)

    def back(grad: Tensor, x: Tensor) -> Tensor:
        first, gate = x.chunk(2, -1)
        return torch.cat([act.back(grad * gate, first), act.run(first).mul_(grad)], -1)

    return Activation(run, back)


# ---------------------------------------------------------------------------------------------------
# Norms

SavedNorm = tuple[Tensor, ...]  # the input, its mean and inverse deviation


class Norm(NamedTuple):
    """A frozen LayerNorm."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def run(self, x: Tensor) -> tuple[Tensor, SavedNorm]:
        """Output, and what `back` needs."""
        out, mean, rstd = torch.native_layer_norm(
            x, self.weight.shape, self.weight, self.bias, self.eps
        )
        return out, (x, mean, rstd)

    def back(self, grad: Tensor, saved: Sequence[Tensor]) -> Tensor:
        """The gradient of the input."""
        x, mean, rstd = saved
        wants = [True, False, False]
        return _aten.native_layer_norm_backward(
            grad.to(x.dtype), x, self.weight.shape, mean, rstd, self.weight, self.bias, wants
        )[0]


class NoNorm(NamedTuple):
    """Where a layer has no norm."""

    def run(self, x: Tensor) -> tuple[Tensor, SavedNorm]:
        return x, ()

    def back(self, grad: Tensor, saved: Sequence[Tensor]) -> Tensor:
        return grad


# ---------------------------------------------------------------------------------------------------
# What works on each token alone: some rows at a time, so that what is wide stays in the caches


class FeedForward(NamedTuple):
    """down(act(up(x)))."""

    up: Affine
    act: Activation
    down: Affine

    def run(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """residual + the output, and what `back` needs."""
        wide = self.up.run(x)
        return self.down.run(self.act.run(wide), residual), wide

    def back(
        self,
        grad: Tensor,
        wide: Tensor,
        plus: Tensor | None = None,
        keys_M: Tensor | None = None,
    ) -> Tensor:
        """The gradient of the input; with `plus`: that + plus."""
        inner = self.act.back(self.down.back(grad, None, keys_M), wide)
        return self.up.back(inner, plus, keys_at(keys_M, None, 1))


Rows = tuple[Any, ...]  # what the backward of some rows needs


def run_rows(
    run: Callable[[Tensor, Tensor], tuple[Tensor, Rows]], a_NH: Tensor, b_NH: Tensor, keep: bool
) -> tuple[Tensor, list[Rows]]:
    """What `run` makes of two tensors in fp32, BLOCK rows at a time, and what it kept if `keep`."""
    out, kept = a_NH.new_empty(a_NH.shape, dtype=torch.float32), []
    for a, b, place in zip(a_NH.split(BLOCK), b_NH.split(BLOCK), out.split(BLOCK), strict=True):
        made, saved = run(a, b)
        place.copy_(made)
        if keep:
            kept.append(saved)
    return out, kept


def back_rows(
    back: Callable[[Tensor, Rows, Tensor | None], tuple[Tensor, Tensor]],
    grad_NH: Tensor,
    kept: list[Rows],
    keys_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the two tensors that `run_rows` was given."""
    keys = [None] * len(kept) if keys_N is None else keys_N.split(BLOCK)
    blocks = zip(grad_NH.split(BLOCK), kept, keys, strict=True)
    pairs = [back(*block) for block in blocks]
    first, second = zip(*pairs, strict=True)
    return torch.cat(first), torch.cat(second)
