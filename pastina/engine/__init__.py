"""Running a frozen backbone with an adapter over a batch."""

import logging
from typing import Any, Protocol

from torch import Tensor

from pastina.engine.batching import Batch
from pastina.engine.packed import PackedEngine, why_not_packed
from pastina.engine.reference import ReferenceEngine
from pastina.engine.remember import RememberingEngine

logger = logging.getLogger("pastina")


class Engine(Protocol):
    """Answers for a batch; `name` goes into results, as a timing depends on it."""

    name: str

    def logits(self, batch: Batch) -> Tensor:
        """The logits of the batch's items, (N, C)."""
        ...


def make_engine(model: Any, *, remember: bool = False) -> Engine:
    """The fastest engine that can run this model: a TaskModel, mostly inside a PeftModel.

    The engine reads vectors and head from the model at every call, so it may be trained on. It reads
    the backbone's frozen weights once. remember: nothing before the head learns and rows come again
    (the linear probe, epoch after epoch), so what the head reads is kept.
    """
    if reason := why_not_packed(model):
        logger.info("The reference engine is used: %s.", reason)
        return ReferenceEngine(model)
    engine = PackedEngine(model)
    return RememberingEngine(engine) if remember else engine
