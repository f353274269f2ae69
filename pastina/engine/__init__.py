"""Running a frozen backbone with an adapter over a batch."""

import logging
from typing import Any, Literal, Protocol

from torch import Tensor

from pastina.engine.affine import Precision, choose_precision
from pastina.engine.batching import Batch
from pastina.engine.encoder import Encoder
from pastina.engine.packed import PackedEngine, task_model_of, why_not_packed
from pastina.engine.reference import ReferenceEngine
from pastina.engine.remember import RememberingEngine

logger = logging.getLogger("pastina")


class Engine(Protocol):
    """Answers for a batch; `name` goes into results, as a timing depends on it. precision: of the
    products with frozen weights.
    """

    name: str
    precision: Precision

    def logits(self, batch: Batch) -> Tensor:
        """The logits of the batch's items, (N, C)."""
        ...


def make_engine(
    model: Any,
    *,
    precision: Precision | Literal["auto"] = "auto",
    remember: bool = False,
    encoder: Encoder | None = None,
) -> Engine:
    """The fastest engine that can run this model: a TaskModel, mostly inside a PeftModel.

    The engine reads vectors and head from the model at every call, so it may be trained on. It reads
    the backbone's frozen weights once. remember: rows come again, epoch after epoch; where no vectors
    are added to the lower layers, a RememberingEngine can keep what these make of a row. precision: of
    the products with frozen weights, see `choose_precision`.
    encoder: of the same backbone and precision, to share it; None: a new one.

    Raises:
        RecipeError: int8 where the packed engine cannot run, or on a GPU.
    """
    precision = _precision(model, precision)
    if reason := why_not_packed(model):
        logger.info("The reference engine is used: %s.", reason)
        return ReferenceEngine(model, precision)
    engine = PackedEngine(model, precision, encoder)
    return RememberingEngine(engine) if remember and engine.first_layer() > 0 else engine


def make_encoder(model: Any, precision: Precision | Literal["auto"] = "auto") -> Encoder | None:
    """The encoder of this model's backbone, for several engines to share; None: there is none.

    Args:
        model: as for `make_engine`; where the reference engine would run it there is no encoder.
        precision: of the products with frozen weights.
    """
    if why_not_packed(model):
        return None
    return Encoder(task_model_of(model).backbone, _precision(model, precision))


def _precision(model: Any, wanted: Precision | Literal["auto"]) -> Precision:
    return choose_precision(wanted, next(model.parameters()).device)
