"""What never changes while a run goes on is worked out once: the states below the first trained layer.

For a linear probe that is what the head reads; for PASTA on upper layers the input of the lowest of
them. Rows are worked out before the run, in batches that depend on nothing else, so that a run that is
killed and resumed learns from the same bits.

Shape letters: B rows, N items (rows, or words of a tagger), H hidden.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor

from pastina.data.encode import Example
from pastina.engine.affine import Precision
from pastina.engine.batching import Batch, budget_batches, collate, count_items
from pastina.engine.packed import PackedEngine

IN_MEMORY = 1 << 30  # bytes of all memories together; more lie in files that are mapped into memory


class Memory:
    """States of rows, for engines of the same backbone that leave the same layers alone."""

    def __init__(self, num_states: int, size: int, file: Path) -> None:
        """file: is made, and removed at once, where the states do not fit into what is left of
        IN_MEMORY; the space on its disk is taken as long as the memory lives.
        """
        num_bytes = num_states * size * 4
        taken = sum(memory.num_bytes for memory in _in_memory)
        if taken + num_bytes <= IN_MEMORY:
            self._states = torch.empty(num_states, size)
            _in_memory.add(self)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            states = torch.from_file(str(file), shared=True, size=num_states * size)
            file.unlink()  # the memory map keeps it, and nothing is left behind
            self._states = states.view(num_states, size)
        self.num_bytes = num_bytes
        self._places: dict[bytes, slice] = {}
        self._end = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def put(self, key: bytes, states: Tensor) -> None:
        """Keep the states (N, H) of a row."""
        place = self._places[key] = slice(self._end, self._end + len(states))
        self._states[place] = states.cpu()
        self._end = place.stop

    def get(self, key: bytes) -> Tensor | None:
        """The states of a row; None: it is not known."""
        place = self._places.get(key)
        return None if place is None else self._states[place]


_in_memory: WeakSet[Memory] = WeakSet()


class RememberingEngine:
    """The packed engine with a memory for rows that come again, epoch after epoch."""

    def __init__(self, inner: PackedEngine) -> None:
        self.inner, self.start = inner, inner.first_layer()
        self.name = f"{inner.name}, remembering"
        self.precision: Precision = inner.precision
        self.memory: Memory | None = None

    @property
    def is_whole(self) -> bool:
        """Whether only the head is left to compute."""
        return self.start == self.inner.num_layers

    @property
    def what(self) -> str:
        """What is remembered of a row: engines that say the same can share a memory of the same rows."""
        pooling = self.inner.task_model.pooling if self.is_whole else "all"
        return f"input of layer {self.start}, {pooling}, {self.precision}"

    def remember(
        self, examples: Sequence[Example], pad_id: int, device: torch.device | str, file: Path
    ) -> Memory:
        """Work out the states of these examples; file: see `Memory`."""
        sizes = [count_items(e) if self.is_whole else len(e.input_ids) for e in examples]
        memory = Memory(sum(sizes), self.inner.hidden_size, file)
        for indices in budget_batches([len(example.input_ids) for example in examples]):
            batch = collate([examples[i] for i in indices], pad_id, with_targets=False).to(device)
            found = self._worked_out(batch)
            if found is None:
                continue
            for key, states in zip(_row_keys(batch), found, strict=True):
                if key not in memory:
                    memory.put(key, states)
        self.memory = memory
        return memory

    @torch.no_grad()
    def _worked_out(self, batch: Batch) -> Iterable[Tensor] | None:
        """For each row of the batch what is remembered of it."""
        if self.is_whole:
            states_NH = self.inner.states(batch)
            return None if states_NH is None else states_NH.split(_items_of_rows(batch))
        return self.inner.lower_states(batch, self.start)

    def logits(self, batch: Batch) -> Tensor:
        """The logits of the batch's items, (N, C)."""
        known = [] if self.memory is None else [self.memory.get(key) for key in _row_keys(batch)]
        device = batch.inputs["input_ids"].device
        rows = [states.to(device) for states in known if states is not None]
        if not rows or len(rows) < len(known):
            return self.inner.logits(batch)
        if self.is_whole:
            return self.inner.task_model.head(torch.cat(rows))
        states = self.inner.states(batch, lower=(self.start, rows))
        return (
            self.inner.reference.logits(batch)
            if states is None
            else self.inner.task_model.head(states)
        )


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
