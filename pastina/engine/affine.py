"""Frozen linear layers: fp32, bf16 or int8 products, forward and for the gradient of the input.

Every row is worked out by itself: what a row gives never depends on its neighbours in the batch.

Shape letters: M rows, K inputs, N outputs.
"""

from functools import cache
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pastina.engine.native import can_multiply, processor
from pastina.engine.once import once
from pastina.errors import RecipeError

Precision = Literal["fp32", "bf16", "int8"]

BLOCK = 4096  # rows that are worked on at a time
_ROUND = (
    32  # rows are filled up to a multiple, and to one of 16 sizes between two powers of two: few
)
# shapes, as each costs oneDNN a plan
_INT8_BLOCK = 512  # rows that are scaled and rounded while they are in the caches
_INT8_MAX = 127.0
_int_mm: Any = torch.ops.aten._int_mm
_NOISE = (
    1 << 17
)  # random numbers for rounding, drawn once; a row reads them from a place of its own
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # spreads keys over places

_onednn: Any = getattr(torch.ops, "mkldnn", None) if torch.backends.mkldnn.is_available() else None


class Affine(Protocol):
    """A frozen linear layer. `dtype`: of its products; it takes fp32 as well."""

    dtype: torch.dtype
    weight: Tensor

    def run(self, x_MK: Tensor, plus_MN: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias in `dtype`; with `plus`: that + plus, in fp32."""
        ...

    def back(
        self, grad_MN: Tensor, plus_MK: Tensor | None = None, keys_M: Tensor | None = None
    ) -> Tensor:
        """The gradient of the input in `dtype`; with `plus`: that + plus, in fp32.

        keys_M: by which int8 is rounded at random, see rounding.py; None: to the nearest.
        """
        ...


def choose_precision(wanted: Precision | Literal["auto"], device: torch.device | str) -> Precision:
    """What products are computed in; auto: bf16 where the device is fast in it, else fp32.

    A CPU is where it has AMX, or AVX-512's products of bf16 and the kernels for them (native.py).

    What that changes in accuracy was measured: docs/engine.md.

    Raises:
        RecipeError: int8 on a device that is no CPU.
    """
    device = torch.device(device)
    if wanted == "int8" and device.type != "cpu":
        raise RecipeError(f"int8 products run on a CPU, not on {device.type}. Take bf16 there.")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    is_fast = device.type == "cpu" and (processor().get("amx_bf16") or can_multiply("bf16"))
    return "bf16" if is_fast else "fp32"


def make_affine(weight: Tensor, bias: Tensor | None, precision: Precision) -> Affine:
    """The linear layer of an fp32 weight (N, K) and bias (N)."""
    if precision == "int8":
        return Int8Affine(weight, bias)
    return FloatAffine(weight, bias, torch.bfloat16 if precision == "bf16" else torch.float32)


class FloatAffine:
    """Products in fp32 or bf16.

    On a CPU a bf16 weight, and where the processor is not Intel's an fp32 one, is kept in the order of
    memory that oneDNN likes: once for the way forward and, when it is trained through, once for back.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        self.bias = None if bias is None else bias.to(dtype)

    def run(self, x_MK: Tensor, plus_MN: Tensor | None = None) -> Tensor:
        return _product(x_MK, self._ahead, self.bias, plus_MN)

    def back(
        self, grad_MN: Tensor, plus_MK: Tensor | None = None, keys_M: Tensor | None = None
    ) -> Tensor:
        return _product(grad_MN, self._back, None, plus_MK)

    @once
    def _ahead(self) -> Tensor:
        return _reordered(self.weight.to(self.dtype))

    @once
    def _back(self) -> Tensor:
        ahead = self._ahead
        return _reordered(self.weight.t().to(self.dtype)) if ahead.is_mkldnn else ahead.t()


def _reordered(weight: Tensor) -> Tensor:
    if weight.device.type != "cpu" or _onednn is None:
        return weight
    if weight.dtype == torch.float32 and _likes_mkl():
        return weight
    return _onednn._reorder_linear_weight(weight.contiguous(), None)


@cache
def _likes_mkl() -> bool:
    """MKL is as fast as oneDNN on Intel's processors and plans nothing anew for each new shape."""
    return torch.backends.mkl.is_available() and "Intel" in str(
        processor().get("cpu_name", "Intel")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None) -> Tensor:
    if weight.is_mkldnn:
        if len(x) <= BLOCK:
            return _block(x, weight, bias, plus)
        pluses = [None] * len(x) if plus is None else plus.split(BLOCK)
        return torch.cat(
            [_block(x, weight, bias, p) for x, p in zip(x.split(BLOCK), pluses, strict=False)]
        )
    x = x.to(weight.dtype)
    if plus is None:
        return F.linear(x, weight, bias)
    if x.dtype != plus.dtype:
        return plus + F.linear(x, weight, bias)
    out = torch.addmm(plus, x, weight.t())
    return out if bias is None else out.add_(bias)


def _block(x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None) -> Tensor:
    num_rows, dtype = len(x), weight.dtype
    x = _filled(x, dtype)
    if plus is None or dtype != plus.dtype:
        out = _onednn._linear_pointwise(x, weight, bias, "none", [], "")[:num_rows]
        return out if plus is None else plus + out
    out = _onednn._linear_pointwise.binary(x, _filled(plus, dtype), weight, bias, "add")
    return out[:num_rows]


def _filled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype, with rows that mean nothing up to one of the sizes that there are plans for."""
    step = max(_ROUND, 1 << len(x).bit_length() >> 5)
    if len(x) % step == 0:
        return x.to(dtype)
    filled = x.new_empty(len(x) + -len(x) % step, x.shape[1], dtype=dtype)
    filled[: len(x)] = x
    filled[len(x) :] = 0
    return filled


# ---------------------------------------------------------------------------------------------------
# int8


class Int8Affine:
    """Products of whole numbers from -127 to 127: one scale per row and one per output of the weight.

    Forward the nearest number is taken; the gradient is rounded up or down at random, so that small
    ones survive on average (with the nearest one, hard tasks learn nothing).
    """

    dtype = torch.float32

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def run(self, x_MK: Tensor, plus_MN: Tensor | None = None) -> Tensor:
        return _in_blocks(x_MK, self._ahead, self.bias, plus_MN, None)

    def back(
        self, grad_MN: Tensor, plus_MK: Tensor | None = None, keys_M: Tensor | None = None
    ) -> Tensor:
        return _in_blocks(grad_MN, self._back, None, plus_MK, keys_M)

    @once
    def _ahead(self) -> tuple[Tensor, Tensor]:
        return whole_weight(self.weight)

    @once
    def _back(self) -> tuple[Tensor, Tensor]:
        return whole_weight(self.weight.t())


def whole_weight(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) in int8 and the scale of each output (N)."""
    scale_N1 = _scale(weight_NK)
    return (weight_NK / scale_N1).round_().to(torch.int8).contiguous(), scale_N1.squeeze(1)


def _scale(x_MK: Tensor) -> Tensor:
    largest = torch.maximum(x_MK.amax(1, keepdim=True), x_MK.amin(1, keepdim=True).neg_())
    return largest.clamp_(min=1e-30).div_(_INT8_MAX)


def _in_blocks(
    x: Tensor,
    weight: tuple[Tensor, Tensor],
    bias: Tensor | None,
    plus: Tensor | None,
    keys_M: Tensor | None,
) -> Tensor:
    whole_NK, scale_N = weight
    out = x.new_empty(len(x), len(whole_NK))
    for start in range(0, len(x), _INT8_BLOCK):
        block, target = x[start : start + _INT8_BLOCK], out[start : start + _INT8_BLOCK]
        scale_M1 = _scale(block)
        scaled = block / scale_M1
        if keys_M is None:
            scaled.round_()
        else:
            scaled.add_(_noise(keys_M[start : start + _INT8_BLOCK], scaled)).floor_()
        product = _int_mm(_filled(scaled, torch.int8), whole_NK.t())[: len(block)]
        torch.mul(product, scale_N, out=target)
        target.mul_(scale_M1)
        if bias is not None:
            target.add_(bias)
        if plus is not None:
            target.add_(plus[start : start + _INT8_BLOCK])
    return out


def _noise(keys_M: Tensor, like_MK: Tensor) -> Tensor:
    """Numbers from 0 to 1 for each place, read from a place of the pool that the row's key says."""
    pool, width = _pool(like_MK.device), like_MK.shape[1]
    mixed_M = (keys_M.to(like_MK.device) * _MIX) >> 24
    return pool.unfold(0, width, 1)[mixed_M.remainder(len(pool) - width)]


@cache
def _pool(device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.rand(_NOISE, generator=generator, device=device)
