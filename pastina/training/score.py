"""Metrics of a model on labelled rows, during training and after."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pastina.answers import best_tags, word_logits
from pastina.data.encode import Example
from pastina.data.rows import Row
from pastina.engine import Engine
from pastina.engine.batching import example_logits
from pastina.errors import PastinaError
from pastina.kinds import Kind
from pastina.training.metrics import score_classes, score_label_sets, score_numbers, score_tags


class NotFinite(PastinaError):
    """Some answer is not a number."""


class Scorer:
    """Rows and their examples, ready to be scored after each epoch.

    target_scale: mean and standard deviation in which a regression's head answers.
    """

    def __init__(
        self,
        kind: Kind,
        labels: Sequence[str],
        rows: Sequence[Row],
        examples: Sequence[Example],
        *,
        pad_id: int,
        target_scale: tuple[float, float],
    ) -> None:
        self.kind, self.labels, self.rows, self.examples = kind, labels, rows, examples
        self.pad_id, self.target_scale = pad_id, target_scale

    def score(
        self,
        engine: Engine,
        device: torch.device | str,
        accelerator: Any = None,
        away: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> dict[str, float]:
        """The metrics of the kind; several processes share the work and all get the result.

        away: entered while the engine works.

        Raises:
            NotFinite: what a text gets is not a number.
        """
        rank, world = (
            (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        )
        mine = list(range(rank, len(self.examples), world))
        with away():
            logits = example_logits(engine, [self.examples[i] for i in mine], self.pad_id, device)
        found = list(zip(mine, logits, strict=True))
        if world > 1:
            from accelerate.utils import gather_object

            found = sorted(gather_object(found), key=lambda pair: pair[0])
        logits = [one for _, one in found]
        # of answers that are no numbers the best would be one by chance
        if bad := sum(not one.isfinite().all() for one in logits):
            raise NotFinite(
                f"{bad} of {len(logits)} answers are not finite numbers. Train again with a lower "
                "fit.lr or fit.head_lr."
            )
        return self._metrics(logits)

    def _metrics(self, logits: Sequence[torch.Tensor]) -> dict[str, float]:
        if self.kind.name == "tag":
            return self._tag_metrics(logits)
        stacked_NC = torch.cat(list(logits))
        truth: list[Any] = [example.target for example in self.examples]
        if self.kind.name == "classify":
            return score_classes(truth, stacked_NC.argmax(-1).tolist(), len(self.labels))
        if self.kind.name == "multilabel":
            return score_label_sets(truth, (stacked_NC >= 0).int().tolist())
        mean, deviation = self.target_scale
        seen = (stacked_NC[:, 0].double() * deviation + mean).tolist()
        return score_numbers([_number(row) for row in self.rows], seen)

    def _tag_metrics(self, logits: Sequence[torch.Tensor]) -> dict[str, float]:
        per_row = word_logits(self.rows, self.examples, logits)
        seen = [best_tags(row_logits, self.labels)[0] for row_logits in per_row]
        return score_tags([list(row.tags or ()) for row in self.rows], seen)


def _number(row: Row) -> float:
    assert isinstance(row.label, float)
    return row.label
