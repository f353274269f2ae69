import math

import numpy as np
import pytest
import scipy.stats

from pastina.training.metrics import score_classes, score_label_sets, score_numbers, score_tags


def test_classes_by_hand() -> None:
    # counts: true 1 of class 1: 3; seen as 1: 2, of which right: 2
    scores = score_classes([1, 1, 1, 0, 0], [1, 1, 0, 0, 0], 2)
    assert scores["accuracy"] == pytest.approx(4 / 5)
    f1_one, f1_zero = 2 * 2 / (2 + 3), 2 * 2 / (3 + 2)
    assert scores["f1"] == pytest.approx(f1_one)
    assert scores["macro_f1"] == pytest.approx((f1_one + f1_zero) / 2)
    tp, tn, fp, fn = 2, 2, 0, 1
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert scores["matthews"] == pytest.approx(by_hand)


def test_f1_only_with_two_classes() -> None:
    assert "f1" not in score_classes([0, 1, 2], [0, 1, 2], 3)


@pytest.mark.parametrize("seen", [[0, 0, 0], [1, 1, 1]])
def test_constant_answers_score_zero_without_a_warning(seen: list[int]) -> None:
    scores = score_classes([0, 1, 1], seen, 2)
    assert scores["matthews"] == 0
    assert scores["accuracy"] == pytest.approx(
        sum(s == t for s, t in zip(seen, [0, 1, 1], strict=True)) / 3
    )


def test_a_dev_part_of_one_class() -> None:
    assert score_classes([0, 0], [0, 0], 2) == {
        "accuracy": 1.0,
        "macro_f1": 1.0,
        "matthews": 0.0,
        "f1": 0.0,
    }


def test_label_sets_by_hand() -> None:
    scores = score_label_sets([[1, 0], [1, 1], [0, 0]], [[1, 0], [0, 1], [0, 1]])
    # 3 labels are true, 3 are seen, 2 of them right
    assert scores["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert scores["macro_f1"] == pytest.approx((2 * 1 / (2 + 1) + 2 * 1 / (1 + 2)) / 2)
    assert scores["exact_match"] == pytest.approx(1 / 3)


def test_no_label_anywhere() -> None:
    scores = score_label_sets([[0, 0]], [[0, 0]])
    assert scores == {"micro_f1": 0.0, "macro_f1": 0.0, "exact_match": 1.0}


def test_numbers_equal_scipy() -> None:
    draw = np.random.default_rng(0)
    a = np.round(draw.normal(size=50), 1)  # with ties
    b = a + draw.normal(size=50)
    scores = score_numbers(a.tolist(), b.tolist())
    ranks_a, ranks_b = scipy.stats.rankdata(a), scipy.stats.rankdata(b)
    assert scores["spearman"] == pytest.approx(np.corrcoef(ranks_a, ranks_b)[0, 1])
    assert scores["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert scores["rmse"] == pytest.approx(math.sqrt(((a - b) ** 2).mean()))


@pytest.mark.parametrize("seen", [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
def test_constant_numbers_correlate_with_nothing(seen: list[float]) -> None:
    scores = score_numbers([1.0, 2.0, 3.0], seen)
    assert (scores["spearman"], scores["pearson"]) == (0, 0)
    assert scores["rmse"] > 0
    assert score_numbers([1.0], [2.0]) == {"spearman": 0, "pearson": 0, "rmse": 1}


def test_numbers_that_hardly_differ_give_no_warning() -> None:
    assert math.isfinite(score_numbers([1.0, 2.0, 3.0], [1 + 1e-14, 1.0, 1.0])["spearman"])


def test_spans_count_only_whole() -> None:
    truth = [["B-a", "I-a", "O", "B-b"], ["O", "B-a"]]
    seen = [["B-a", "O", "O", "B-b"], ["B-b", "B-a"]]
    scores = score_tags(truth, seen)
    # true spans 3; seen 4; right: b of the first row and a of the second
    assert scores["precision"] == pytest.approx(2 / 4)
    assert scores["recall"] == pytest.approx(2 / 3)
    assert scores["f1"] == pytest.approx(2 * 2 / (4 + 3))
    assert scores["accuracy"] == pytest.approx(4 / 6)


def test_a_span_of_another_type_or_cut_in_two_is_wrong() -> None:
    assert score_tags([["B-a"]], [["B-b"]])["f1"] == 0
    assert score_tags([["B-a", "I-a"]], [["B-a", "B-a"]])["f1"] == 0


@pytest.mark.parametrize(
    ("truth", "seen", "accuracy"),
    [([["O", "O"]], [["O", "O"]], 1.0), ([["B-a"]], [["O"]], 0.0), ([["O"]], [["B-a"]], 0.0)],
)
def test_no_spans(truth: list[list[str]], seen: list[list[str]], accuracy: float) -> None:
    scores = score_tags(truth, seen)
    assert scores == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": accuracy}
