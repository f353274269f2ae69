"""Texts in, answers out, for one adapter."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pastina.adapter import Card, load_adapter
from pastina.answers import (
    Prediction,
    answer_class,
    answer_label_set,
    answer_number,
    answer_spans,
    word_logits,
)
from pastina.data.convert import check_text
from pastina.data.encode import Example, encode
from pastina.data.rows import Row
from pastina.engine import Engine, make_engine
from pastina.engine.batching import check_slots, example_logits
from pastina.errors import DataError
from pastina.spans import split_words

Text = str | tuple[str, str]


@dataclass(frozen=True)
class Predictor:
    """A task that answers. Build it with `load`."""

    card: Card
    engine: Engine
    tokenizer: Any
    device: str
    slots: tuple[tuple[int, ...], int] | None  # special ids and how many slots; None: no limit

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
        return self.predict_rows([self._row(text, i) for i, text in enumerate(texts)])

    def predict_rows(self, rows: Sequence[Row]) -> list[Prediction]:
        """One answer for each row; words of a tagger's rows are used where they are given."""
        if not rows:
            return []
        rows = [self._with_words(row) for row in rows]
        examples = self.encode(rows)
        logits = example_logits(self.engine, examples, self.tokenizer.pad_token_id, self.device)
        return self._answers(rows, examples, logits)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """What the model reads of these rows; for a tagger they have words.

        Raises:
            DataError: as `predict` says.
        """
        card = self.card
        for row in rows:
            self._check(row)
        examples = encode(
            rows,
            self.tokenizer,
            card.kind,
            card.labels,
            max_length=card.max_length,
            stride=card.stride,
        )
        if self.slots is not None:
            check_slots(examples, rows, *self.slots)
        return examples

    def _row(self, text: Text, index: int) -> Row:
        where = f"text {index + 1}"
        match text:
            case str():
                return Row(text=text, where=where)
            case (str() as first, str() as second):
                return Row(text=first, text_pair=second, where=where)
        raise DataError(f"{where}: {text!r} is neither a text nor a pair of two texts.")

    def _check(self, row: Row) -> None:
        texts = [check_text(t, row.where) for t in (row.text, row.text_pair) if t is not None]
        if (len(texts) == 2) != self.card.is_pair:
            one, two = "single texts", "pairs of texts"
            wanted, seen = (two, "a single text") if self.card.is_pair else (one, "a pair")
            raise DataError(
                f"{row.where}: the task {self.card.name!r} reads {wanted}, and this is {seen}."
            )

    def _with_words(self, row: Row) -> Row:
        if self.card.kind == "tag" and row.words is None:
            return Row(text=row.text, words=split_words(row.text), where=row.where)
        return row

    def _answers(
        self, rows: Sequence[Row], examples: Sequence[Example], logits: Sequence[torch.Tensor]
    ) -> list[Prediction]:
        card = self.card
        if card.kind == "tag":
            per_row = word_logits(rows, examples, logits)
            return [
                answer_spans(row_logits, card.labels, row.words or ())
                for row, row_logits in zip(rows, per_row, strict=True)
            ]
        pairs = zip(examples, (one[0] for one in logits), strict=True)
        if card.kind == "classify":
            return [answer_class(one, card.labels, e.truncated) for e, one in pairs]
        if card.kind == "multilabel":
            return [answer_label_set(one, card.labels, e.truncated) for e, one in pairs]
        mean, deviation = card.target_mean, card.target_std
        return [answer_number(one, mean, deviation, e.truncated) for e, one in pairs]


def load(path: str | Path, *, backbone: str | None = None) -> Predictor:
    """The task in this folder (an adapter, or the run that made it), ready to predict.

    backbone: a folder or hub id of the same backbone, instead of the name in the card.

    Raises:
        AdapterError: no such adapter, broken, or made for another backbone.
        BackboneError: the backbone cannot be found.
    """
    loaded = load_adapter(adapter_folder(path), backbone=backbone)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = loaded.model.to(device)
    config = model.peft_config["default"]
    has_slots = loaded.card.method == "pasta"
    slots = (tuple(config.special_token_ids), config.num_slots) if has_slots else None
    return Predictor(loaded.card, make_engine(model), loaded.backbone.tokenizer, device, slots)


def adapter_folder(path: str | Path) -> Path:
    """The adapter in this folder: the folder itself, or `adapter` in a run's folder."""
    path = Path(path)
    inner = path / "adapter"
    return inner if not (path / "task.json").is_file() and inner.is_dir() else path
