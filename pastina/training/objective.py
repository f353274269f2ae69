"""What a run makes smaller: the loss of its kind, with what a recipe adds to it.

Shape letters: N items (rows, or words of a tagger), C outputs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pastina.errors import RecipeError
from pastina.kinds import Kind
from pastina.recipe import FitSpec


class Objective:
    """The loss of each item.

    weights_C: see `Kind.loss`. With fit.consistency a batch holds its rows twice: under two dropout
    masks they shall get the same answer (R-Drop, arXiv 2106.14448). With a teacher the answer shall be
    near the teacher's as well (arXiv 1503.02531).

    Raises:
        RecipeError: fit.label_smoothing for a kind without classes.
    """

    def __init__(self, kind: Kind, fit: FitSpec, weights_C: Tensor | None) -> None:
        self.kind, self.fit, self.weights_C = kind, fit, weights_C
        if fit.label_smoothing and kind.name not in ("classify", "tag"):
            raise RecipeError(
                f"fit.label_smoothing means nothing for {kind.name}, where an item has no one class. "
                "Leave it out."
            )
        self._divergence = DIVERGENCES[kind.name]

    @property
    def copies(self) -> int:
        """How often a batch holds each of its rows."""
        return 2 if self.fit.consistency else 1

    def losses(self, logits_NC: Tensor, targets: Tensor, teacher_NC: Tensor | None) -> Tensor:
        """The loss of each item, (N,). logits_NC, targets: `copies` times the items, one after the
        other; teacher_NC: of each item once."""
        losses_N = self._supervised(logits_NC, targets)
        if teacher_NC is not None:
            weight, heat = self.fit.teacher_weight, self.fit.teacher_temperature
            wanted_NC = teacher_NC.repeat(self.copies, 1)
            taught_N = self._divergence(wanted_NC, logits_NC, heat)
            losses_N = (1 - weight) * losses_N + weight * taught_N
        if self.copies == 1:
            return losses_N
        one_NC, other_NC = logits_NC.chunk(2)
        apart_N = self._divergence(one_NC, other_NC, 1.0) + self._divergence(other_NC, one_NC, 1.0)
        return sum(losses_N.chunk(2)) / 2 + self.fit.consistency * apart_N / 2

    def _supervised(self, logits_NC: Tensor, targets: Tensor) -> Tensor:
        if not self.fit.label_smoothing:
            return self.kind.loss(logits_NC, targets, self.weights_C)
        losses_N = F.cross_entropy(
            logits_NC, targets, reduction="none", label_smoothing=self.fit.label_smoothing
        )
        return losses_N if self.weights_C is None else losses_N * self.weights_C[targets]


def _of_classes(wanted_NC: Tensor, logits_NC: Tensor, heat: float) -> Tensor:
    """heat^2 * KL(softmax(wanted / heat), softmax(logits / heat))."""
    wanted, own = ((x / heat).log_softmax(-1) for x in (wanted_NC, logits_NC))
    return F.kl_div(own, wanted, reduction="none", log_target=True).sum(-1) * heat**2


def _of_label_sets(wanted_NC: Tensor, logits_NC: Tensor, heat: float) -> Tensor:
    """The same of each label by itself, and the mean over labels."""
    wanted, own = (torch.stack([x, -x], -1) / heat for x in (wanted_NC, logits_NC))
    wanted, own = F.logsigmoid(wanted), F.logsigmoid(own)
    apart_NC = F.kl_div(own, wanted, reduction="none", log_target=True).sum(-1)
    return apart_NC.mean(-1) * heat**2


def _of_numbers(wanted_NC: Tensor, logits_NC: Tensor, heat: float) -> Tensor:
    """The squared difference, in units of the training targets' deviation."""
    return ((wanted_NC - logits_NC) ** 2).mean(-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "classify": _of_classes,
    "tag": _of_classes,
    "multilabel": _of_label_sets,
    "regress": _of_numbers,
}
