"""Frozen attention on packed tokens: forward, and the backward written by hand.

Shape letters: P packed tokens, B rows, T tokens of the longest row, N states that are read, or queries,
K keys, R tokens that a vector is added to, H hidden, D size of an attention head, G rows times heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pastina.engine import flash
from pastina.engine.affine import Affine
from pastina.engine.packing import Pack
from pastina.engine.rounding import keys_at
from pastina.engine.shifting import Shifts
from pastina.engine.sight import Block, Sight, View

_KEEP_SCORES = 128  # rows up to this length keep their attention for the backward, others redo it
_SHORT = 32  # rows below this length have their attention keys first

_aten = torch.ops.aten


class Heads(NamedTuple):
    """What the backward needs of a chunk: queries, keys and values, and, by block, the attention."""

    q_GND: Tensor
    kv: Tensor
    weights: list[Tensor] | None


Kept = Heads | flash.Flash


@dataclass(frozen=True, slots=True)
class Attention:
    """What every token takes from the others, up to `out`, which projects it and which the layer
    itself applies. The scale is in the queries.
    """

    qkv: Affine
    query: Affine  # the first part of qkv
    key_value: Affine  # the rest
    out: Affine
    head_size: int
    sight: Sight

    def run(
        self,
        states_PH: Tensor,
        packed: Pack,
        read_N: Tensor | None,
        one_each: bool,
        keep: bool,
        shifts: Shifts | None = None,
    ) -> tuple[Tensor, list[Kept]]:
        """The context (N, H) at read_N (None: everywhere), and what `back` needs if `keep`.

        one_each: read_N is the first token of each row; then there is one query per row. shifts: where
        tokens have other biases.
        """
        views = packed.views(self.sight)
        if one_each:
            assert read_N is not None
            q_BH, kv = self.query.run(states_PH[read_N]), self.key_value.run(states_PH)
            if shifts is not None:
                shifts.add_attention(q_BH, kv, read_N)
            context, heads = _attend_first(q_BH, kv, views, self.head_size, keep)
        else:
            qkv = self.qkv.run(states_PH)
            if shifts is not None:
                shifts.add_attention(qkv, qkv, None)
            context, heads = _attend(qkv, views, self.head_size, keep)
            context = context if read_N is None else context[read_N]
        return context, heads

    def back(
        self,
        grad_context: Tensor,
        heads: Sequence[Kept],
        packed: Pack,
        read_N: Tensor | None,
        one_each: bool,
        only_R: Tensor | None,
        plus_PH: Tensor | None,
        keys_P: Tensor | None,
        shifts: Shifts | None = None,
    ) -> Tensor:
        """The gradient of the states (+ plus, which is used up): (P, H), or (R, H) at only_R.

        grad_context: (N, H), that of the context.
        """
        views = packed.views(self.sight)
        if one_each:
            assert read_N is not None
            grad_q, grad = _attend_first_back(
                grad_context, heads, views, self.head_size, packed.num_tokens
            )
            if shifts is not None:
                shifts.learn_attention(grad_q, grad, read_N)
            grad_NH = self.query.back(grad_q, None, keys_at(keys_P, read_N, 3))
            if plus_PH is None:
                plus_PH = spread(grad_NH.float(), read_N, packed.num_tokens)
            else:
                plus_PH.index_add_(0, read_N, grad_NH.to(plus_PH.dtype))
            affine = self.key_value
        else:
            if read_N is not None:
                grad_context = spread(grad_context, read_N, packed.num_tokens)
            affine, grad = self.qkv, _attend_back(grad_context, heads, views, self.head_size)
            if shifts is not None:
                shifts.learn_attention(grad, grad, None)
        is_rounded = keys_P is not None or affine.dtype != torch.float32
        if only_R is not None:
            grad, plus_PH = grad[only_R], None if plus_PH is None else plus_PH[only_R]
        if is_rounded and affine is self.qkv:  # one by one, as with one query
            hidden = self.query.weight.shape[0]
            queries, grad = grad[:, :hidden], grad[:, hidden:]
            plus_PH = self.query.back(queries, plus_PH, keys_at(keys_P, only_R, 3))
            affine = self.key_value
        return affine.back(grad, plus_PH, keys_at(keys_P, only_R, 4))


def spread(grad_NH: Tensor, read_N: Tensor, num_tokens: int) -> Tensor:
    """The gradient at the tokens that were read, zero at all others."""
    return grad_NH.new_zeros(num_tokens, grad_NH.shape[1]).index_add_(0, read_N, grad_NH)


# ---------------------------------------------------------------------------------------------------
# Every token asks


def _attend(qkv: Tensor, views: list[View], size: int, keep: bool) -> tuple[Tensor, list[Kept]]:
    context = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
    heads: list[Kept] = []
    for view in views:
        if flash.fits(view, qkv, keep):
            own, saved = flash.attend(None, qkv, view, size)
            real = view.chunk.real
            context[view.chunk.tokens] = own if real is None else own[real].to(context.dtype)
            if keep:
                heads.append(saved)
            continue
        q, k, v = split = view.chunk.split(qkv, 3, size)
        if view.turn is not None:
            view.turn.run_(split[:2])
        kept, mixed = [], []
        keep_weights = keep and view.chunk.length <= _KEEP_SCORES
        for block in view.blocks:
            weights = _weights(q[:, block.queries], k[:, block.keys], block.bias)
            mixed.append(torch.bmm(weights, v[:, block.keys]))
            if keep_weights:
                kept.append(weights)
        view.chunk.join((mixed[0] if len(mixed) == 1 else torch.cat(mixed, 1))[None], context)
        if keep:
            heads.append(Heads(q, split[1:], kept if keep_weights else None))
    return context, heads


def _attend_back(
    grad_context: Tensor, heads: Sequence[Kept], views: list[View], size: int
) -> Tensor:
    num_tokens, width = grad_context.shape
    grad_qkv = grad_context.new_empty(num_tokens, 3 * width)
    for view, saved in zip(views, heads, strict=True):
        if isinstance(saved, flash.Flash):
            view.chunk.put(flash.back(view.chunk.fill(grad_context), saved, view), grad_qkv)
            continue
        q, kv, kept = saved
        grad = view.chunk.split_grad(grad_context, size)
        overlap = len(view.blocks) > 1
        grads = (grad.new_zeros if overlap else grad.new_empty)(3, *q.shape)
        for i, block in enumerate(view.blocks):
            own_q, own_kv = q[:, block.queries], kv[:, :, block.keys]
            weights = _weights(own_q, own_kv[0], block.bias) if kept is None else kept[i]
            grad_kv = grads[1:, :, block.keys]
            own_grad, grad_q = grad[:, block.queries], grads[0][:, block.queries]
            _weigh_back(own_grad, weights, own_q, own_kv, grad_q, grad_kv, overlap)
        if view.turn is not None:
            view.turn.run_(grads[:2], back=True)
        view.chunk.join(grads, grad_qkv)
    return grad_qkv


# ---------------------------------------------------------------------------------------------------
# The first token of each row asks


def _attend_first(
    q_BH: Tensor, kv_P2H: Tensor, views: list[View], size: int, keep: bool
) -> tuple[Tensor, list[Kept]]:
    contexts: list[Tensor] = []
    heads: list[Kept] = []
    for view in views:
        if flash.fits(view, kv_P2H, keep):
            own, saved = flash.attend(q_BH, kv_P2H, view, size)
            contexts.append(own)
            if keep:
                heads.append(saved)
            continue
        q = q_BH[view.chunk.rows].view(-1, 1, size).float()
        kv = view.chunk.split(kv_P2H, 2, size)
        if view.turn is not None:
            view.turn.run_(q[None])
            view.turn.run_(kv[:1])
        keys, bias = _first(view.blocks)
        weights = _weights(q, kv[0][:, keys], bias)
        contexts.append(torch.bmm(weights, kv[1][:, keys]).view(-1, q_BH.shape[1]))
        if keep:
            heads.append(Heads(q, kv, [weights]))
    return torch.cat(contexts), heads


def _attend_first_back(
    grad_BH: Tensor, heads: Sequence[Kept], views: list[View], size: int, num_tokens: int
) -> tuple[Tensor, Tensor]:
    width = grad_BH.shape[1]
    grad_P2H = grad_BH.new_empty(num_tokens, 2 * width)
    grad_queries = []
    for view, saved in zip(views, heads, strict=True):
        if isinstance(saved, flash.Flash):
            grad_q, *grads = flash.back(grad_BH[view.chunk.rows], saved, view)
            grad_queries.append(grad_q.flatten(0, 1))
            view.chunk.put(grads, grad_P2H)
            continue
        q, kv, kept = saved
        assert kept is not None
        grad = grad_BH[view.chunk.rows].view(-1, 1, size).float()
        keys, _ = _first(view.blocks)
        in_part = len(view.blocks) > 1
        grad_q = torch.empty_like(q)
        grad_kv = (torch.zeros_like if in_part else torch.empty_like)(kv)
        _weigh_back(grad, kept[0], q, kv[:, :, keys], grad_q, grad_kv[:, :, keys], in_part)
        if view.turn is not None:
            view.turn.run_(grad_q[None], back=True)
            view.turn.run_(grad_kv[:1], back=True)
        view.chunk.join(grad_kv, grad_P2H)
        grad_queries.append(grad_q.view(-1, width))
    return torch.cat(grad_queries), grad_P2H


def _first(blocks: list[Block]) -> tuple[slice, Tensor | None]:
    """The keys that the first token sees, and what is added to its scores."""
    _, keys, bias = blocks[0]
    return keys, None if bias is None else bias[:, :, :1]


# ---------------------------------------------------------------------------------------------------
# Weights


def _weights(q_GND: Tensor, k_GKD: Tensor, bias: Tensor | None) -> Tensor:
    """What each query takes from each key, (G, N, K); the scale is in the weights of the queries.

    Few keys lie one row apart in memory: the softmax of a short row is slow, that of columns is not.
    """
    if k_GKD.shape[1] < _SHORT:
        return _softmax(torch.bmm(k_GKD, q_GND.mT), bias, 1).mT
    return _softmax(torch.bmm(q_GND, k_GKD.mT), bias, 2)


def _softmax(scores: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """Over the keys, which are at `dim`; scores is written over."""
    if bias is not None:
        bias = bias if dim == 2 else bias.mT
        scores.view(len(bias), -1, *scores.shape[1:]).add_(bias)
    return torch.softmax(scores, dim)


def _weigh_back(
    grad_GND: Tensor,
    weights_GNK: Tensor,
    q_GND: Tensor,
    kv: Tensor,
    grad_q: Tensor,
    grad_kv: Tensor,
    add: bool,
) -> None:
    """Write the gradients into grad_q and grad_kv; add: to what stands in grad_kv."""
    k_GKD, v_GKD = kv
    grad_k, grad_v = grad_kv
    grad_v.baddbmm_(weights_GNK.mT, grad_GND, beta=add)
    if k_GKD.shape[1] < _SHORT:
        grad_weights, weights = torch.bmm(v_GKD, grad_GND.mT), weights_GNK.mT
        grad_scores = _aten._softmax_backward_data(grad_weights, weights, 1, weights.dtype).mT
    else:
        grad_weights = torch.bmm(grad_GND, v_GKD.mT)
        grad_scores = _aten._softmax_backward_data(grad_weights, weights_GNK, 2, weights_GNK.dtype)
    grad_k.baddbmm_(grad_scores.mT, q_GND, beta=add)
    torch.bmm(grad_scores, k_GKD, out=grad_q)
