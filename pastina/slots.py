"""Which token of a row is which special token: a pure function of the ids and the tokenizer.

Shape letters: B rows, T tokens, S slots.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pastina.errors import BackboneError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


class SlotOverflow(DataError):
    """A row holds more special tokens than there are slots; `row`, `count`, `num_slots` say which."""

    def __init__(self, row: int, count: int, num_slots: int) -> None:
        self.row, self.count, self.num_slots = row, count, num_slots
        super().__init__(
            f"Row {row} holds {count} special tokens, but there are only {num_slots} slots. "
            "Either the text itself spells a special token (then remove it), or the row is a pair "
            f"where single texts were expected (then train with num_slots={count})."
        )


def find_slots(
    input_ids_BT: Tensor,
    special_token_ids: Sequence[int],
    num_slots: int,
    attention_mask_BT: Tensor | None = None,
    by_token: bool = False,
) -> Tensor:
    """The slot of every token: 0 for none, else its rank among the special tokens of its own row.

    Args:
        input_ids_BT: token ids.
        special_token_ids: ids that count as special.
        num_slots: how many special tokens a row may hold.
        attention_mask_BT: a position with 0 is never special (padding may equal the end token).
        by_token: slots are 1 + the index of the id in `special_token_ids` instead of ranks.

    >>> find_slots(torch.tensor([[101, 7, 102, 0], [101, 102, 8, 102]]), (101, 102), 3)
    tensor([[1, 0, 2, 0],
            [1, 2, 0, 3]])
    """
    rank_BT, token_BT = rank_special_tokens(input_ids_BT, special_token_ids, attention_mask_BT)
    check_slots(rank_BT, num_slots)
    return token_BT if by_token else rank_BT


def rank_special_tokens(
    input_ids_BT: Tensor, special_token_ids: Sequence[int], attention_mask_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rank in the row, and 1 + index in `special_token_ids`, of every special token; 0 elsewhere."""
    if input_ids_BT.dim() != 2:
        raise DataError(
            f"input_ids must have the shape [rows, tokens]; seen {tuple(input_ids_BT.shape)}."
        )
    token_BT = torch.zeros_like(input_ids_BT, dtype=torch.int64)
    for index, token_id in enumerate(special_token_ids):
        token_BT = torch.where(input_ids_BT == token_id, index + 1, token_BT)
    if attention_mask_BT is not None:
        if attention_mask_BT.shape != input_ids_BT.shape:
            raise DataError(
                f"attention_mask has the shape {tuple(attention_mask_BT.shape)}, input_ids has "
                f"{tuple(input_ids_BT.shape)}. Pass one mask value per token."
            )
        token_BT = torch.where(attention_mask_BT != 0, token_BT, 0)
    is_special_BT = token_BT != 0
    return is_special_BT.cumsum(dim=1) * is_special_BT, token_BT


def check_slots(rank_BT: Tensor, num_slots: int) -> None:
    """Nothing, if no row has a rank above `num_slots`.

    Raises:
        SlotOverflow: names the first such row.
    """
    if rank_BT.numel() == 0 or int(rank_BT.max()) <= num_slots:
        return
    count_B = rank_BT.amax(dim=1)
    row = int((count_B > num_slots).nonzero()[0, 0])
    raise SlotOverflow(row, int(count_B[row]), num_slots)


def _template(tokenizer: "PreTrainedTokenizerBase", pair: bool) -> list[int]:
    # The ids that the tokenizer itself puts around one text, or around two.
    encoded = tokenizer("a", "a" if pair else None, return_special_tokens_mask=True)
    ids: list[int] = encoded["input_ids"]
    mask: list[int] = encoded["special_tokens_mask"]
    never = [tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id]
    ends = [tokenizer.eos_token_id, tokenizer.sep_token_id]  # a pad that doubles as one is special
    return [
        token_id
        for token_id, special in zip(ids, mask, strict=True)
        if special and (token_id not in never or token_id in ends)
    ]


def template_slots(tokenizer: "PreTrainedTokenizerBase", pair: bool) -> int:
    """How many special tokens the tokenizer puts around a text, or a pair (BERT 2/3, RoBERTa 2/4)."""
    return len(_template(tokenizer, pair))


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The ids that the tokenizer's templates insert, in order of appearance; no pad, mask or unk."""
    return tuple(dict.fromkeys(_template(tokenizer, pair=True)))


def config_special_ids(config: "PreTrainedConfig") -> tuple[int, ...]:
    """The same from a model's config: cls and sep, else bos and eos, whichever it has."""
    for names in (("cls_token_id", "sep_token_id"), ("bos_token_id", "eos_token_id")):
        found: list[int | None] = []
        for name in names:
            value = getattr(config, name, None)
            found.extend(value if isinstance(value, list | tuple) else [value])
        ids = tuple(dict.fromkeys(i for i in found if i is not None and i >= 0))
        if ids:
            return ids
    kind = getattr(config, "model_type", type(config).__name__)
    raise BackboneError(
        f"The config of this {kind} model does not say which tokens are special, and no tokenizer "
        f"is stored at {getattr(config, 'name_or_path', '')!r}. Pass "
        "special_token_ids=[tokenizer.cls_token_id, tokenizer.sep_token_id]."
    )


# Pair templates that differ from [CLS] A [SEP] B [SEP].
_PAIR_SLOTS = {"roberta": 4, "xlm-roberta": 4, "camembert": 4, "mpnet": 4, "t5": 1, "mt5": 1}


def resolve_slots(
    config: "PreTrainedConfig",
    special_token_ids: Sequence[int] | None = None,
    num_slots: int | None = None,
) -> tuple[tuple[int, ...], int]:
    """The special ids and the number of slots of a model, where they were not given.

    Its own tokenizer is asked first, if it is a local folder or in the cache; nothing is downloaded.
    """
    if special_token_ids is not None and num_slots is not None:
        return tuple(special_token_ids), num_slots
    tokenizer = local_tokenizer(getattr(config, "name_or_path", ""))
    if special_token_ids is None:
        ids = special_ids(tokenizer) if tokenizer is not None else ()
        special_token_ids = ids or config_special_ids(config)
    if num_slots is None:
        num_slots = template_slots(tokenizer, pair=True) if tokenizer is not None else 0
        num_slots = num_slots or _PAIR_SLOTS.get(getattr(config, "model_type", ""), 3)
    return tuple(special_token_ids), num_slots


def local_tokenizer(name_or_path: str) -> "PreTrainedTokenizerBase | None":
    """The tokenizer of a local folder or of the cache, None where there is none."""
    from transformers import AutoTokenizer
    from transformers.utils.hub import cached_file

    if not name_or_path:
        return None
    try:
        # AutoTokenizer would build an empty tokenizer for a folder that holds only a model.
        found = cached_file(
            name_or_path,
            "tokenizer_config.json",
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is None:
            return None
        return AutoTokenizer.from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return None
