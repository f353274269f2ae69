"""From logits to what a user reads.

Shape letters: C outputs, N words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pastina.data.encode import Example, bio_tags, stitch
from pastina.data.rows import Row
from pastina.spans import Span, from_bio


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one text; the kind of the task says which fields are filled.

    classify: label, score, scores (softmax). multilabel: labels (those at 0.5 or more), scores
    (sigmoid). regress: value. tag: spans in characters. truncated: the end of the text was not read.
    """

    label: str | None = None
    score: float | None = None
    scores: dict[str, float] | None = None
    labels: tuple[str, ...] | None = None
    value: float | None = None
    spans: tuple[Span, ...] | None = None
    truncated: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The filled fields as plain values, ready for JSON."""
        values: dict[str, Any] = {}
        for name in ("label", "score", "scores", "value"):
            if (value := getattr(self, name)) is not None:
                values[name] = value
        if self.labels is not None:
            values["labels"] = list(self.labels)
        if self.spans is not None:
            values["spans"] = [
                {"start": s.start, "end": s.end, "label": s.label, "score": s.score}
                for s in self.spans
            ]
        if self.truncated:
            values["truncated"] = True
        return values


def answer_class(logits_C: torch.Tensor, labels: Sequence[str], truncated: bool) -> Prediction:
    """The most probable class."""
    scores = _softmax(logits_C.tolist())
    best = max(range(len(scores)), key=scores.__getitem__)
    return Prediction(
        label=labels[best],
        score=scores[best],
        scores=dict(zip(labels, scores, strict=True)),
        truncated=truncated,
    )


def _softmax(logits: Sequence[float]) -> list[float]:
    # a few numbers: faster than a tensor's
    most = max(logits)
    parts = [math.exp(one - most) for one in logits]
    total = sum(parts)
    return [part / total for part in parts]


def answer_label_set(logits_C: torch.Tensor, labels: Sequence[str], truncated: bool) -> Prediction:
    """Every label whose probability is at least one half."""
    scores = torch.sigmoid(logits_C.double()).tolist()
    chosen = tuple(label for label, score in zip(labels, scores, strict=True) if score >= 0.5)
    return Prediction(
        labels=chosen, scores=dict(zip(labels, scores, strict=True)), truncated=truncated
    )


def answer_number(
    logits_C: torch.Tensor, mean: float, deviation: float, truncated: bool
) -> Prediction:
    """The number in the units of the training data."""
    return Prediction(value=logits_C[0].item() * deviation + mean, truncated=truncated)


def answer_spans(
    logits_NC: torch.Tensor, labels: Sequence[str], words: Sequence[tuple[int, int]]
) -> Prediction:
    """The spans of a tagged text. A span's score is the probability of its least sure word."""
    tags, scores = best_tags(logits_NC, labels)
    return Prediction(spans=from_bio(words, tags, scores))


def best_tags(logits_NC: torch.Tensor, labels: Sequence[str]) -> tuple[list[str], list[float]]:
    """The most probable tag of each word and its probability; IOB2, so an I- that continues
    nothing becomes a B-."""
    if not len(logits_NC):
        return [], []
    names = bio_tags(labels)
    scores_N, best_N = torch.softmax(logits_NC.double(), -1).max(-1)
    tags = [names[index] for index in best_N.tolist()]
    for i, tag in enumerate(tags):
        if tag.startswith("I-") and (i == 0 or tags[i - 1][2:] != tag[2:]):
            tags[i] = "B-" + tag[2:]
    return tags, scores_N.tolist()


def word_logits(
    rows: Sequence[Row], examples: Sequence[Example], logits: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """For each row the logits of its words, (N, C), from the windows in which they stood.

    A word of which the tokenizer makes nothing is surely outside of any span.
    """
    windows: list[list[int]] = [[] for _ in rows]
    for i, example in enumerate(examples):
        windows[example.row].append(i)
    outside_C = torch.zeros(logits[0].shape[-1] if logits else 1)
    outside_C[0] = 100.0
    found = []
    for row, own in zip(rows, windows, strict=True):
        words = stitch(
            [examples[i] for i in own],
            [list(logits[i]) for i in own],
            len(row.words or ()),
            outside_C,
        )
        found.append(torch.stack(words) if words else outside_C.new_zeros(0, len(outside_C)))
    return found
