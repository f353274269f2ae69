"""From what a user asks to rows, and from logits to answers; the same for one task and for many."""

from collections.abc import Sequence
from typing import Protocol

import torch

from pastina.answers import (
    Prediction,
    answer_class,
    answer_label_set,
    answer_number,
    answer_spans,
    word_logits,
)
from pastina.data.convert import check_text
from pastina.data.encode import Example
from pastina.data.rows import Row
from pastina.errors import DataError
from pastina.spans import split_words

Text = str | tuple[str, str]


class Facts(Protocol):
    """What has to be known of a task to ask it: an adapter's card, or a task of a bank."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def is_pair(self) -> bool: ...
    @property
    def target_mean(self) -> float: ...
    @property
    def target_std(self) -> float: ...


def as_row(text: Text, where: str, keep_end: bool = False) -> Row:
    """A text or a pair of texts as a row; `where` names it in messages, `keep_end` as in Row.

    Raises:
        DataError: it is neither.
    """
    match text:
        case str():
            return Row(text=text, where=where, keep_end=keep_end)
        case (str() as first, str() as second):
            return Row(text=first, text_pair=second, where=where, keep_end=keep_end)
    raise DataError(f"{where}: {text!r} is neither a text nor a pair of two texts.")


def checked_row(row: Row, task: Facts) -> Row:
    """The row as this task reads it: for a tagger with words, which are found if none are given.

    Raises:
        DataError: the text is empty; a pair where the task reads single texts, or the other way round.
    """
    texts = [check_text(t, row.where) for t in (row.text, row.text_pair) if t is not None]
    if (len(texts) == 2) != task.is_pair:
        one, two = "single texts", "pairs of texts"
        wanted, seen = (two, "a single text") if task.is_pair else (one, "a pair")
        raise DataError(f"{row.where}: the task {task.name!r} reads {wanted}, and this is {seen}.")
    if task.kind == "tag" and row.words is None:
        return Row(text=row.text, words=split_words(row.text), where=row.where)
    return row


def answers(
    task: Facts, rows: Sequence[Row], examples: Sequence[Example], logits: Sequence[torch.Tensor]
) -> list[Prediction]:
    """One answer for each row. logits: of the items of each example, (N, C)."""
    if task.kind == "tag":
        per_row = word_logits(rows, examples, logits)
        return [
            answer_spans(row_logits, task.labels, row.words or ())
            for row, row_logits in zip(rows, per_row, strict=True)
        ]
    return [
        _answer(task, one[0], example.truncated)
        for example, one in zip(examples, logits, strict=True)
    ]


def _answer(task: Facts, logits_C: torch.Tensor, truncated: bool) -> Prediction:
    if task.kind == "classify":
        return answer_class(logits_C, task.labels, truncated)
    if task.kind == "multilabel":
        return answer_label_set(logits_C, task.labels, truncated)
    return answer_number(logits_C, task.target_mean, task.target_std, truncated)
