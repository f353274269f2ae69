"""Texts in, answers out, for one adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pastina.adapter import Card, adapter_folder, load_adapter
from pastina.answering import Text, answers, as_row, checked_row
from pastina.answers import Prediction
from pastina.data.encode import Example, encode
from pastina.data.rows import Row
from pastina.engine import Engine, make_engine
from pastina.engine.affine import Precision
from pastina.engine.batching import check_slots, example_logits
from pastina.errors import DataError
from pastina.recipe import check_precision


@dataclass(frozen=True)
class Predictor:
    """A task that answers. Build it with `load`."""

    card: Card
    engine: Engine
    tokenizer: Any
    device: str
    slots: tuple[tuple[int, ...], int] | None  # special ids and how many slots; None: no limit
    extra_tokens: int = 0  # special tokens that are written again behind each input

    def predict(self, texts: Sequence[Text]) -> list[Prediction]:
        """One answer for each text (or pair of texts), in order.

        An answer does not depend on the other texts.

        Raises:
            DataError: a text is empty, a pair where the task reads single texts or the other way
                round, more special tokens written in the text than the task has slots.
        """
        if not isinstance(texts, list | tuple):
            raise DataError(
                f"predict takes a list of texts, not {type(texts).__name__}. Write predict([text])."
            )
        return self.predict_rows([as_row(text, f"text {i + 1}") for i, text in enumerate(texts)])

    def predict_rows(self, rows: Sequence[Row]) -> list[Prediction]:
        """One answer for each row; words of a tagger's rows are used where they are given."""
        if not rows:
            return []
        rows = [checked_row(row, self.card) for row in rows]
        examples = self.encode(rows)
        logits = example_logits(self.engine, examples, self.tokenizer.pad_token_id, self.device)
        return answers(self.card, rows, examples, logits)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """What the model reads of these rows, which are checked; for a tagger they have words.

        Raises:
            DataError: more special tokens in a text than the task has slots.
        """
        card = self.card
        examples = encode(
            rows,
            self.tokenizer,
            card.kind,
            card.labels,
            max_length=card.max_length,
            stride=card.stride,
            extra_tokens=self.extra_tokens,
        )
        if self.slots is not None:
            check_slots(examples, rows, *self.slots)
        return examples


def load(
    path: str | Path,
    *,
    backbone: str | None = None,
    precision: Precision | Literal["auto"] = "auto",
) -> Predictor:
    """The task in this folder (an adapter, or the run that made it), ready to predict.

    backbone: a folder or hub id of the same backbone, instead of the name in the card. precision: of
    the products with frozen weights; auto: bf16 where the device is fast in it, else fp32; what
    that changes is in docs/engine.md.

    Raises:
        AdapterError: no such adapter, broken, or made for another backbone.
        BackboneError: the backbone cannot be found.
        RecipeError: no such precision, or int8 where it cannot be had.
    """
    check_precision(precision)
    loaded = load_adapter(adapter_folder(path), backbone=backbone)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = loaded.model.to(device)
    config = model.peft_config["default"]
    has_slots = loaded.card.method == "pasta"
    slots = (tuple(config.special_token_ids), config.num_slots) if has_slots else None
    engine = make_engine(model, precision=precision)
    extra = config.extra_tokens if has_slots else 0
    return Predictor(loaded.card, engine, loaded.backbone.tokenizer, device, slots, extra)
