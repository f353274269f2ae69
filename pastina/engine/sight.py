"""What the tokens of a row see of each other: how far, and how position turns what they compare.

Shape letters: B rows, T tokens of the longest row, N queries, K keys, D size of an attention head,
C half of it, G rows times heads.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pastina.engine.chunks import Chunk

# Finite: a query of the padding may see nothing, and must not become NaN.
_UNSEEN = -1e30
_NEAR_STEP = 64  # queries that are worked on at a time where they see only what is near
_LONG = 1024  # rows beyond are worked on in steps as well where everything is seen
_LONG_STEP = 256


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """Rotary positions: pairs of numbers of a head turn with the position of their token.

    speed_C: radians per position. scale: by which the turned vectors grow.
    """

    speed_C: Tensor
    scale: float

    def turn(self, position_BT: Tensor) -> "Turn":
        """The turn of each place."""
        angle_B1TC = (position_BT[..., None].float() * self.speed_C).unsqueeze(1)
        return Turn(angle_B1TC.cos() * self.scale, angle_B1TC.sin() * self.scale)


class Turn(NamedTuple):
    """By how much the places of a chunk turn."""

    cos_B1TC: Tensor
    sin_B1TC: Tensor

    def run_(self, heads: Tensor, *, back: bool = False) -> None:
        """Turn (parts, G, T, D) of the first T places in place; back: what gradients need."""
        parts, _, num_places, size = heads.shape
        cos, sin = (t[:, :, :num_places] for t in self)
        rows = heads.view(parts, len(cos), -1, num_places, size)
        first, second = rows.chunk(2, -1)
        old_first, sign = first.clone(), -1 if back else 1
        first.mul_(cos).addcmul_(second, sin, value=-sign)
        second.mul_(cos).addcmul_(old_first, sin, value=sign)


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """What one kind of layer sees. reach: tokens further apart do not see each other; None: all do."""

    reach: int | None = None
    rotary: Rotary | None = None


EVERYTHING = Sight()


class Block(NamedTuple):
    """Queries, the keys that any of them sees, and what is added to their scores, (B, 1, N or 1, K)."""

    queries: slice
    keys: slice
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class View:
    """A chunk as one kind of layer sees it."""

    chunk: Chunk
    blocks: list[Block]
    turn: Turn | None
    is_whole: bool  # all tokens of a row see each other


def look(chunk: Chunk, sight: Sight, position_P: Tensor, spread: int) -> View:
    """The chunk as `sight` sees it. spread: how far at most two tokens of one row are apart."""
    position_BT = chunk.places(position_P)
    turn = sight.rotary and sight.rotary.turn(position_BT)
    if sight.reach is None or spread <= sight.reach:
        return View(chunk, _whole(chunk), turn, True)
    return View(chunk, _near(chunk, sight.reach, position_BT), turn, False)


def _whole(chunk: Chunk) -> list[Block]:
    bias = None if chunk.is_real_BT is None else _bias(chunk.is_real_BT[:, None])
    step = chunk.length if chunk.length <= _LONG else _LONG_STEP
    return [Block(queries, slice(0, chunk.length), bias) for queries in _steps(chunk.length, step)]


def _near(chunk: Chunk, reach: int, position_BT: Tensor) -> list[Block]:
    length, blocks = chunk.length, []
    step = length if length <= _NEAR_STEP + 2 * reach else _NEAR_STEP
    for queries in _steps(length, step):
        # a mask with holes moves tokens only further apart
        keys = slice(max(0, queries.start - reach), min(length, queries.stop + reach))
        apart_BNK = position_BT[:, queries, None] - position_BT[:, None, keys]
        is_seen_BNK = apart_BNK.abs() <= reach
        if chunk.is_real_BT is not None:
            is_seen_BNK &= chunk.is_real_BT[:, None, keys]
        blocks.append(Block(queries, keys, _bias(is_seen_BNK)))
    return blocks


def _bias(is_seen_BNK: Tensor) -> Tensor:
    bias_BNK = torch.zeros(is_seen_BNK.shape, device=is_seen_BNK.device)
    return bias_BNK.masked_fill_(~is_seen_BNK, _UNSEEN).unsqueeze(1)


def _steps(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
