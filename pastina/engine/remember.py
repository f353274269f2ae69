"""What never changes while a run goes on is worked out once: the states below the first trained layer.

For a linear probe that is what the head reads; for PASTA on upper layers the input of the lowest of
them. Rows are worked out before the run, in batches that depend on nothing else, so that a run that is
killed and resumed learns from the same bits.

Shape letters: B rows, N items (rows, or words of a tagger), H hidden.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pastina.data.encode import Example
from pastina.engine.affine import Precision
from pastina.engine.batching import Batch, budget_batches, collate, count_items
from pastina.engine.packed import PackedEngine

IN_MEMORY = 1 << 30  # bytes; more lie in a file that is mapped into memory


class RememberingEngine:
    """The packed engine with a memory for rows that come again, epoch after epoch."""

    def __init__(self, inner: PackedEngine) -> None:
        self.inner, self.start = inner, inner.first_layer()
        self.name = f"{inner.name}, remembering"
        self.precision: Precision = inner.precision
        self._states: Tensor | None = None
        self._places: dict[bytes, slice] = {}

    @property
    def is_whole(self) -> bool:
        """Whether only the head is left to compute."""
        return self.start == self.inner.num_layers

    def remember(
        self, examples: Sequence[Example], pad_id: int, device: torch.device | str, file: Path
    ) -> int:
        """Work out the states of these examples; returns their bytes.

        file: is made, and removed at once, where they are more than IN_MEMORY; the space on its disk is
        taken as long as the engine lives.
        """
        sizes = [count_items(e) if self.is_whole else len(e.input_ids) for e in examples]
        self._states = _room(sum(sizes), self.inner.hidden_size, file)
        end = 0
        for indices in budget_batches([len(example.input_ids) for example in examples]):
            batch = collate([examples[i] for i in indices], pad_id, with_targets=False).to(device)
            found = self._worked_out(batch)
            if found is None:
                continue
            for key, states in zip(_row_keys(batch), found, strict=True):
                if key not in self._places:
                    self._places[key] = slice(end, end + len(states))
                    self._states[self._places[key]] = states.cpu()
                    end += len(states)
        return self._states.nbytes

    @torch.no_grad()
    def _worked_out(self, batch: Batch) -> Iterable[Tensor] | None:
        """For each row of the batch what is remembered of it."""
        if self.is_whole:
            states_NH = self.inner.states(batch)
            return None if states_NH is None else states_NH.split(_items_of_rows(batch))
        return self.inner.lower_states(batch, self.start)

    def logits(self, batch: Batch) -> Tensor:
        """The logits of the batch's items, (N, C)."""
        places = [self._places.get(key) for key in _row_keys(batch)] if self._places else [None]
        known = [place for place in places if place is not None]
        if len(known) < len(places) or self._states is None:
            return self.inner.logits(batch)
        device = batch.inputs["input_ids"].device
        rows = [self._states[place].to(device) for place in known]
        if self.is_whole:
            return self.inner.task_model.head(torch.cat(rows))
        states = self.inner.states(batch, lower=(self.start, rows))
        return (
            self.inner.reference.logits(batch)
            if states is None
            else self.inner.task_model.head(states)
        )


def _room(num_states: int, size: int, file: Path) -> Tensor:
    if num_states * size * 4 <= IN_MEMORY:
        return torch.empty(num_states, size)
    file.parent.mkdir(parents=True, exist_ok=True)
    states = torch.from_file(str(file), shared=True, size=num_states * size)
    file.unlink()  # the memory map keeps it as long as it is needed, and nothing is left behind
    return states.view(num_states, size)


def _items_of_rows(batch: Batch) -> list[int]:
    num_rows = len(batch.inputs["input_ids"])
    if batch.items is None:
        return [1] * num_rows
    return torch.bincount(batch.items[0], minlength=num_rows).tolist()


def _row_keys(batch: Batch) -> list[bytes]:
    """What makes a row what it is, without its padding."""
    ids_BT, mask_BT = batch.inputs["input_ids"].cpu(), batch.inputs["attention_mask"].cpu()
    types_BT = batch.inputs.get("token_type_ids")
    asked: Sequence[Tensor | None] = [None] * len(ids_BT)
    if batch.items is not None:
        asked = batch.items[1].cpu().split(_items_of_rows(batch))
    keys = []
    for row, words_N in enumerate(asked):
        is_real_T = mask_BT[row] != 0
        parts = [ids_BT[row][is_real_T], is_real_T.sum().reshape(1)]
        if types_BT is not None:
            parts.append(types_BT[row].cpu()[is_real_T])
        if words_N is not None:
            parts.append(words_N)
        keys.append(torch.cat(parts).numpy().tobytes())
    return keys
