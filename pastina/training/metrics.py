"""How good answers are: scikit-learn for classes and numbers, seqeval (strict, IOB2) for tags."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from pastina.errors import need


def score_classes(truth: Sequence[int], seen: Sequence[int], num_labels: int) -> dict[str, float]:
    """accuracy, macro_f1, matthews and, with two classes, f1 of the second one."""
    metrics = _sklearn()
    is_constant = len({*truth, *seen}) < 2  # scikit-learn warns instead of answering 0
    scores = {
        "accuracy": metrics.accuracy_score(truth, seen),
        "macro_f1": metrics.f1_score(truth, seen, average="macro", zero_division=0),
        "matthews": 0.0 if is_constant else metrics.matthews_corrcoef(truth, seen),
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
    rmse = math.sqrt(float(np.mean((a - b) ** 2)))
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"spearman": 0.0, "pearson": 0.0, "rmse": rmse}
    with warnings.catch_warnings():  # of answers that hardly differ, as after few steps
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        spearman, pearson = stats.spearmanr(a, b).statistic, stats.pearsonr(a, b).statistic
    return _floats({"spearman": spearman, "pearson": pearson, "rmse": rmse})


def score_tags(truth: Sequence[Sequence[str]], seen: Sequence[Sequence[str]]) -> dict[str, float]:
    """f1, precision, recall over spans (strict: both ends and the type) and accuracy over words."""
    metrics, strict = need("seqeval.metrics", "train"), need("seqeval.metrics.v1", "train")
    scheme = need("seqeval.scheme", "train").IOB2

    if not any(tag != "O" for tags in (*truth, *seen) for tag in tags):
        precision = recall = f1 = 0.0  # no span on either side; seqeval cannot score nothing
    else:
        precision, recall, f1, _ = strict.precision_recall_fscore_support(
            truth, seen, scheme=scheme, average="micro", zero_division=0
        )
    accuracy = metrics.accuracy_score(truth, seen)
    return _floats({"f1": f1, "precision": precision, "recall": recall, "accuracy": accuracy})


def _sklearn() -> Any:
    return need("sklearn.metrics", "train")


def _floats(scores: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items()}
