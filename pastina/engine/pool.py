"""Memory for the numbers of a step that the next step uses again: asking the system anew costs more.

Shapes are the caller's.
"""

import threading
from bisect import bisect_left, insort
from math import prod

import torch
from torch import Tensor


class Pool:
    """Lends tensors; what is given back is lent again. What is never given back is simply gone."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []  # bytes, by size
        self._lock = threading.Lock()

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor on the CPU, in the smallest free memory that holds it."""
        num_bytes = prod(shape) * dtype.itemsize
        with self._lock:
            place = bisect_left(self._free, num_bytes, key=len)
            if place < len(self._free):
                whole = self._free.pop(place)
            else:
                # the largest that is too small makes room for the new one
                if self._free and len(self._free[-1]) > num_bytes // 4:
                    del self._free[-1]
                with torch.inference_mode(False):  # may be lent for training later
                    whole = torch.empty(max(num_bytes + num_bytes // 8, 64), dtype=torch.uint8)
        with torch.inference_mode(False):
            return whole[:num_bytes].view(dtype).view(shape)

    def give(self, *lent: Tensor | None) -> None:
        """Take back what nobody looks at any more."""
        for tensor in lent:
            if tensor is None:
                continue
            with torch.inference_mode(False):
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            with self._lock:
                insort(self._free, whole, key=len)
