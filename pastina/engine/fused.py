"""Frozen layers that norm after each part, by the kernels in the folder kernels: on a CPU with AVX-512.

Several products of a layer, its norms and its activation are one pass over blocks of tokens that stay in
the caches; attention reads queries, keys and values where they lie. What a token gives never depends on
the others of its block.

Shape letters: P packed tokens, B rows, N states that are read, R tokens that a vector is added to,
M rows of a product, K inputs, N outputs, H hidden, I intermediate.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pastina.engine import native
from pastina.engine.addition import Shift
from pastina.engine.affine import Precision, whole_weight
from pastina.engine.attention import spread
from pastina.engine.frozen import ACTIVATIONS, Norm, Saved
from pastina.engine.once import once
from pastina.engine.packing import Pack
from pastina.engine.pool import Pool
from pastina.engine.rounding import keys_at
from pastina.engine.shifting import Shifts, Tail

_KINDS = {"fp32": 0, "bf16": 1, "int8": 2, "fp32 in parts": 3}
ACTS = {"gelu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "relu": 2}
_GROUPS = {"fp32": 1, "bf16": 2, "int8": 4}  # inputs in four bytes
_PANEL = 64


def can_fuse(precision: Precision, device: torch.device, activation: str) -> bool:
    """Whether layers can be made of the kernels: asked before FusedLayer is."""
    if device.type != "cpu" or activation not in ACTS:
        return False
    return native.can_multiply(precision)


def kind_of(precision: Precision) -> str:
    """How the kernels multiply in this precision on this machine.

    With AMX fp32 is three bf16, whose sum it is: six of their nine products are faster than fp32's one,
    and what is left out is smaller than what fp32 rounds off. The idea: Henry, Tang and Heinecke,
    Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations (2019).
    """
    return "fp32 in parts" if precision == "fp32" and native.has_tiles() else precision


class Product:
    """A frozen linear layer as the kernels want it. Keeps what their pointers point to."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, precision: Precision) -> None:
        outputs, inputs = weight_NK.shape
        self._kind = kind_of(precision)
        scale = shift = None
        if self._kind == "fp32 in parts":
            panels = _panels_of_parts(weight_NK)
        else:
            if precision == "int8":
                weight_NK, scale = whole_weight(weight_NK)
                shift = weight_NK.sum(1, dtype=torch.int32) * 128
            elif precision == "bf16":
                weight_NK = weight_NK.bfloat16()
            group = _GROUPS[precision]
            line = group if precision == "fp32" else 16 * group  # as tiles read them
            filled = _filled(weight_NK, line).view(-(-outputs // _PANEL), _PANEL, -1, group)
            panels = filled.transpose(1, 2).contiguous()
        self._kept = (panels, scale, shift, None if bias_N is None else bias_N.contiguous())
        self.about = native.Weight(inputs, outputs, *map(_pointer, self._kept))
        self.shape = (outputs, inputs)

    def run(
        self,
        x_MK: Tensor,
        plus_MN: Tensor | None = None,
        *,
        keys_M: Tensor | None = None,
        pool: Pool | None = None,
    ) -> Tensor:
        """x @ weight.T + bias (+ plus) in fp32.

        keys_M: int8 is rounded at random, see rounding.py; None: to the nearest. pool: lends what
        comes back.
        """
        x_MK = x_MK.float()
        if x_MK.stride(1) != 1:
            x_MK = x_MK.contiguous()
        shape = len(x_MK), self.shape[0]
        out_MN = x_MK.new_empty(shape) if pool is None else pool.take(*shape)
        if plus_MN is not None:
            plus_MN = _plain(plus_MN)
        _library().pastina_affine(
            _KINDS[self._kind],
            ctypes.byref(self.about),
            *(_pointer(x_MK), x_MK.stride(0), len(x_MK), _pointer(plus_MN), _pointer(out_MN)),
            *(_pointer(keys_M), torch.get_num_threads()),
        )
        return out_MN


@dataclass(frozen=True)
class Linear:
    """A frozen linear layer for both ways; each is made when it is first needed."""

    weight_NK: Tensor
    bias_N: Tensor | None
    precision: Precision

    @once
    def ahead(self) -> Product:
        """x @ weight.T + bias."""
        return Product(self.weight_NK, self.bias_N, self.precision)

    @once
    def back(self) -> Product:
        """grad @ weight."""
        return Product(self.weight_NK.t(), None, self.precision)


class _Steps(NamedTuple):
    """A linear layer as a Tail wants it."""

    linear: Linear

    def run(self, x_MK: Tensor, plus_MN: Tensor | None = None) -> Tensor:
        return self.linear.ahead.run(x_MK, plus_MN)

    def back(self, grad_MN: Tensor, plus_MK: Tensor | None, keys_M: Tensor | None) -> Tensor:
        return self.linear.back.run(grad_MN, plus_MK, keys_M=keys_M)


class Seen(NamedTuple):
    """What the backward of a layer's attention needs; q: None where it is in the rest."""

    q_BH: Tensor | None
    qkv_P: Tensor
    log_sum: Tensor | None


class Rows(NamedTuple):
    """What the backward of a layer's other part needs."""

    unit1_NH: Tensor
    unit2_NH: Tensor
    inverse_2N: Tensor
    slope_NI: Tensor


class FusedLayer:
    """norm1(x + attention(x)), then norm2(x + ffn(x)); see FrozenLayer. The scale is in the queries."""

    def __init__(
        self,
        qkv: Linear,
        out: Linear,
        up: Linear,
        down: Linear,
        norms: tuple[Norm, Norm],
        activation: str,
        head_size: int,
        pool: Pool,
    ) -> None:
        self.qkv, self.out, self.up, self.down = qkv, out, up, down
        self.hidden, self.head_size = out.weight_NK.shape[0], head_size
        self.num_heads = self.hidden // head_size
        self.precision: Precision = qkv.precision
        self._norms, self._pool = norms, pool
        self._act, self._activation = ACTS[activation], activation

        def part(which: slice) -> Linear:
            bias = None if qkv.bias_N is None else qkv.bias_N[which]
            return Linear(qkv.weight_NK[which], bias, qkv.precision)

        self.query, self.key_value = part(slice(self.hidden)), part(slice(self.hidden, None))

    def shifts(self, shifts: Sequence[Shift], num_tokens: int) -> Shifts:
        """What `run` and `back` need where tokens have other biases."""
        inner = len(self.up.weight_NK)
        return Shifts(shifts, num_tokens, self.hidden, inner, self.head_size**-0.5)

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
        hidden_PH, pool = _plain(hidden_PH), self._pool
        residual_NH = hidden_PH if read_N is None else hidden_PH[read_N]
        q_BH = self.query.ahead.run(residual_NH, pool=pool) if one_each else None
        linear = self.key_value if one_each else self.qkv
        seen = Seen(q_BH, linear.ahead.run(hidden_PH, pool=pool), self._log_sum(q_BH, packed, keep))
        if shifts is not None:
            queries = seen.qkv_P if q_BH is None else q_BH
            shifts.add_attention(queries, seen.qkv_P, read_N if one_each else None)
        context = self._attend(seen, packed)
        is_part = read_N is not None and not one_each
        own = context[read_N] if is_part else context
        if shifts is None:
            out_NH, rows = self._rows(own, residual_NH, keep)
        else:
            out_NH, kept = self._tail.run(own, residual_NH, shifts, read_N)
            rows = kept if keep else None
        pool.give(context)
        if rows is None:
            pool.give(*seen)
            return out_NH, None
        return out_NH, Saved([seen], [rows])

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
        (seen,), (rows,) = saved.heads, saved.rows
        assert isinstance(seen, Seen)
        pool, num_tokens = self._pool, packed.num_tokens
        keys_N = keys_at(keys_P, read_N)
        if shifts is None:
            assert isinstance(rows, Rows)
            grad_context, plus_NH = self._rows_back(_plain(grad_NH), rows, keys_N)
        else:
            grad_context, plus_NH = self._tail.back(_plain(grad_NH), rows, keys_N, shifts, read_N)
            rows = ()  # nothing here is lent by the pool
        own = grad_context
        if read_N is not None and not one_each:
            own = spread(grad_context, read_N, num_tokens)
        grad_q, grad_P = self._attend_back(own, seen, packed)
        if shifts is not None:
            queries = grad_P if grad_q is None else grad_q
            shifts.learn_attention(queries, grad_P, read_N if one_each else None)
        plus_PH = plus_NH if read_N is None else spread(plus_NH, read_N, num_tokens)
        linear = self.qkv
        if grad_q is not None:
            assert read_N is not None
            plus_PH.index_add_(
                0, read_N, self.query.back.run(grad_q, keys_M=keys_at(keys_P, read_N, 3))
            )
            linear = self.key_value
        grads, plus = (grad_P, plus_PH) if only_R is None else (grad_P[only_R], plus_PH[only_R])
        if self.precision != "fp32" and linear is self.qkv:  # rounded one by one, as with one query
            queries, grads = grads[:, : self.hidden], grads[:, self.hidden :]
            plus = self.query.back.run(queries, plus, keys_M=keys_at(keys_P, only_R, 3))
            linear = self.key_value
        out = linear.back.run(grads, plus, keys_M=keys_at(keys_P, only_R, 4))
        if shifts is None:
            pool.give(grad_context, plus_NH)
        pool.give(*seen, *rows, grad_q, grad_P)
        return out

    @once
    def _tail(self) -> Tail:
        out, up, down = (_Steps(linear) for linear in (self.out, self.up, self.down))
        norm1, norm2 = self._norms
        return Tail(out, norm1, up, ACTIVATIONS[self._activation], down, norm2)

    def _log_sum(self, q_BH: Tensor | None, packed: Pack, keep: bool) -> Tensor | None:
        num_queries = packed.num_tokens if q_BH is None else len(q_BH)
        return self._pool.take(num_queries, self.num_heads) if keep else None

    def _attend(self, seen: Seen, packed: Pack) -> Tensor:
        """The context of each query; writes what `_attend_back` needs, where there is room for it."""
        num_queries = packed.num_tokens if seen.q_BH is None else len(seen.q_BH)
        context = self._pool.take(num_queries, self.hidden)
        _library().pastina_attend(
            *self._places(seen, packed),
            *(_pointer(context), _pointer(seen.log_sum), torch.get_num_threads()),
        )
        return context

    def _attend_back(
        self, grad_context: Tensor, seen: Seen, packed: Pack
    ) -> tuple[Tensor | None, Tensor]:
        """The gradients of q, where there is one, and of the rest."""
        grad_context = _plain(grad_context)
        grad_P = self._pool.take(*seen.qkv_P.shape)
        grad_q = None if seen.q_BH is None else self._pool.take(*seen.q_BH.shape)
        k, v = self._keys_values(grad_q, grad_P)
        _library().pastina_attend_back(
            _pointer(grad_context),
            *self._places(seen, packed),
            _pointer(seen.log_sum),
            *(_pointer(grad_P if grad_q is None else grad_q), k, v, torch.get_num_threads()),
        )
        return grad_q, grad_P

    def _places(self, seen: Seen, packed: Pack) -> tuple[Any, ...]:
        """Where queries, keys and values of which rows lie."""
        q_BH, qkv_P, _ = seen
        q = qkv_P if q_BH is None else q_BH
        return (
            *(_pointer(q), q.shape[1], *self._keys_values(q_BH, qkv_P), qkv_P.shape[1]),
            *(_pointer(packed.start_B), _pointer(packed.length_B), len(packed.start_B)),
            *(self.num_heads, self.head_size, q_BH is not None),
        )

    def _keys_values(self, q_BH: Tensor | None, qkv_P: Tensor) -> tuple[int, int]:
        first = qkv_P.data_ptr() + (0 if q_BH is not None else 4 * self.hidden)
        return first, first + 4 * self.hidden

    def _rows(self, context: Tensor, residual: Tensor, keep: bool) -> tuple[Tensor, Rows | None]:
        """All that follows attention, and what `_rows_back` needs."""
        context, residual = _plain(context), _plain(residual)
        num_rows = len(context)
        out = torch.empty_like(residual)
        rows = None
        if keep:
            dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
            take = self._pool.take
            rows = Rows(
                take(num_rows, self.hidden),
                take(num_rows, self.hidden),
                take(2, num_rows),
                take(num_rows, len(self.up.weight_NK), dtype=dtype),
            )
        _library().pastina_rows(
            ctypes.byref(self._about(False)),
            *(_pointer(context), _pointer(residual), num_rows, _pointer(out)),
            *map(_pointer, rows or (None,) * 4),
            torch.get_num_threads(),
        )
        return out, rows

    def _rows_back(self, grad: Tensor, rows: Rows, keys_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradients of context and residual."""
        grad_context, grad_residual = (self._pool.take(*grad.shape) for _ in range(2))
        _library().pastina_rows_back(
            ctypes.byref(self._about(True)),
            *(_pointer(grad), len(grad), *map(_pointer, rows)),
            *(
                _pointer(grad_context),
                _pointer(grad_residual),
                _pointer(keys_N),
                torch.get_num_threads(),
            ),
        )
        return grad_context, grad_residual

    def _about(self, both_ways: bool) -> native.Layer:
        return self._for_both if both_ways else self._for_answers

    @once
    def _for_answers(self) -> native.Layer:
        return self._layer(both_ways=False)

    @once
    def _for_both(self) -> native.Layer:
        return self._layer(both_ways=True)

    @once
    def for_pass(self) -> native.Layer:
        """For a pass of whole rows through all layers; see `for_pass_end`."""
        about = self._layer(both_ways=False)
        about.qkv = self.qkv.ahead.about
        return about

    @once
    def for_pass_end(self) -> native.Layer:
        """As the last layer of such a pass, where one state of a row may be read alone, its first."""
        about = self._layer(both_ways=False)
        about.qkv = self.qkv.ahead.about
        about.query, about.key_value = self.query.ahead.about, self.key_value.ahead.about
        return about

    def _layer(self, both_ways: bool) -> native.Layer:
        kind = _KINDS[kind_of(self.precision)]
        about = native.Layer(self.hidden, len(self.up.weight_NK), kind, self._act)
        for name in ("out", "up", "down"):
            linear: Linear = getattr(self, name)
            setattr(about, name, linear.ahead.about)
            if both_ways:
                setattr(about, f"{name}_back", linear.back.about)
        for i, norm in enumerate(self._norms, 1):
            setattr(about, f"norm{i}_weight", _pointer(norm.weight))
            setattr(about, f"norm{i}_bias", _pointer(norm.bias))
            setattr(about, f"norm{i}_eps", norm.eps)
        return about


def _filled(weight_NK: Tensor, line: int) -> Tensor:
    """With zeros behind, to whole lines of inputs and whole panels of outputs."""
    outputs, inputs = weight_NK.shape
    return F.pad(weight_NK, (0, -inputs % line, 0, -outputs % _PANEL))


def _panels_of_parts(weight_NK: Tensor) -> Tensor:
    """The bf16 whose sum each weight is, the largest first, as `part_sums` reads them.

    (N / 64, halves, K / 32, halves of these, parts, 16 pairs of inputs, 16 outputs, 2)
    """
    left = _filled(weight_NK.float(), 32)
    parts = []
    for _ in range(3):
        parts.append(left.bfloat16())
        left = left - parts[-1].float()
    outputs, inputs = left.shape
    apart = torch.stack(parts).view(3, outputs // _PANEL, 2, 2, 16, inputs // 32, 16, 2)
    return apart.permute(1, 2, 5, 3, 0, 6, 4, 7).contiguous()


def _library() -> ctypes.CDLL:
    found = native.kernels()
    assert found is not None, "can_fuse() was not asked"
    return found


def _plain(x: Tensor) -> Tensor:
    """In fp32, in one piece."""
    return x.float().contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
