"""The engine that runs any architecture: the model's own forward."""

from typing import Any

from torch import Tensor

from pastina.engine.batching import Batch


class ReferenceEngine:
    """Calls the model itself, whatever it is and whatever wraps it."""

    name = "reference"

    def __init__(self, model: Any) -> None:
        self.model = model

    def logits(self, batch: Batch) -> Tensor:
        """The logits of the batch's items, (N, C)."""
        return batch.pick(self.model(**batch.inputs).logits)
