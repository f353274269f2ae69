import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from pastina.errors import RecipeError
from pastina.kinds import KINDS, class_weights, main_metric

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]])


def test_the_loss_of_classes_by_hand() -> None:
    losses = KINDS["classify"].loss(LOGITS, torch.tensor([0, 2]), None)
    first = -math.log(math.exp(2) / (math.exp(2) + 1 + math.exp(-1)))
    assert losses.tolist() == pytest.approx([first, math.log(3)])
    weighted = KINDS["tag"].loss(LOGITS, torch.tensor([0, 2]), torch.tensor([3.0, 1.0, 0.5]))
    assert weighted.tolist() == pytest.approx([3 * first, 0.5 * math.log(3)])


def test_the_loss_of_label_sets_by_hand() -> None:
    targets = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    losses = KINDS["multilabel"].loss(LOGITS, targets, None)

    def log1p_exp(x: float) -> float:
        return math.log(1 + math.exp(x))

    first = (log1p_exp(-2) + log1p_exp(0) + log1p_exp(1)) / 3
    assert losses.tolist() == pytest.approx([first, log1p_exp(0.5)])
    weights = torch.tensor([4.0, 7.0, 1.0])  # of what is true
    weighted = KINDS["multilabel"].loss(LOGITS, targets, weights)
    assert weighted[0].item() == pytest.approx(first + 3 * log1p_exp(-2) / 3)


def test_the_loss_of_numbers_by_hand() -> None:
    losses = KINDS["regress"].loss(torch.tensor([[1.5], [0.0]]), torch.tensor([1.0, -2.0]), None)
    assert losses.tolist() == pytest.approx([0.25, 4.0])


def test_outputs() -> None:
    outputs = {name: kind.outputs(("a", "b")) for name, kind in KINDS.items()}
    assert outputs == {
        "classify": ("a", "b"),
        "multilabel": ("a", "b"),
        "regress": ("value",),
        "tag": ("O", "B-a", "I-a", "B-b", "I-b"),
    }


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    truth = ["a"] * 6 + ["b"] * 3 + ["c"]
    found = class_weights(
        KINDS["classify"], ("a", "b", "c"), "balanced", {"a": 6, "b": 3, "c": 1}, 10
    )
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=truth)
    assert found is not None
    assert found.tolist() == pytest.approx(expected.tolist())


def test_balanced_weights_of_label_sets() -> None:
    found = class_weights(KINDS["multilabel"], ("a", "b"), "balanced", {"a": 8, "b": 2}, 10)
    assert found is not None
    assert found.tolist() == pytest.approx([2 / 8, 8 / 2])


def test_a_tag_that_never_occurs_does_not_divide_by_zero() -> None:
    counts = {"O": 8, "B-a": 2}  # no I-a
    found = class_weights(KINDS["tag"], ("a",), "balanced", counts, 10)
    assert found is not None
    assert found.tolist() == pytest.approx([10 / 24, 10 / 6, 10 / 3])


def test_named_weights() -> None:
    found = class_weights(KINDS["tag"], ("a", "b"), {"b": 3.0, "O": 0.5}, {}, 1)
    assert found is not None
    assert found.tolist() == [0.5, 1, 1, 3, 3]
    assert class_weights(KINDS["tag"], ("a",), None, {}, 1) is None


@pytest.mark.parametrize(
    ("kind", "wanted", "words"),
    [
        ("classify", {"z": 1.0}, "names 'z', which is not a label"),
        ("classify", {"O": 1.0}, "names 'O'"),
        ("regress", "balanced", "means nothing for regress"),
    ],
)
def test_weights_that_make_no_sense(kind: str, wanted: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        class_weights(KINDS[kind], ("a", "b"), wanted, {}, 1)


def test_the_metric_that_picks_the_epoch() -> None:
    assert main_metric(KINDS["tag"], None, ("a",)) == "f1"
    assert main_metric(KINDS["classify"], "f1", ("a", "b")) == "f1"
    with pytest.raises(RecipeError, match="known: accuracy, macro_f1, matthews, f1"):
        main_metric(KINDS["classify"], "rmse", ("a", "b"))
    with pytest.raises(RecipeError, match="needs two classes, the data has 3"):
        main_metric(KINDS["classify"], "f1", ("a", "b", "c"))
