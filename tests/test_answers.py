import json
import math

import pytest
import torch

from pastina.answers import (
    Prediction,
    answer_class,
    answer_label_set,
    answer_number,
    answer_spans,
    best_tags,
    word_logits,
)
from pastina.data.encode import Example
from pastina.data.rows import Row
from pastina.spans import Span

LABELS = ("a", "b")  # tags: O, B-a, I-a, B-b, I-b


def tag_logits(*tags: str) -> torch.Tensor:
    names = ["O", "B-a", "I-a", "B-b", "I-b"]
    return torch.stack([5.0 * torch.eye(5)[names.index(tag)] for tag in tags])


def test_the_most_probable_class() -> None:
    answer = answer_class(torch.tensor([0.0, math.log(3)]), LABELS, truncated=True)
    assert answer.label == "b"
    assert answer.score == pytest.approx(0.75)
    assert answer.scores == pytest.approx({"a": 0.25, "b": 0.75})
    assert answer.as_dict()["truncated"] is True


def test_labels_of_at_least_one_half() -> None:
    answer = answer_label_set(torch.tensor([0.0, -0.1]), LABELS, truncated=False)
    assert answer.labels == ("a",)
    assert answer.scores == pytest.approx({"a": 0.5, "b": 1 / (1 + math.exp(0.1))})
    none = answer_label_set(torch.tensor([-1.0, -1.0]), LABELS, truncated=False)
    assert none.as_dict()["labels"] == []


def test_a_number_in_the_units_of_the_data() -> None:
    answer = answer_number(torch.tensor([-2.0]), mean=10.0, deviation=3.0, truncated=False)
    assert answer.as_dict() == {"value": 4.0}
    assert answer_number(torch.tensor([0.0]), 0.0, 1.0, False).as_dict() == {"value": 0.0}


def test_spans_in_characters() -> None:
    words = [(0, 2), (3, 6), (7, 9)]
    spans = answer_spans(tag_logits("B-a", "I-a", "O"), LABELS, words).spans
    assert spans is not None
    assert [(s.start, s.end, s.label) for s in spans] == [(0, 6, "a")]
    assert spans[0].score == pytest.approx(math.exp(5) / (math.exp(5) + 4))
    assert answer_spans(torch.zeros(0, 5), LABELS, []).as_dict() == {"spans": []}


@pytest.mark.parametrize(
    ("seen", "made"),
    [
        (["I-a", "I-a"], ["B-a", "I-a"]),
        (["B-a", "I-b"], ["B-a", "B-b"]),
        (["O", "I-b", "I-b"], ["O", "B-b", "I-b"]),
        (["B-a", "I-a", "B-a"], ["B-a", "I-a", "B-a"]),
        (["I-a", "I-b", "I-a"], ["B-a", "B-b", "B-a"]),
    ],
)
def test_an_inside_that_continues_nothing_begins_a_span(seen: list[str], made: list[str]) -> None:
    assert best_tags(tag_logits(*seen), LABELS)[0] == made


def window(row: int, words: list[int], num_tokens: int) -> Example:
    return Example(
        row, [0] * num_tokens, None, None, [1 + w - words[0] for w in words], words, False
    )


def test_logits_of_windows_come_together_by_word() -> None:
    rows = [Row("x", words=((0, 1), (1, 2), (2, 3), (3, 4))), Row("", words=((0, 1),))]
    examples = [window(0, [0, 1, 2], 5), window(0, [2, 3], 4), window(1, [], 2)]
    logits = [torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[20.0], [3.0]]), torch.zeros(0, 1)]
    first, second = word_logits(rows, examples, logits)
    # word 2 is last of window 0 (one token after it) and first of window 1 (one before): the earlier
    assert first.flatten().tolist() == [0, 1, 2, 3]
    assert second.argmax(-1).tolist() == [0], "a word without tokens is outside of any span"


def test_answers_are_plain_values() -> None:
    answer = Prediction(spans=(Span(0, 1, "a", 0.5),), truncated=False)
    assert json.loads(json.dumps(answer.as_dict())) == {
        "spans": [{"start": 0, "end": 1, "label": "a", "score": 0.5}]
    }
    assert Prediction(label="a", score=0.0, scores={}).as_dict() == {
        "label": "a",
        "score": 0.0,
        "scores": {},
    }
