"""Answers of many tasks in one call of the kernels, from token ids to logits: what a server needs most.

It knows less than the way through tensors (`MixedEngine`), which takes whatever is refused here.

Shape letters: N items, C outputs.
"""

import ctypes
from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pastina.bank import Bank, Task, VectorPlan
from pastina.data.encode import Example
from pastina.engine import native
from pastina.engine.encoder import Encoder
from pastina.engine.passing import Told, are_short
from pastina.slots import SlotOverflow

_POOLINGS = {"cls": 0, "mean": 1, "tokens": 2}  # as the kernels number them
_CPU = torch.device("cpu")
_MOST_PLANS = 1024  # that are remembered


class Asking:
    """A bank's tasks on one encoder."""

    def __init__(self, bank: Bank, encoder: Encoder) -> None:
        self.bank, self.encoder = bank, encoder
        layers = encoder.layers(_CPU)
        self._embeddings = encoder.embeddings(_CPU)
        self._told = None if self._embeddings is None else Told(layers, one_each=True)
        self._known: dict[int, _ToldPlan] = {}

    def split(
        self, examples: Sequence[Example], tasks: Sequence[Task], batch: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Of the places in `batch` those that `logits` can answer, and the others."""
        embeddings = self._embeddings
        if embeddings is None:
            return [], list(batch)
        own = [i for i in batch if _knows(tasks[i])]
        lengths = [len(examples[i].input_ids) for i in own] or [0]
        longest = max(lengths)
        if not own or longest > embeddings.num_positions or not are_short(longest, sum(lengths)):
            return [], list(batch)
        known = set(own)
        return own, [i for i in batch if i not in known]

    def logits(self, examples: Sequence[Example], tasks: Sequence[Task]) -> list[Tensor]:
        """For each example, as `split` allows, the logits of its items, (N, C) in fp32.

        Raises:
            SlotOverflow: a row holds more special tokens than its task has slots.
        """
        told, embeddings = self._told, self._embeddings
        assert told is not None
        assert embeddings is not None
        ids = [token for example in examples for token in example.input_ids]
        types = None
        if examples[0].token_type_ids is not None:
            types = [kind for example in examples for kind in example.token_type_ids or ()]
        embeddings.check(ids, types)
        lengths = [len(example.input_ids) for example in examples]
        starts = _starts(lengths)
        items = [example.word_tokens or () for example in examples]
        firsts = zip(starts, items, strict=False)
        outputs = [task.head.num_rows for task in tasks]
        sizes = [
            n * (1 if example.word_tokens is None else len(example.word_tokens))
            for n, example in zip(outputs, examples, strict=True)
        ]
        plans, numbers = self._plans(tasks)
        told_plans = (native.Plan * len(plans))(*(plan.told for plan in plans))
        rows = _Rows()
        vectors, heads = self.bank.vectors.numbers, self.bank.heads.numbers
        hidden = torch.empty(len(ids), heads.shape[1] - 1)
        logits = torch.empty(sum(sizes))
        about = native.Ask(
            passing=told.about(
                start=rows.of(starts),
                length=rows.of(lengths),
                num_rows=len(examples),
                hidden=hidden.data_ptr(),
            ),
            embedding=embeddings.told,
            ids=rows.of(ids),
            types=None if types is None else rows.of(types),
            plans=ctypes.addressof(told_plans),
            table=vectors.data_ptr(),
            plan=rows.of(numbers),
            first_vector=rows.of([0 if t.vectors is None else t.vectors.start for t in tasks]),
            pooling=rows.of([_POOLINGS[task.pooling] for task in tasks]),
            item_start=rows.of(_starts([len(own) for own in items])),
            items=rows.of([first + i for first, own in firsts for i in own]),
            heads=heads.data_ptr(),
            head_start=rows.of([task.head.start for task in tasks]),
            head_outputs=rows.of(outputs),
            out_start=rows.of(_starts(sizes)),
            logits=logits.data_ptr(),
        )
        library = native.kernels()
        assert library is not None
        row = library.pastina_ask(ctypes.byref(about), torch.get_num_threads())
        if row >= 0:
            raise _overflow(row, examples[row], tasks[row])
        parts = logits.split(sizes)
        return [part.view(-1, n) for part, n in zip(parts, outputs, strict=True)]

    def _plans(self, tasks: Sequence[Task]) -> tuple[list["_ToldPlan"], list[int]]:
        """The plans of these tasks, and the number of each task's own; -1: it has none."""
        numbers: dict[int, int] = {}
        found: list[_ToldPlan] = []
        for task in tasks:
            if task.plan is not None and id(task.plan) not in numbers:
                numbers[id(task.plan)] = len(found)
                found.append(self._told_plan(task.plan))
        return found, [-1 if t.plan is None else numbers[id(t.plan)] for t in tasks]

    def _told_plan(self, plan: VectorPlan) -> "_ToldPlan":
        known = self._known.get(id(plan))
        if known is None or known.plan is not plan:
            if len(self._known) >= _MOST_PLANS:
                self._known = {}
            assert self._told is not None
            known = self._known[id(plan)] = _ToldPlan(plan, self._told.num_layers)
        return known


class _Rows:
    """Whole numbers for the kernels, kept as long as this is."""

    def __init__(self) -> None:
        self._kept: list[array[int]] = []

    def of(self, numbers: Sequence[int]) -> int:
        """Where they are."""
        self._kept.append(array("q", numbers))
        return self._kept[-1].buffer_info()[0]


class _ToldPlan:
    """What the kernels are told of a plan; keeps what it points to."""

    def __init__(self, plan: VectorPlan, num_layers: int) -> None:
        self.plan, self._rows = plan, _Rows()
        rule = plan.rule
        place_of_layer = [-1] * num_layers
        for place, layer in enumerate(plan.layers):
            place_of_layer[layer] = place
        column = None
        if any(own.chosen is not None for own in plan.rules):
            chosen = [own.chosen or tuple(range(own.num_slots)) for own in plan.rules]
            table = [
                [own.index(s) if s in own else -1 for s in range(rule.num_slots)] for own in chosen
            ]
            column = self._rows.of([number for own in table for number in own])
        self.told = native.Plan(
            special=self._rows.of(rule.special_token_ids),
            num_special=len(rule.special_token_ids),
            num_slots=rule.num_slots,
            num_vectors=plan.num_vectors,
            rank=plan.rank,
            by_token=rule.by_token,
            is_shared=rule.is_shared,
            everywhere=rule.everywhere,
            place_of_layer=self._rows.of(place_of_layer),
            column=column,
        )


def _overflow(row: int, example: Example, task: Task) -> SlotOverflow:
    assert task.plan is not None
    rule = task.plan.rule
    count = sum(token in rule.special_token_ids for token in example.input_ids)
    return SlotOverflow(row, count, rule.num_slots)


def _knows(task: Task) -> bool:
    plan = task.plan
    is_known = plan is None or (plan.rule.positions == "special" and not plan.bias_layers)
    return is_known and task.pooling in _POOLINGS


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each of these stretches begins, and where the last one ends."""
    return [0, *accumulate(sizes)]
