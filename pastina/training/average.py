"""A moving average of what a run trains, which is what is scored and kept."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """After each step: average = d * average + (1 - d) * trained, d rising to `decay`.

    d is (1 + step) / (10 + step) until that is above `decay`, so that the first values are forgotten.
    """

    def __init__(self, trained: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self.trained, self.decay = trained, decay
        self.tensors = {name: p.detach().clone() for name, p in trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the numbers after this step (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.trained.items():
            self.tensors[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Meanwhile the model has the averages; then what it learns on with."""
        own = {name: p.detach().clone() for name, p in self.trained.items()}
        self._set(self.tensors)
        try:
            yield
        finally:
            self._set(own)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from these averages."""
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    @torch.no_grad()
    def _set(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[name])
