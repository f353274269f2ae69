"""What is added to the input of a layer, and to its biases.

Shape letters: R tokens that a vector is added to, N tokens that get a product, K its rank, or whose
biases are others, H hidden, D biases of a layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Product(NamedTuple):
    """What one layer adds to some tokens of its input h: h @ down @ up."""

    tokens_N: Tensor
    down_HK: Tensor
    up_KH: Tensor


class Shift(NamedTuple):
    """What is added to the biases inside of one layer for some tokens, in the order of `bias_parts`."""

    tokens_N: Tensor
    values_D: Tensor


class Addition(NamedTuple):
    """What one layer adds to its input: delta + scale * input; a token may be named twice. Products are
    those of the input before anything is added. shifts: of its biases."""

    tokens_R: Tensor
    delta_RH: Tensor
    scale_RH: Tensor | None = None
    products: tuple[Product, ...] = ()
    shifts: tuple[Shift, ...] = ()

    @property
    def numbers(self) -> list[Tensor | None]:
        """What may learn: vectors, scales, then the two factors of each product, then the shifts."""
        factors = [factor for product in self.products for factor in product[1:]]
        return [self.delta_RH, self.scale_RH, *factors, *(s.values_D for s in self.shifts)]

    def with_numbers(self, numbers: Sequence[Tensor | None]) -> "Addition":
        """The same with other `numbers`."""
        delta_RH, scale_RH, *rest = numbers
        assert delta_RH is not None
        count = 2 * len(self.products)
        factors, values = rest[:count], rest[count:]
        pairs = zip(self.products, factors[::2], factors[1::2], strict=True)
        products = tuple(Product(p.tokens_N, down, up) for p, down, up in pairs)  # type: ignore[arg-type]
        shifts = tuple(Shift(s.tokens_N, v) for s, v in zip(self.shifts, values, strict=True))  # type: ignore[arg-type]
        return Addition(self.tokens_R, delta_RH, scale_RH, products, shifts)


def joined(additions: Sequence[Addition]) -> Addition:
    """Additions to different tokens as one."""
    if len(additions) == 1:
        return additions[0]
    scales_RH = None
    if any(a.scale_RH is not None for a in additions):
        scales_RH = torch.cat(
            [torch.zeros_like(a.delta_RH) if a.scale_RH is None else a.scale_RH for a in additions]
        )
    tokens_R = torch.cat([addition.tokens_R for addition in additions])
    delta_RH = torch.cat([addition.delta_RH for addition in additions])
    products = tuple(product for addition in additions for product in addition.products)
    shifts = tuple(shift for addition in additions for shift in addition.shifts)
    return Addition(tokens_R, delta_RH, scales_RH, products, shifts)
