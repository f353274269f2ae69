"""Frozen post-norm transformer layers on packed tokens: forward, and the backward written by hand.

Packed: the tokens of all rows one after the other, without padding. Weights never get a gradient.

Shape letters: P packed tokens, B rows, T tokens of the longest row, N states that are read, R tokens
that a vector is added to, H hidden, I intermediate, D size of an attention head, G rows times heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SCRATCH = 1 << 18  # attention scores held at a time, in numbers: what fits the caches
_FREE_WASTE = 1 << 15  # padded scores that cost less than one more chunk
_MAX_WASTE = 0.1  # share of padded scores in a chunk
_KEEP_SCORES = 128  # rows up to this length keep their attention for the backward, others redo it

_SHORT = 32  # rows below this length have their attention keys first
_BLOCK = 512  # tokens that go through the feed-forward part at a time: it stays in the caches

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation and its gradient with respect to its input, written over the output's gradient."""

    run: Callable[[Tensor], Tensor]
    back_: Callable[[Tensor, Tensor], Tensor]


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


class Affine:
    """A frozen linear layer. On a CPU its weight is kept a second and, once it is trained through, a
    third time, in the order of memory that oneDNN likes for the way forward and back.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def run(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias (+ plus)."""
        return _matmul(x, self._ahead, self.bias, plus)

    def back(self, grad: Tensor, plus: Tensor | None = None) -> Tensor:
        """The gradient of the input (+ plus)."""
        return _matmul(grad, self._back, None, plus)

    @cached_property
    def _ahead(self) -> Tensor:
        return _reordered(self.weight)

    @cached_property
    def _back(self) -> Tensor:
        return _reordered(self.weight.t())


class Norm(NamedTuple):
    """A frozen LayerNorm."""

    weight: Tensor
    bias: Tensor
    eps: float

    def run(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and the mean and the inverse deviation that the backward needs."""
        return torch.native_layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def back(self, grad: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        """The gradient of the input; saved: the input, and the mean and inverse deviation of `run`."""
        x, mean, rstd = saved
        return _aten.native_layer_norm_backward(
            grad, x, self.weight.shape, mean, rstd, self.weight, self.bias, [True, False, False]
        )[0]


_onednn: Any = getattr(torch.ops, "mkldnn", None) if torch.backends.mkldnn.is_available() else None


def _reordered(weight: Tensor) -> Tensor:
    if _onednn is None or weight.device.type != "cpu":
        return weight
    return _onednn._reorder_linear_weight(weight.contiguous(), None)


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None) -> Tensor:
    if weight.is_mkldnn:  # twice as fast as F.linear by MKL where the processor is not Intel's
        if plus is None:
            return _onednn._linear_pointwise(x, weight, bias, "none", [], "")
        return _onednn._linear_pointwise.binary(x, plus, weight, bias, "add")
    if plus is None:
        return F.linear(x, weight, bias)
    out = torch.addmm(plus, x, weight.t())
    return out if bias is None else out.add_(bias)


# ---------------------------------------------------------------------------------------------------
# Attention


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring rows of like length, whose attention is computed together.

    rows, tokens: which rows and which packed tokens. length: of the longest.
    padded: where rows differ: for each of its rows x length places the token (any where padded);
    real: the places that are tokens; bias_B11T: 0 at tokens, -inf at padding. Else None.
    """

    rows: slice
    tokens: slice
    length: int
    padded: Tensor | None = None
    real: Tensor | None = None
    bias_B11T: Tensor | None = None

    def split(self, states: Tensor, parts: int, size: int) -> Tensor:
        """Packed (P, parts * H) as (parts, G, T, D), padded."""
        own = states[self.tokens] if self.padded is None else states[self.padded]
        num_rows = self.rows.stop - self.rows.start
        heads = own.view(num_rows, self.length, parts, -1, size).permute(2, 0, 3, 1, 4)
        return heads.reshape(parts, -1, self.length, size)

    def join(self, heads: Tensor, out: Tensor) -> None:
        """Write (parts, G, T, D) into this chunk's part of the packed (P, parts * H)."""
        parts, _, length, size = heads.shape
        num_rows = self.rows.stop - self.rows.start
        states = heads.view(parts, num_rows, -1, length, size).permute(1, 3, 0, 2, 4)
        if self.real is None:
            out[self.tokens].view(states.shape).copy_(states)
        else:
            out[self.tokens] = states.reshape(num_rows * length, -1)[self.real]

    def split_grad(self, grad: Tensor, size: int) -> Tensor:
        """A gradient (P, H) as (G, T, D), zero at padding."""
        own = grad[self.tokens]
        num_rows = self.rows.stop - self.rows.start
        if self.real is not None:
            own = own.new_zeros(num_rows * self.length, own.shape[1]).index_copy_(0, self.real, own)
        heads = own.view(num_rows, self.length, -1, size).transpose(1, 2)
        return heads.reshape(-1, self.length, size)


def make_chunks(lengths: Sequence[int], num_heads: int, device: torch.device) -> list[Chunk]:
    """Rows, given by their falling lengths, in chunks with little padding."""
    chunks, row, token = [], 0, 0
    while row < len(lengths):
        stop, longest, waste = row + 1, lengths[row], 0
        while stop < len(lengths):
            waste += (longest**2 - lengths[stop] ** 2) * num_heads
            scores = (stop + 1 - row) * longest**2 * num_heads
            if scores > _SCRATCH or waste > max(_FREE_WASTE, _MAX_WASTE * scores):
                break
            stop += 1
        num_tokens = sum(lengths[row:stop])
        tokens = slice(token, token + num_tokens)
        chunks.append(_chunk(slice(row, stop), tokens, lengths[row:stop], device))
        row, token = stop, token + num_tokens
    return chunks


def _chunk(rows: slice, tokens: slice, lengths: Sequence[int], device: torch.device) -> Chunk:
    longest = lengths[0]
    if lengths[-1] == longest:
        return Chunk(rows, tokens, longest)
    length_B1 = torch.tensor(lengths, device=device).unsqueeze(1)
    is_real_BT = torch.arange(longest, device=device) < length_B1
    real = is_real_BT.view(-1).nonzero().squeeze(1)
    padded = torch.full((is_real_BT.numel(),), tokens.start, device=device)
    padded[real] = torch.arange(tokens.start, tokens.stop, device=device)
    bias_BT = torch.zeros(is_real_BT.shape, device=device).masked_fill_(~is_real_BT, -torch.inf)
    return Chunk(rows, tokens, longest, padded, real, bias_BT[:, None, None, :])


def _weights(q_GND: Tensor, k_GTD: Tensor, bias_B11T: Tensor | None) -> Tensor:
    """What each query takes from each key, (G, N, T); the scale is in the weights of the queries.

    Few keys lie one row apart in memory: the softmax of a short row is slow, that of columns is not.
    """
    if k_GTD.shape[1] < _SHORT:
        return _softmax(torch.bmm(k_GTD, q_GND.mT), bias_B11T, 1).mT
    return _softmax(torch.bmm(q_GND, k_GTD.mT), bias_B11T, 2)


def _softmax(scores: Tensor, bias_B11T: Tensor | None, dim: int) -> Tensor:
    """Over the keys, which are at `dim`; scores is written over."""
    if bias_B11T is not None:
        bias = bias_B11T if dim == 2 else bias_B11T.mT
        scores.view(len(bias), -1, *scores.shape[1:]).add_(bias)
    return torch.softmax(scores, dim)


def _attend_back(
    grad_GND: Tensor,
    weights_GNT: Tensor,
    q_GND: Tensor,
    kv: Tensor,
    grad_q: Tensor,
    grad_kv: Tensor,
) -> None:
    """Write the gradients of queries and of keys and values into grad_q and grad_kv."""
    k_GTD, v_GTD = kv
    torch.bmm(weights_GNT.mT, grad_GND, out=grad_kv[1])
    if k_GTD.shape[1] < _SHORT:
        grad_weights, weights = torch.bmm(v_GTD, grad_GND.mT), weights_GNT.mT
        grad_scores = _aten._softmax_backward_data(grad_weights, weights, 1, weights.dtype).mT
    else:
        grad_weights = torch.bmm(grad_GND, v_GTD.mT)
        grad_scores = _aten._softmax_backward_data(grad_weights, weights_GNT, 2, weights_GNT.dtype)
    torch.bmm(grad_scores.mT, q_GND, out=grad_kv[0])
    torch.bmm(grad_scores, k_GTD, out=grad_q)


# ---------------------------------------------------------------------------------------------------
# Layers


class Saved(NamedTuple):
    """What the backward of a layer needs.

    heads: per chunk the queries, the keys and values, and the attention weights. mixed, summed: what
    went into the two norms, its mean and inverse deviation. inner: what the activation was given.
    """

    heads: list[tuple[Tensor, Tensor, Tensor | None]]
    mixed: tuple[Tensor, ...]
    inner: list[Tensor]
    summed: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class FrozenLayer:
    """norm(x + attention(x)), then norm(x + ffn(x)). The scale of attention is in the queries."""

    qkv: Affine
    query: Affine  # the first part of qkv
    key_value: Affine  # the rest
    out: Affine
    norm1: Norm
    up: Affine
    act: Activation
    down: Affine
    norm2: Norm
    head_size: int

    def run(
        self,
        hidden_PH: Tensor,
        chunks: list[Chunk],
        read_N: Tensor | None,
        one_each: bool,
        keep: bool,
    ) -> tuple[Tensor, Saved | None]:
        """The layer's output at read_N (None: everywhere), and what the backward needs if `keep`.

        one_each: read_N is one token of each row; then there is one query per row.
        """
        residual = hidden_PH if read_N is None else hidden_PH[read_N]
        if one_each:
            context, heads = self._attend_one_each(hidden_PH, residual, chunks, keep)
        else:
            context, heads = self._attend(hidden_PH, chunks, keep)
            context = context if read_N is None else context[read_N]
        mixed = self.out.run(context, residual)
        middle, *stats1 = self.norm1.run(mixed)
        inner, summed = self._widen(middle, keep)
        output, *stats2 = self.norm2.run(summed)
        if not keep:
            return output, None
        return output, Saved(heads, (mixed, *stats1), inner, (summed, *stats2))

    def back(
        self,
        grad: Tensor,
        saved: Saved,
        num_tokens: int,
        chunks: list[Chunk],
        read_N: Tensor | None,
        one_each: bool,
        only_R: Tensor | None,
    ) -> Tensor:
        """The gradient of the input: (P, H), or (R, H) at the tokens only_R."""
        grad = self.norm2.back(grad, saved.summed)
        grad = self.norm1.back(self._widen_back(grad, saved.inner), saved.mixed)
        grad_context = self.out.back(grad)
        if read_N is not None:
            grad = _spread(grad, read_N, num_tokens)
        if one_each:
            assert read_N is not None
            grad_q, grad_kv = self._attend_one_each_back(grad_context, saved, num_tokens, chunks)
            grad.index_add_(0, read_N, self.query.back(grad_q))
            affine, grad_states = self.key_value, grad_kv
        else:
            if read_N is not None:
                grad_context = _spread(grad_context, read_N, num_tokens)
            affine, grad_states = self.qkv, self._attend_back(grad_context, saved, chunks)
        if only_R is not None:
            return affine.back(grad_states[only_R], grad[only_R])
        return affine.back(grad_states, grad)

    def _widen(self, middle_NH: Tensor, keep: bool) -> tuple[list[Tensor], Tensor]:
        """The feed-forward part with its residual, and what the activation was given if `keep`."""
        inner, outer = [], []
        for block in middle_NH.split(_BLOCK):
            wide = self.up.run(block)
            outer.append(self.down.run(self.act.run(wide), block))
            if keep:
                inner.append(wide)
        return inner, torch.cat(outer)

    def _widen_back(self, grad_NH: Tensor, inner: list[Tensor]) -> Tensor:
        blocks = zip(grad_NH.split(_BLOCK), inner, strict=True)
        return torch.cat(
            [self.up.back(self.act.back_(self.down.back(grad), x), grad) for grad, x in blocks]
        )

    def _attend(
        self, hidden_PH: Tensor, chunks: list[Chunk], keep: bool
    ) -> tuple[Tensor, list[Any]]:
        qkv = self.qkv.run(hidden_PH)
        context = torch.empty(len(qkv), qkv.shape[1] // 3, dtype=qkv.dtype, device=qkv.device)
        heads = []
        for chunk in chunks:
            q, k, v = split = chunk.split(qkv, 3, self.head_size)
            weights = _weights(q, k, chunk.bias_B11T)
            chunk.join(torch.bmm(weights, v).unsqueeze(0), context)
            if keep:
                heads.append((q, split[1:], weights if chunk.length <= _KEEP_SCORES else None))
        return context, heads

    def _attend_back(self, grad_context: Tensor, saved: Saved, chunks: list[Chunk]) -> Tensor:
        num_tokens, size = grad_context.shape
        grad_qkv = grad_context.new_empty(num_tokens, 3 * size)
        for chunk, (q, kv, kept) in zip(chunks, saved.heads, strict=True):
            weights = _weights(q, kv[0], chunk.bias_B11T) if kept is None else kept
            grad = chunk.split_grad(grad_context, self.head_size)
            grads = grad.new_empty(3, *q.shape)
            _attend_back(grad, weights, q, kv, grads[0], grads[1:])
            chunk.join(grads, grad_qkv)
        return grad_qkv

    def _attend_one_each(
        self, hidden_PH: Tensor, read_NH: Tensor, chunks: list[Chunk], keep: bool
    ) -> tuple[Tensor, list[Any]]:
        kv = self.key_value.run(hidden_PH)
        query = self.query.run(read_NH)
        contexts, heads = [], []
        for chunk in chunks:
            q = query[chunk.rows].view(-1, 1, self.head_size)
            split = chunk.split(kv, 2, self.head_size)
            weights = _weights(q, split[0], chunk.bias_B11T)
            contexts.append(torch.bmm(weights, split[1]).view(-1, query.shape[1]))
            if keep:
                heads.append((q, split, weights))
        return torch.cat(contexts), heads

    def _attend_one_each_back(
        self, grad_context: Tensor, saved: Saved, num_tokens: int, chunks: list[Chunk]
    ) -> tuple[Tensor, Tensor]:
        size = grad_context.shape[1]
        grad_all_kv = grad_context.new_empty(num_tokens, 2 * size)
        grad_queries = []
        for chunk, (q, kv, weights) in zip(chunks, saved.heads, strict=True):
            assert weights is not None
            grad = grad_context[chunk.rows].view(-1, 1, self.head_size)
            grad_q, grad_kv = torch.empty_like(q), torch.empty_like(kv)
            _attend_back(grad, weights, q, kv, grad_q, grad_kv)
            chunk.join(grad_kv, grad_all_kv)
            grad_queries.append(grad_q.view(-1, size))
        return torch.cat(grad_queries), grad_all_kv


def _spread(grad_NH: Tensor, read_N: Tensor, num_tokens: int) -> Tensor:
    """The gradient at the tokens that were read, zero at all others."""
    return grad_NH.new_zeros(num_tokens, grad_NH.shape[1]).index_add_(0, read_N, grad_NH)
