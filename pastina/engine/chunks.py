"""Rows of like length, whose attention is computed together.

Shape letters: P packed tokens, B rows, T tokens of the longest row, H hidden, D size of an attention
head, G rows times heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SCRATCH = 1 << 18  # attention scores held at a time, in numbers: what fits the caches
_FREE_WASTE = 1 << 15  # padded scores that cost less than one more chunk
_MAX_WASTE = 0.1  # share of padded scores in a chunk


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring rows of like length.

    rows, tokens: which rows and which packed tokens. length: of the longest.
    padded: where rows differ: for each of its rows x length places the token (any where padded);
    real: the places that are tokens; is_real_BT: the same as a mask. Else None.
    """

    rows: slice
    tokens: slice
    length: int
    padded: Tensor | None = None
    real: Tensor | None = None
    is_real_BT: Tensor | None = None

    def places(self, of_P: Tensor) -> Tensor:
        """What belongs to each place, (B, T), of what belongs to each packed token."""
        own = of_P[self.tokens] if self.padded is None else of_P[self.padded]
        return own.view(-1, self.length)

    def split(self, states: Tensor, parts: int, size: int) -> Tensor:
        """Packed (P, parts * H) as (parts, G, T, D), padded."""
        own = states[self.tokens] if self.padded is None else states[self.padded]
        num_rows = self.rows.stop - self.rows.start
        heads = own.view(num_rows, self.length, parts, -1, size).permute(2, 0, 3, 1, 4)
        # one pass: into the order of memory and into fp32
        out = heads.new_empty(heads.shape, dtype=torch.float32).copy_(heads)
        return out.view(parts, -1, self.length, size)

    def join(self, heads: Tensor, out: Tensor) -> None:
        """Write (parts, G, T, D) into this chunk's part of the packed (P, parts * H)."""
        parts, _, length, size = heads.shape
        num_rows = self.rows.stop - self.rows.start
        states = heads.view(parts, num_rows, -1, length, size).permute(1, 3, 0, 2, 4)
        if self.real is None:
            out[self.tokens].view(states.shape).copy_(states)
        else:
            out[self.tokens] = states.reshape(num_rows * length, -1)[self.real].to(out.dtype)

    def put(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Write parts (B, T, H) side by side into this chunk's part of the packed (P, parts * H)."""
        width = parts[0].shape[-1]
        own = out[self.tokens]
        for i, part in enumerate(parts):
            place, rows = own[:, i * width : (i + 1) * width], part.flatten(0, 1)
            place.copy_(rows if self.real is None else rows[self.real])

    def fill(self, grad: Tensor) -> Tensor:
        """A gradient (P, H) of this chunk as (B * T, H), zero at padding."""
        own = grad[self.tokens]
        if self.real is None:
            return own
        num_rows = self.rows.stop - self.rows.start
        return own.new_zeros(num_rows * self.length, own.shape[1]).index_copy_(0, self.real, own)

    def split_grad(self, grad: Tensor, size: int) -> Tensor:
        """A gradient (P, H) as (G, T, D), zero at padding."""
        own = self.fill(grad)
        num_rows = self.rows.stop - self.rows.start
        heads = own.view(num_rows, self.length, -1, size).transpose(1, 2)
        out = heads.new_empty(heads.shape, dtype=torch.float32).copy_(heads)
        return out.view(-1, self.length, size)


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
    # A row is filled up with a token of its own: what is not finite in one row stays there.
    starts_B = tokens.start + length_B1.squeeze(1).cumsum(0) - length_B1.squeeze(1)
    padded = starts_B.repeat_interleave(longest)
    padded[real] = torch.arange(tokens.start, tokens.stop, device=device)
    return Chunk(rows, tokens, longest, padded, real, is_real_BT)
