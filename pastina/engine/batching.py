"""Examples into tensors, and in which order.

Shape letters: B rows, T tokens, N items (rows, or words of a tagger).
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pastina.data.encode import Example
from pastina.data.rows import Row
from pastina.errors import DataError

if TYPE_CHECKING:
    from pastina.engine import Engine

_WINDOW = 50  # batches among which texts of like length are put together


@dataclass(frozen=True, slots=True)
class Batch:
    """A padded batch: what the model reads, and which of its outputs are asked for.

    inputs: input_ids, attention_mask and, where the tokenizer makes them, token_type_ids, (B, T).
    items: for a tagger (row_N, token_N), the first sub-token of each word; None: one item a row.
    targets: of the items, or None where an example has none.
    """

    inputs: dict[str, torch.Tensor]
    items: tuple[torch.Tensor, torch.Tensor] | None
    targets: torch.Tensor | None
    num_items: int

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        items = None if self.items is None else (self.items[0].to(device), self.items[1].to(device))
        targets = None if self.targets is None else self.targets.to(device)
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, items, targets, self.num_items)

    def pick(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of the items, (N, C), from (B, C) or (B, T, C)."""
        return logits if self.items is None else logits[self.items]


def collate(examples: Sequence[Example], pad_id: int, *, with_targets: bool = True) -> Batch:
    """Examples as one right-padded batch."""
    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    inputs = {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
    }
    if examples[0].token_type_ids is not None:
        inputs["token_type_ids"] = padded([e.token_type_ids or [] for e in examples], 0)
    items = None
    if examples[0].word_tokens is not None:
        rows = [i for i, e in enumerate(examples) for _ in e.word_tokens or ()]
        tokens = [token for e in examples for token in e.word_tokens or ()]
        items = (torch.tensor(rows, dtype=torch.long), torch.tensor(tokens, dtype=torch.long))
    targets = _targets(examples) if with_targets else None
    num_items = len(examples) if items is None else len(items[0])
    return Batch(inputs, items, targets, num_items)


def training_batches(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of one epoch as indices: shuffled, texts of like length together.

    The order is a function of seed and epoch alone. Every index comes once; the last batch of the
    shuffled order may be smaller.
    """
    shuffler = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    shuffler.shuffle(order)
    batches = []
    for start in range(0, len(order), batch_size * _WINDOW):
        window = order[start : start + batch_size * _WINDOW]
        window.sort(key=lambda index: -lengths[index])
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    shuffler.shuffle(batches)
    return batches


def budget_batches(
    lengths: Sequence[int], max_tokens: int = 4096, max_rows: int = 256
) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, each of at most max_tokens padded tokens.

    A text longer than max_tokens stands alone.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batch[0]] if batch else lengths[index]
        if batch and (longest * (len(batch) + 1) > max_tokens or len(batch) == max_rows):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _targets(examples: Sequence[Example]) -> torch.Tensor | None:
    if any(example.target is None for example in examples):
        return None
    if examples[0].word_tokens is not None:
        flat = [tag for example in examples for tag in example.target]  # type: ignore[union-attr]
        return torch.tensor(flat, dtype=torch.long)
    target = examples[0].target
    dtype = torch.long if isinstance(target, int) else torch.float
    return torch.tensor([example.target for example in examples], dtype=dtype)


def example_logits(
    engine: "Engine",
    examples: Sequence[Example],
    pad_id: int,
    device: torch.device | str,
    max_tokens: int = 4096,
) -> list[torch.Tensor]:
    """The logits of each example's items, (items, C) in fp32 on the CPU, in the order given."""
    found: list[torch.Tensor | None] = [None] * len(examples)
    lengths = [len(example.input_ids) for example in examples]
    with torch.inference_mode():
        for indices in budget_batches(lengths, max_tokens):
            chosen = [examples[i] for i in indices]
            batch = collate(chosen, pad_id, with_targets=False).to(device)
            logits_NC = engine.logits(batch).float().cpu()
            parts = logits_NC.split([count_items(example) for example in chosen])
            for i, part in zip(indices, parts, strict=True):
                found[i] = part
    return [part for part in found if part is not None]


def count_items(example: Example) -> int:
    """How many answers an example asks for: one, or one a word."""
    return 1 if example.word_tokens is None else len(example.word_tokens)


def check_slots(
    examples: Sequence[Example], rows: Sequence[Row], special_ids: Sequence[int], num_slots: int
) -> None:
    """Nothing, if every text fits the slots.

    Raises:
        DataError: a text holds more special tokens than there are slots, for instance because it
            says "[SEP]" literally.
    """
    ids = set(special_ids)
    for example in examples:
        seen = sum(token in ids for token in example.input_ids)
        if seen > num_slots:
            row = rows[example.row]
            raise DataError(
                f"{row.where or 'A text'}: {seen} special tokens but {num_slots} slots, in the text "
                f"{row.text[:200]!r}. Remove special tokens written in the text, or set "
                f"method.num_slots = {seen}."
            )
