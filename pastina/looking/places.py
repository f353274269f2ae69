"""Which tokens of a text are special, which ordinary ones have vectors, and what they are called."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pastina.data.encode import Example
from pastina.methods.ordinary import rank_ordinary
from pastina.methods.pasta import PastaConfig
from pastina.methods.rules import SlotRule
from pastina.slots import rank_special_tokens


@dataclass(frozen=True, slots=True)
class Places:
    """The slots of all texts: special tokens by their rank, behind them ordinary tokens with vectors.

    slots: of each token of each text, from 1; 0 for none. ordinary: the ranks of the ordinary tokens
    that some layer has a vector for.
    """

    slots: tuple[tuple[int, ...], ...]
    num_special: int
    ordinary: tuple[int, ...]

    @property
    def num_slots(self) -> int:
        """Of special tokens and of ordinary ones."""
        return self.num_special + len(self.ordinary)


def find_places(
    examples: Sequence[Example], ids: Sequence[int], config: PastaConfig | None, num_layers: int
) -> Places:
    """ids: of the special tokens. config: None: of a method without vectors."""
    special = [_special(example, ids) for example in examples]
    num_special = max(max(ranks) for ranks in special)
    if config is None or config.positions == "special":
        return Places(tuple(map(tuple, special)), num_special, ())
    wanted = with_vectors(config.rule(layer) for layer in range(num_layers))
    others = [_ordinary(example, ids, config.positions) for example in examples]
    ranks = sorted({rank for row in others for rank in row if rank - 1 in wanted})
    slots = {rank: num_special + place for place, rank in enumerate(ranks, start=1)}
    together = (
        tuple(own or slots.get(other, 0) for own, other in zip(*rows, strict=True))
        for rows in zip(special, others, strict=True)
    )
    return Places(tuple(together), num_special, tuple(ranks))


def with_vectors(rules: Any) -> set[int]:
    """The slots, counted from 0, that have a vector in one of the layers."""
    return {slot for rule in rules for slot in chosen(rule)}


def chosen(rule: SlotRule) -> tuple[int, ...]:
    """The slots of a layer that have vectors, counted from 0."""
    return tuple(range(rule.num_slots)) if rule.chosen is None else rule.chosen


def token_labels(example: Example, tokenizer: Any, extra_tokens: int) -> tuple[str, ...]:
    """The tokens as a person reads them; those that were written again behind the text have a number."""
    labels = [token_label(tokenizer, token) for token in example.input_ids]
    first = len(labels) - extra_tokens
    for number in range(extra_tokens):
        labels[first + number] += f"+{number + 1}"
    return tuple(labels)


def token_label(tokenizer: Any, token_id: int) -> str:
    """A token as a person reads it; the tokenizer's own spelling where that is no whole character."""
    label = tokenizer.decode([token_id], clean_up_tokenization_spaces=False).strip()
    if not label or "\ufffd" in label:
        label = str(tokenizer.convert_ids_to_tokens(token_id)).strip("Ġ▁")
    return label or "␣"


def slot_names(places: Places, tokens: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Rank and token, as the first text that has the slot spells it; tokens: of each text."""
    names: dict[int, str] = {}
    for own, slots in zip(tokens, places.slots, strict=True):
        for token, slot in zip(own, slots, strict=True):
            names.setdefault(slot, f"{slot} {token}")
    special = (names[slot] for slot in range(1, places.num_special + 1))
    return (*special, *(f"ordinary {rank}" for rank in places.ordinary))


def _special(example: Example, ids: Sequence[int]) -> list[int]:
    rank_BT, _ = rank_special_tokens(torch.tensor([example.input_ids]), ids)
    return rank_BT[0].tolist()


def _ordinary(example: Example, ids: Sequence[int], which: str) -> list[int]:
    ids_BT = torch.tensor([example.input_ids])
    rank_BT, _ = rank_special_tokens(ids_BT, ids)
    return rank_ordinary(ids_BT, rank_BT, None, which)[0].tolist()
