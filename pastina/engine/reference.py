"""The engine that runs any architecture: the model's own forward."""

from typing import Any

import torch
from torch import Tensor

from pastina.engine.affine import Precision
from pastina.engine.batching import Batch
from pastina.errors import RecipeError


class ReferenceEngine:
    """Calls the model itself, whatever it is and whatever wraps it."""

    def __init__(self, model: Any, precision: Precision = "fp32") -> None:
        check_precision(precision)
        self.model = model
        self.precision: Precision = precision
        self.name = "reference" if precision == "fp32" else f"reference, {precision}"

    def logits(self, batch: Batch) -> Tensor:
        """The logits of the batch's items, (N, C), in fp32."""
        device = batch.inputs["input_ids"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            return batch.pick(self.model(**batch.inputs).logits).float()


def check_precision(precision: Precision) -> None:
    """Nothing, if a model's own forward can be had in this precision.

    Raises:
        RecipeError: it is int8.
    """
    if precision == "int8":
        raise RecipeError(
            "The reference engine has no int8 products. Choose precision = 'fp32' or 'bf16', or a "
            "backbone and method that the packed engine knows (docs/engine.md)."
        )
