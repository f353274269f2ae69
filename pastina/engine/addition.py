"""What is added to the input of a layer.

Shape letters: R tokens that a vector is added to, H hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Addition(NamedTuple):
    """What one layer adds to its input: delta + scale * input; a token may be named twice."""

    tokens_R: Tensor
    delta_RH: Tensor
    scale_RH: Tensor | None = None


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
    return Addition(tokens_R, torch.cat([addition.delta_RH for addition in additions]), scales_RH)
