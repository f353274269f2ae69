"""Memory for the numbers of a step that the next step uses again: asking the system anew costs more.

Shapes are the caller's.
"""

import threading
from bisect import bisect_left
from contextlib import AbstractContextManager, nullcontext
from math import prod

import torch
from torch import Tensor, UntypedStorage


class Pool:
    """Lends tensors; what is given back is lent again. What is never given back is simply gone."""

    def __init__(self) -> None:
        self._free: list[UntypedStorage] = []  # by size
        self._sizes: list[int] = []  # theirs, in bytes
        self._lock = threading.Lock()

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor on the CPU, in the smallest free memory that holds it."""
        num_bytes = prod(shape) * dtype.itemsize
        with self._lock:
            place = bisect_left(self._sizes, num_bytes)
            if place < len(self._sizes):
                del self._sizes[place]
                memory = self._free.pop(place)
            else:
                # the largest that is too small makes room for the new one
                if self._sizes and self._sizes[-1] > num_bytes // 4:
                    del self._sizes[-1], self._free[-1]
                memory = UntypedStorage(max(num_bytes + num_bytes // 8, 64))
        with _for_training():
            return torch.empty(0, dtype=dtype).set_(memory, 0, shape)  # pyright: ignore[reportCallIssue]

    def give(self, *lent: Tensor | None) -> None:
        """Take back what nobody looks at any more."""
        with self._lock:
            for tensor in lent:
                if tensor is None:
                    continue
                memory = tensor.untyped_storage()
                size = memory.nbytes()
                place = bisect_left(self._sizes, size)
                self._sizes.insert(place, size)
                self._free.insert(place, memory)


def _for_training() -> AbstractContextManager[object]:
    """Memory that is first lent for an answer may be lent for training later."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
