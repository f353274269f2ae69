"""A batch in which each row has its own task.

Shape letters: B rows, S slots, R tokens that a vector is added to, N items, C outputs.
"""

import logging
import threading
from collections.abc import Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pastina.bank import Bank, Task, split_by_plan
from pastina.data.encode import Example
from pastina.engine import native
from pastina.engine.addition import Addition, Product, Shift, joined
from pastina.engine.affine import Precision, choose_precision
from pastina.engine.asking import Asking
from pastina.engine.batching import budget_batches, collate, count_items
from pastina.engine.encoder import Encoder, spots
from pastina.engine.families import why_not_frozen, why_not_shifted
from pastina.engine.fused import FusedLayer
from pastina.engine.hooked import HookedEncoder
from pastina.engine.packed import Joint
from pastina.methods.placement import Frame
from pastina.methods.rules import SlotRule

logger = logging.getLogger("pastina")


class _Way(NamedTuple):
    """Through the lowest layers of the backbone. asking: where the kernels can take texts whole. biased:
    for tasks with biases of their own."""

    encoder: Encoder | HookedEncoder
    asking: Asking | None
    biased: Encoder | HookedEncoder


class MixedEngine:
    """Answers any mix of a bank's tasks; what a row gets does not depend on the others."""

    def __init__(self, bank: Bank, precision: Precision | Literal["auto"] = "auto") -> None:
        self.bank = bank
        self.device = bank.vectors.numbers.device
        precision = choose_precision(precision, self.device)
        backbone = bank.backbone.model.to(self.device)
        if reason := why_not_frozen(backbone):
            logger.info("The reference engine is used: %s.", reason)
            self.encoder: Encoder | HookedEncoder = HookedEncoder(backbone, precision)
        else:
            self.encoder = Encoder(backbone, precision)
        self._ways = {bank.layers.num_layers: self._way(self.encoder)}
        self._lock = threading.Lock()

    @property
    def kernels(self) -> str:
        """Whether the kernels for AVX-512 run the frozen layers, in words."""
        layers = self.encoder.layers(self.device) if isinstance(self.encoder, Encoder) else []
        if any(isinstance(layer, FusedLayer) for layer in layers):
            return "used"
        reason = native.why_not() if self.device.type == "cpu" else None
        reason = reason or "this backbone, precision or device does without them"
        return f"not used: {reason}"

    @torch.inference_mode()
    def logits(
        self, examples: Sequence[Example], tasks: Sequence[Task], max_tokens: int = 4096
    ) -> list[Tensor]:
        """For each example the logits of its items, (N, C) in fp32 on the CPU.

        max_tokens: of a batch, padding included; a longer example stands alone.
        """
        found: list[Tensor | None] = [None] * len(examples)
        for batch in budget_batches([len(e.input_ids) for e in examples], max_tokens):
            for num_layers in {tasks[i].num_layers for i in batch}:
                own = [i for i in batch if tasks[i].num_layers == num_layers]
                way = self._way_of(num_layers)
                for i, part in zip(*self._answered(way, examples, tasks, own), strict=True):
                    found[i] = part
        return [part for part in found if part is not None]

    def _way(self, encoder: Encoder | HookedEncoder) -> _Way:
        asking, biased = None, encoder
        if self.device.type == "cpu" and isinstance(encoder, Encoder):
            asking = Asking(self.bank, encoder)
        if isinstance(encoder, Encoder) and why_not_shifted(encoder.backbone):
            precision = encoder.precision
            biased = HookedEncoder(encoder.backbone, "fp32" if precision == "int8" else precision)
        return _Way(encoder, asking, biased)

    def _way_of(self, num_layers: int) -> _Way:
        """Through so many layers; made when it is first asked for, with the weights that are there."""
        with self._lock:
            if num_layers not in self._ways:
                self._ways[num_layers] = self._way(self.encoder.lower(num_layers))
            return self._ways[num_layers]

    def _answered(
        self, way: _Way, examples: Sequence[Example], tasks: Sequence[Task], batch: list[int]
    ) -> tuple[list[int], list[Tensor]]:
        """The places of a batch in another order, and the logits of each."""
        own: list[int] = []
        if way.asking is not None:
            own, batch = way.asking.split(examples, tasks, batch)
        logits = []
        if own and way.asking is not None:
            logits = way.asking.logits([examples[i] for i in own], [tasks[i] for i in own])
        # those with biases of their own apart: they take another way through the layers
        for has_biases in (False, True):
            part = [i for i in batch if _has_biases(tasks[i]) is has_biases]
            if part:
                # those that are read alike and those of one task stand together
                part.sort(key=lambda i: (tasks[i].pooling, tasks[i].head.start))
                encoder = way.biased if has_biases else way.encoder
                logits += self._batch(encoder, examples, tasks, part)
                own += part
        return own, logits

    def _batch(
        self,
        encoder: Encoder | HookedEncoder,
        examples: Sequence[Example],
        tasks: Sequence[Task],
        batch: Sequence[int],
    ) -> list[Tensor]:
        pad_id = self.bank.backbone.tokenizer.pad_token_id
        groups = [list(own) for _, own in groupby(batch, key=lambda i: tasks[i].pooling)]
        batches = [
            collate([examples[i] for i in own], pad_id, with_targets=False).to(self.device)
            for own in groups
        ]
        joint = Joint(encoder, batches)
        additions = self._additions(joint, [tasks[i] for i in batch])
        poolings = [tasks[own[0]].pooling for own in groups]
        logits: list[Tensor] = []
        for own, states in zip(groups, joint.states([additions], poolings), strict=True):
            counts = [count_items(examples[i]) for i in own]
            logits += self._heads(states, [tasks[i] for i in own], counts)
        return logits

    def _heads(
        self, states_NH: Tensor, tasks: Sequence[Task], counts: Sequence[int]
    ) -> list[Tensor]:
        """Each task's head on its own states; `counts` of them belong to each row."""
        found: list[Tensor] = []
        first_row = first = 0
        for _, run in groupby(tasks, key=lambda task: task.head.start):
            own = list(run)
            sizes = counts[first_row : first_row + len(own)]
            head = own[0].head.read()
            states = states_NH[first : first + sum(sizes)]
            found += F.linear(states, head[:, :-1], head[:, -1]).cpu().split(sizes)
            first_row, first = first_row + len(own), first + sum(sizes)
        return found

    def _additions(self, joint: Joint, tasks: Sequence[Task]) -> dict[int, Addition]:
        """What each layer adds, for the rows of all tasks."""
        parts: dict[int, list[Addition]] = {}
        for plan, rows in split_by_plan(tasks):
            starts = [rows_of.start for i in rows if (rows_of := tasks[i].vectors) is not None]
            found = {rule: self._rows(joint, rule, rows, starts) for rule in set(plan.rules)}
            is_whole = plan.rank or plan.bias_layers
            tokens_of = self._tokens(joint, rows, starts) if is_whole else {}
            numbers = self.bank.vectors.numbers
            for k, layer in enumerate(plan.layers):
                tokens_R, row_R = found[plan.rules[k]]
                above = k * plan.num_rows
                products = []
                for start, tokens_N in tokens_of.items() if plan.rank else ():
                    first = start + above + plan.num_vectors
                    down_KH, up_KH = numbers[first : first + 2 * plan.rank].chunk(2)
                    products.append(Product(tokens_N, down_KH.T, up_KH))
                delta_RH = numbers.index_select(0, row_R + above)
                shifts = [
                    Shift(tokens_N, plan.biases(numbers, start, layer))
                    for start, tokens_N in tokens_of.items()
                    if layer in plan.bias_layers
                ]
                own = Addition(tokens_R, delta_RH, None, tuple(products), tuple(shifts))
                parts.setdefault(layer, []).append(own)
        return {layer: joined(own) for layer, own in sorted(parts.items())}

    def _tokens(
        self, joint: Joint, rows: Sequence[int], starts: Sequence[int]
    ) -> dict[int, Tensor]:
        """The packed tokens of each task, by where its rows of the table start."""
        place_BT = joint.packed.place_BT.view(joint.is_real_BT.shape)
        of_task: dict[int, list[int]] = {}
        for row, start in zip(rows, starts, strict=True):
            of_task.setdefault(start, []).append(row)
        places = {start: place_BT[own].flatten() for start, own in of_task.items()}
        return {start: place[place >= 0] for start, place in places.items()}

    def _rows(
        self, joint: Joint, rule: SlotRule, rows: Sequence[int], starts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The packed tokens of the slots, and which row of the table each takes in its first layer."""
        row_B = torch.tensor(rows, device=self.device)
        ids_BT, is_real_BT = joint.inputs["input_ids"][row_B], joint.is_real_BT[row_B]
        frame = Frame(ids_BT, is_real_BT.long())
        placement = frame.place(rule, len(rows), ids_BT.shape[1], ids_BT.device)
        frame.finish()
        place_BT = joint.packed.place_BT.view(joint.is_real_BT.shape)[row_B].flatten()
        tokens_R, chosen = spots(placement, place_BT[placement.index_BS])
        vector_BS = placement.vector_BS
        if vector_BS is None:
            num_slots = placement.index_BS.shape[1]
            vector_BS = torch.arange(num_slots, device=self.device) * (not rule.is_shared)
        row_BS = torch.tensor(starts, device=self.device).unsqueeze(1) + vector_BS
        row_R = row_BS.flatten()
        return tokens_R, row_R if chosen is None else row_R[chosen]


def _has_biases(task: Task) -> bool:
    return task.plan is not None and bool(task.plan.bias_layers)
