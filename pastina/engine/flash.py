"""Attention by PyTorch's kernel for CPUs, which never writes the scores down.

Shape letters: P packed tokens, B rows, A attention heads, T tokens of the longest row, N queries,
D size of an attention head, H hidden.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pastina.engine.chunks import Chunk
from pastina.engine.sight import View

_LONG = 129  # tokens in a row, from which on the kernel is faster forward and back
_FORWARD = 16  # the same where nothing goes back

_aten: Any = torch.ops.aten
_forward = _aten._scaled_dot_product_flash_attention_for_cpu
_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward


class Flash(NamedTuple):
    """What the backward needs of a chunk: queries (B, A, N, D), keys, values, output, scale of rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    log_sum: Tensor


def fits(view: View, states: Tensor, keep: bool) -> bool:
    """Whether the kernel is the fast way for this chunk of states; keep: for the backward."""
    is_long = view.chunk.length >= (_LONG if keep else _FORWARD)
    return is_long and view.is_whole and states.device.type == "cpu"


def attend(q: Tensor | None, states: Tensor, view: View, size: int) -> tuple[Tensor, Flash]:
    """The context (B * N, H), and what `back` needs.

    states: packed queries, keys and values (P, 3H); with q (B, H), one query per row: the rest (P, 2H).
    """
    chunk = view.chunk
    parts = _parts(states, chunk, 3 if q is None else 2, size)
    if q is not None:
        first = q[chunk.rows].view(len(parts[0]), 1, -1, size).transpose(1, 2)
        parts = [first.float(), *parts]
    if view.turn is not None:
        parts = [part.contiguous() for part in parts]
        for part in parts[:2]:
            view.turn.run_(part.flatten(0, 1)[None])
    mask = _mask(view, parts[0])
    asks, k, v = parts
    out, log_sum = _forward(asks, k, v, 0.0, False, attn_mask=mask, scale=1.0)
    return out.transpose(1, 2).flatten(0, 1).flatten(1), Flash(asks, k, v, out, log_sum)


def back(grad: Tensor, saved: Flash, view: View) -> list[Tensor]:
    """The gradients of queries (B, N, H), keys and values (B, T, H), given the context's (B * N, H)."""
    num_rows, _, num_queries, size = saved.q.shape
    grad_out = grad.float().view(num_rows, num_queries, -1, size).transpose(1, 2)
    mask = _mask(view, saved.q)
    grads = _backward(grad_out, *saved, 0.0, False, attn_mask=mask, scale=1.0)
    if view.turn is not None:
        for part in grads[:2]:
            flat = part.contiguous()
            view.turn.run_(flat.flatten(0, 1)[None], back=True)
            part.copy_(flat)
    return [part.transpose(1, 2).flatten(2) for part in grads]


def _parts(states: Tensor, chunk: Chunk, parts: int, size: int) -> list[Tensor]:
    """Packed (P, parts * H) as `parts` times (B, A, T, D) in fp32; rows of one length are not copied."""
    own = states[chunk.tokens] if chunk.padded is None else states[chunk.padded]
    num_rows = chunk.rows.stop - chunk.rows.start
    own = own.float().view(num_rows, chunk.length, parts, -1, size)
    return list(own.permute(2, 0, 3, 1, 4).unbind())


def _mask(view: View, q: Tensor) -> Tensor | None:
    bias = view.blocks[0].bias
    return None if bias is None else bias.expand(-1, -1, q.shape[2], -1)
