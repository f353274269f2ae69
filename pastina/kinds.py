"""The kinds of tasks, as data: outputs, loss, decoding, metrics' names.

Shape letters: N items (rows, or words of a tagger), C outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from pastina.data.encode import bio_tags
from pastina.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Kind:
    """What a task of this kind looks like to the training loop.

    task_type: PEFT's name. outputs(labels): the names of the head's outputs.
    loss(logits_NC, targets, weights_C): the loss of each item, shape (N,).
    metrics: names, the first one picks the best epoch unless the recipe names another.
    """

    name: str
    task_type: str
    outputs: Callable[[Sequence[str]], tuple[str, ...]]
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    metrics: tuple[str, ...]


def _cross_entropy(
    logits_NC: torch.Tensor, targets_N: torch.Tensor, weights_C: torch.Tensor | None
) -> torch.Tensor:
    losses_N = F.cross_entropy(logits_NC, targets_N, reduction="none")
    return losses_N if weights_C is None else losses_N * weights_C[targets_N]


def _binary_cross_entropy(
    logits_NC: torch.Tensor, targets_NC: torch.Tensor, weights_C: torch.Tensor | None
) -> torch.Tensor:
    losses_NC = F.binary_cross_entropy_with_logits(
        logits_NC, targets_NC, reduction="none", pos_weight=weights_C
    )
    return losses_NC.mean(1)


def _squared_error(
    logits_NC: torch.Tensor, targets_N: torch.Tensor, weights_C: torch.Tensor | None
) -> torch.Tensor:
    return (logits_NC[:, 0] - targets_N) ** 2


KINDS: dict[str, Kind] = {
    "classify": Kind(
        "classify",
        "SEQ_CLS",
        lambda labels: tuple(labels),
        _cross_entropy,
        ("accuracy", "macro_f1", "matthews", "f1"),
    ),
    "multilabel": Kind(
        "multilabel",
        "SEQ_CLS",
        lambda labels: tuple(labels),
        _binary_cross_entropy,
        ("micro_f1", "macro_f1", "exact_match"),
    ),
    "regress": Kind(
        "regress",
        "SEQ_CLS",
        lambda labels: ("value",),
        _squared_error,
        ("spearman", "pearson", "rmse"),
    ),
    "tag": Kind(
        "tag",
        "TOKEN_CLS",
        lambda labels: tuple(bio_tags(labels)),
        _cross_entropy,
        ("f1", "precision", "recall", "accuracy"),
    ),
}
LOWER_IS_BETTER = ("rmse",)


def main_metric(kind: Kind, wanted: str | None, labels: Sequence[str]) -> str:
    """The metric that picks the best epoch.

    Raises:
        RecipeError: the kind does not have it; f1 of a classifier needs two classes.
    """
    if wanted is None:
        return kind.metrics[0]
    if wanted not in kind.metrics:
        raise RecipeError(
            f"fit.metric = {wanted!r} is not a metric of {kind.name}; known: {', '.join(kind.metrics)}."
        )
    if kind.name == "classify" and wanted == "f1" and len(labels) != 2:
        raise RecipeError(
            f"fit.metric = 'f1' needs two classes, the data has {len(labels)}. Take macro_f1."
        )
    return wanted


def class_weights(
    kind: Kind,
    labels: Sequence[str],
    wanted: str | Mapping[str, float] | None,
    counts: Mapping[str, int],
    num_items: int,
) -> torch.Tensor | None:
    """One weight per output, shape (C,), or None.

    "balanced": num_items / (C * count) for classes and tags, negatives / positives for multilabel.
    A table names labels (for a tagger: span types, and "O"); the others weigh 1.

    Raises:
        RecipeError: the kind has no classes; a label that the data does not have.
    """
    if wanted is None:
        return None
    outputs = kind.outputs(labels)
    if kind.name == "regress":
        raise RecipeError("fit.class_weights means nothing for regress. Remove it.")
    if isinstance(wanted, Mapping):
        known = {*labels, "O"} if kind.name == "tag" else set(labels)
        if unknown := sorted(set(wanted) - known):
            raise RecipeError(
                f"fit.class_weights names {unknown[0]!r}, which is not a label of the data: "
                f"{', '.join(sorted(known))}."
            )
        return torch.tensor([wanted.get(_label_of(kind, output), 1.0) for output in outputs])
    seen = [max(counts.get(output, 0), 1) for output in outputs]
    if kind.name == "multilabel":
        return torch.tensor([(num_items - count) / count for count in seen])
    return torch.tensor([num_items / (len(outputs) * count) for count in seen])


def _label_of(kind: Kind, output: str) -> str:
    return output.split("-", 1)[-1] if kind.name == "tag" else output
