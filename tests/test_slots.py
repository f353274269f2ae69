from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pastina.errors import BackboneError, DataError
from pastina.slots import (
    SlotOverflow,
    config_special_ids,
    find_slots,
    local_tokenizer,
    resolve_slots,
    special_ids,
    template_slots,
)
from tests.models import CONFIGS, build

BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
ROBERTA_WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b"]


def word_tokenizer(
    words: list[str], single: str, pair: str, **names: str
) -> PreTrainedTokenizerFast:
    raw = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=names["unk_token"])
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if single:
        inserted = [(w, words.index(w)) for w in words if w in single]
        raw.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=inserted
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def bert_tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(
        BERT_WORDS,
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(
        ROBERTA_WORDS,
        "<s> $A </s>",
        "<s> $A </s> </s> $B </s>",
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
    )


def t5_tokenizer(pad: str = "<pad>") -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "a", "b"]
    return word_tokenizer(
        words, "$A </s>", "$A </s> $B </s>", unk_token="<unk>", pad_token=pad, eos_token="</s>"
    )


def test_ranks_by_row() -> None:
    ids = torch.tensor([[101, 7, 8, 102, 9, 102, 0, 0], [101, 5, 102, 11, 12, 13, 14, 102]])
    slots = find_slots(ids, (101, 102), 3)
    assert slots.tolist() == [[1, 0, 0, 2, 0, 3, 0, 0], [1, 0, 2, 0, 0, 0, 0, 3]]
    assert slots.dtype == torch.int64


def test_rows_with_different_counts() -> None:
    ids = torch.tensor([[101, 7, 102, 0, 0], [101, 7, 102, 8, 102]])
    assert find_slots(ids, (101, 102), 3).tolist() == [[1, 0, 2, 0, 0], [1, 0, 2, 0, 3]]
    assert find_slots(ids[:1], (101, 102), 2).tolist() == [[1, 0, 2, 0, 0]]


def test_by_token() -> None:
    ids = torch.tensor([[101, 7, 102, 8, 102]])
    assert find_slots(ids, (101, 102), 3, by_token=True).tolist() == [[1, 0, 2, 0, 2]]
    assert find_slots(ids, (102, 101), 3, by_token=True).tolist() == [[2, 0, 1, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_that_equals_the_end_token_is_not_special(dtype: torch.dtype) -> None:
    ids = torch.tensor([[2, 2, 0, 7, 2], [0, 7, 2, 2, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).to(dtype)
    slots = find_slots(ids, (0, 2), 2, mask)
    assert slots.tolist() == [[0, 0, 1, 0, 2], [1, 0, 2, 0, 0]]
    with pytest.raises(SlotOverflow):
        find_slots(ids, (0, 2), 2)


@pytest.mark.parametrize("by_token", [False, True])
def test_too_many_special_tokens(by_token: bool) -> None:
    ids = torch.tensor([[101, 7, 102, 8], [101, 102, 102, 102]])
    with pytest.raises(DataError, match=r"Row 1 holds 4 special tokens.*only 3 slots") as caught:
        find_slots(ids, (101, 102), 3, by_token=by_token)
    assert isinstance(caught.value, SlotOverflow)
    assert (caught.value.row, caught.value.count, caught.value.num_slots) == (1, 4, 3)


def test_wrong_shapes() -> None:
    with pytest.raises(DataError, match=r"\[rows, tokens\].*\(3,\)"):
        find_slots(torch.tensor([1, 2, 3]), (1,), 1)
    with pytest.raises(DataError, match=r"\(1, 2\).*\(1, 3\)"):
        find_slots(torch.tensor([[1, 2, 3]]), (1,), 1, torch.ones(1, 2))


def test_nothing_to_do() -> None:
    assert find_slots(torch.zeros(0, 4, dtype=torch.int64), (1,), 1).shape == (0, 4)
    assert find_slots(torch.zeros(2, 0, dtype=torch.int64), (1,), 1).shape == (2, 0)
    assert find_slots(torch.tensor([[5, 6]]), (1,), 1).tolist() == [[0, 0]]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda rows: st.integers(1, 9).flatmap(
            lambda width: st.lists(
                st.lists(
                    st.tuples(st.integers(0, 4), st.booleans()), min_size=width, max_size=width
                ),
                min_size=rows,
                max_size=rows,
            )
        )
    )
)
def test_equal_to_counting_by_hand(table: list[list[tuple[int, bool]]]) -> None:
    ids = torch.tensor([[i for i, _ in row] for row in table])
    mask = torch.tensor([[int(m) for _, m in row] for row in table])
    expected = []
    for row in table:
        seen, ranks = 0, []
        for token, real in row:
            special = real and token in (1, 3)
            seen += special
            ranks.append(seen if special else 0)
        expected.append(ranks)
    assert find_slots(ids, (1, 3), 9, mask).tolist() == expected


def test_templates() -> None:
    bert, roberta, t5 = bert_tokenizer(), roberta_tokenizer(), t5_tokenizer()
    assert [template_slots(bert, pair) for pair in (False, True)] == [2, 3]
    assert [template_slots(roberta, pair) for pair in (False, True)] == [2, 4]
    assert [template_slots(t5, pair) for pair in (False, True)] == [1, 2]
    assert special_ids(bert) == (2, 3)
    assert special_ids(roberta) == (0, 2)
    assert special_ids(t5) == (1,)


def test_a_pad_token_that_is_the_end_token_stays_special() -> None:
    assert special_ids(t5_tokenizer(pad="</s>")) == (1,)


def test_a_tokenizer_without_template_has_none() -> None:
    plain = word_tokenizer(["<unk>", "a"], "", "", unk_token="<unk>")
    assert special_ids(plain) == ()
    assert template_slots(plain, pair=True) == 0


def test_ids_from_configs() -> None:
    assert config_special_ids(CONFIGS["modernbert"]) == (101, 102)
    assert config_special_ids(CONFIGS["roberta"]) == (0, 2)
    assert config_special_ids(CONFIGS["albert"]) == (2, 3)
    assert config_special_ids(CONFIGS["t5"]) == (1,)
    with pytest.raises(BackboneError, match=r"bert.*special_token_ids=\[tokenizer\.cls_token_id"):
        config_special_ids(CONFIGS["bert"])


def test_slots_by_family() -> None:
    assert resolve_slots(CONFIGS["roberta"]) == ((0, 2), 4)
    assert resolve_slots(CONFIGS["t5"]) == ((1,), 1)
    assert resolve_slots(CONFIGS["albert"]) == ((2, 3), 3)
    assert resolve_slots(CONFIGS["bert"], (101, 102)) == ((101, 102), 3)
    assert resolve_slots(CONFIGS["bert"], (101, 102), 7) == ((101, 102), 7)
    assert resolve_slots(CONFIGS["roberta"], None, 2) == ((0, 2), 2)


def test_the_tokenizer_in_the_folder_of_the_model_is_asked_first(tmp_path: Path) -> None:
    model = build("bert")
    model.save_pretrained(tmp_path)
    assert local_tokenizer(str(tmp_path)) is None, "a folder with only a model"
    bert_tokenizer().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert resolve_slots(again.config) == ((2, 3), 3)
    assert resolve_slots(again.config, None, 2) == ((2, 3), 2)


@pytest.mark.parametrize("name", ["", "no-such/model-anywhere", "/no/such/folder"])
def test_no_tokenizer_no_network(name: str) -> None:
    assert local_tokenizer(name) is None
