"""Many tasks on one backbone that answer together."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from pastina.adapter import adapter_folder
from pastina.answering import Text, answers, as_row, checked_row
from pastina.answers import Prediction
from pastina.backbones import load_backbone
from pastina.bank import Bank, Task
from pastina.data.encode import Example, encode
from pastina.data.rows import Row
from pastina.engine.affine import Precision
from pastina.engine.batching import check_slots
from pastina.engine.mixed import MixedEngine
from pastina.errors import DataError
from pastina.recipe import BackboneSpec, check_precision


class Tasks:
    """A backbone with any number of tasks, which answer in any mix.

    backbone: name or folder. precision: of the products with frozen weights; auto: bf16
    where the device is fast in it, else fp32. device: None: a GPU where there is one.

    Raises:
        BackboneError: the backbone cannot be found.
        RecipeError: no such precision; int8 on a GPU.
    """

    def __init__(
        self,
        backbone: str | BackboneSpec = BackboneSpec(),  # noqa: B008  # frozen
        *,
        precision: Precision | Literal["auto"] = "auto",
        device: str | None = None,
    ) -> None:
        check_precision(precision)
        spec = BackboneSpec(name=backbone) if isinstance(backbone, str) else backbone
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.bank = Bank(load_backbone(spec, keep_pooler=True), device)
        self.engine = MixedEngine(self.bank, precision)

    def __len__(self) -> int:
        return len(self.bank)

    def __contains__(self, name: object) -> bool:
        return name in self.bank

    def __iter__(self) -> Iterator[Task]:
        return iter(self.bank)

    def add(self, folder: str | Path, name: str | None = None) -> Task:
        """Read an adapter (or that of a run); a task of the same name is replaced.

        name: None: the one in the adapter's card.

        Raises:
            AdapterError: broken, of another backbone, or of a method that changes the backbone.
        """
        return self.bank.add(adapter_folder(folder), name)

    def remove(self, name: str) -> None:
        """Forget a task.

        Raises:
            DataError: there is no such task.
        """
        self.bank.remove(name)

    def predict(self, requests: Iterable[tuple[str, Text]]) -> list[Prediction]:
        """One answer for each (name of a task, text or pair of texts), in order.

        Raises:
            DataError: no such task; a text that its task cannot read (see `Predictor.predict`).
        """
        tasks: list[Task] = []
        rows: list[Row] = []
        for i, request in enumerate(requests):
            match request:
                case (str() as name, text):
                    tasks.append(self.bank[name])
                    rows.append(checked_row(as_row(text, f"request {i + 1}"), tasks[-1]))
                case _:
                    raise DataError(f"request {i + 1}: {request!r} is not (task, text).")
        return self.answer(tasks, rows)

    def answer(self, tasks: Sequence[Task], rows: Sequence[Row]) -> list[Prediction]:
        """One answer for each checked row by the task at its place."""
        examples = self.encode(tasks, rows)
        for task, row, own in zip(tasks, rows, examples, strict=True):
            check_room(task, row, own)
        flat = [(i, example) for i, own in enumerate(examples) for example in own]
        logits = self.engine.logits([e for _, e in flat], [tasks[i] for i, _ in flat])
        logits_of: list[list[torch.Tensor]] = [[] for _ in rows]
        for (i, _), own in zip(flat, logits, strict=True):
            logits_of[i].append(own)
        return [
            answers(task, [row], own, found)[0]
            for task, row, own, found in zip(tasks, rows, examples, logits_of, strict=True)
        ]

    def encode(self, tasks: Sequence[Task], rows: Sequence[Row]) -> list[list[Example]]:
        """The examples of each row; all rows that are read alike go through the tokenizer at once."""
        alike: dict[tuple[bool, int, int, int], list[int]] = {}
        for i, task in enumerate(tasks):
            extra = 0 if task.plan is None else task.plan.extra_tokens
            alike.setdefault((task.kind == "tag", task.max_length, task.stride, extra), []).append(
                i
            )
        found: list[list[Example]] = [[] for _ in rows]
        for (_, max_length, stride, extra), places in alike.items():
            first = tasks[places[0]]
            for example in encode(
                [rows[i] for i in places],
                self.bank.backbone.tokenizer,
                first.kind,
                first.labels,
                max_length=max_length,
                stride=stride,
                extra_tokens=extra,
            ):
                found[places[example.row]].append(replace(example, row=0))
        return found


def check_room(task: Task, row: Row, examples: Sequence[Example]) -> None:
    """Nothing, if the task has a slot for each special token of the row.

    Raises:
        DataError: the text holds more special tokens than there are slots.
    """
    if task.plan is not None:
        rule = task.plan.rule
        check_slots(examples, [row], rule.special_token_ids, rule.num_slots)
