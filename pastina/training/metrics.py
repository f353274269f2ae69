"""How good answers are: scikit-learn for classes and numbers, seqeval (strict, IOB2) for tags."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pastina.errors import need


def score_classes(truth: Sequence[int], seen: Sequence[int], num_labels: int) -> dict[str, float]:
    """accuracy, macro_f1, matthews and, with two classes, f1 of the second one."""
    metrics = _sklearn()
    scores = {
        "accuracy": metrics.accuracy_score(truth, seen),
        "macro_f1": metrics.f1_score(truth, seen, average="macro", zero_division=0),
        "matthews": metrics.matthews_corrcoef(truth, seen),
    }
    if num_labels == 2:
        scores["f1"] = metrics.f1_score(truth, seen, pos_label=1, zero_division=0)
    return _floats(scores)


def score_label_sets(
    truth: Sequence[Sequence[int]], seen: Sequence[Sequence[int]]
) -> dict[str, float]:
    """micro_f1, macro_f1, exact_match of multi-hot rows."""
    metrics = _sklearn()
    return _floats(
        {
            "micro_f1": metrics.f1_score(truth, seen, average="micro", zero_division=0),
            "macro_f1": metrics.f1_score(truth, seen, average="macro", zero_division=0),
            "exact_match": metrics.accuracy_score(np.asarray(truth), np.asarray(seen)),
        }
    )


def score_numbers(truth: Sequence[float], seen: Sequence[float]) -> dict[str, float]:
    """spearman, pearson (0 where one side is constant) and rmse."""
    stats = need("scipy.stats", "train")
    a, b = np.asarray(truth, dtype=float), np.asarray(seen, dtype=float)
    is_constant = len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0
    return _floats(
        {
            "spearman": 0.0 if is_constant else stats.spearmanr(a, b).statistic,
            "pearson": 0.0 if is_constant else stats.pearsonr(a, b).statistic,
            "rmse": math.sqrt(float(np.mean((a - b) ** 2))),
        }
    )


def score_tags(truth: Sequence[Sequence[str]], seen: Sequence[Sequence[str]]) -> dict[str, float]:
    """f1, precision, recall over spans (strict: both ends and the type) and accuracy over words."""
    need("seqeval", "train")
    from seqeval.metrics import accuracy_score
    from seqeval.metrics.v1 import precision_recall_fscore_support
    from seqeval.scheme import IOB2

    if not any(tag != "O" for tags in (*truth, *seen) for tag in tags):
        precision = recall = f1 = 0.0  # no span on either side; seqeval cannot score nothing
    else:
        precision, recall, f1, _ = precision_recall_fscore_support(
            truth, seen, scheme=IOB2, average="micro", zero_division=0
        )
    accuracy = accuracy_score(truth, seen)
    return _floats({"f1": f1, "precision": precision, "recall": recall, "accuracy": accuracy})


def _sklearn() -> Any:
    return need("sklearn.metrics", "train")


def _floats(scores: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items()}
