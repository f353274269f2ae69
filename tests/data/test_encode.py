import doctest
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pastina.data import encode as module
from pastina.data.convert import row_of_words
from pastina.data.encode import Example, best_window, bio_tags, cut_longest, encode, stitch
from pastina.data.rows import Row
from pastina.errors import BackboneError, DataError
from pastina.spans import split_words

many = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXTS = st.lists(
    st.sampled_from(["we", "like", "unbelievable", "extraordinarily", "don't", "!", "\u200d", "☃"])
)


def tag_row(text: str, *tags: str) -> Row:
    return Row(text, words=split_words(text), tags=tags or None)


def index_of(window: Example) -> list[int]:
    assert window.word_index is not None
    return window.word_index


def tokens_of(window: Example) -> list[int]:
    assert window.word_tokens is not None
    return window.word_tokens


def test_examples_in_docstrings():
    assert doctest.testmod(module).failed == 0


@many
@given(first=TEXTS, second=TEXTS | st.none(), max_length=st.integers(8, 24))
def test_texts_are_what_the_tokenizer_makes_of_them(
    tokenizer: Any, first: list[str], second: list[str] | None, max_length: int
):
    text, pair = " ".join(first), None if second is None else " ".join(second)
    example = encode([Row(text, pair)], tokenizer, "classify", [], max_length)[0]
    texts = [[text]] if pair is None else [[text], [pair]]
    expected = tokenizer(*texts, truncation="longest_first", max_length=max_length)
    assert example.input_ids == expected["input_ids"][0]
    assert example.token_type_ids == expected["token_type_ids"][0]
    assert example.truncated == (len(tokenizer(*texts)["input_ids"][0]) > max_length)
    assert (example.word_tokens, example.word_index) == (None, None)


@many
@given(first=TEXTS, second=TEXTS | st.none(), max_length=st.integers(8, 24))
def test_the_end_is_kept_where_that_is_asked_for(
    tokenizer: Any, first: list[str], second: list[str] | None, max_length: int
):
    """As the tokenizer cuts with its truncation_side "left"; the row beside it keeps its start."""
    text, pair = " ".join(first), None if second is None else " ".join(second)
    rows = [Row(text, pair, keep_end=True), Row(text, pair)]
    ended, started = encode(rows, tokenizer, "classify", [], max_length)
    texts = [[text]] if pair is None else [[text], [pair]]
    for side, example in (("left", ended), ("right", started)):
        tokenizer.truncation_side = side
        expected = tokenizer(*texts, truncation="longest_first", max_length=max_length)
        tokenizer.truncation_side = "right"
        assert example.input_ids == expected["input_ids"][0]
        assert example.truncated == (len(tokenizer(*texts)["input_ids"][0]) > max_length)


def test_what_was_asked_of_the_tokenizer_before_does_not_matter(tokenizer: Any):
    row, words = Row("we like it"), tag_row("we like it")
    usual = [
        encode([row], tokenizer, "classify", [], 32),
        encode([words], tokenizer, "tag", [], 32),
    ]
    tokenizer(["we like it"], truncation=True, max_length=3, padding="max_length")
    assert usual[0] == encode([row], tokenizer, "classify", [], 32)
    tokenizer(["we like it"], truncation=True, max_length=3, padding="max_length")
    assert usual[1] == encode([words], tokenizer, "tag", [], 32)


def test_byte_level_pairs_without_token_types(byte_tokenizer: Any):
    rows = [Row("we lived in New York", "do we?"), Row("there")]
    pair, single = encode(rows, byte_tokenizer, "classify", [], 9)
    expected = byte_tokenizer(
        "we lived in New York", "do we?", truncation="longest_first", max_length=9
    )
    assert pair.input_ids == expected["input_ids"]
    assert pair.truncated
    assert pair.token_type_ids is None
    assert single.input_ids == byte_tokenizer("there")["input_ids"]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(2, 40))
def test_the_longer_text_gives_first(first: int, second: int, room: int):
    kept = cut_longest([first, second], room)
    sizes = [first, second]
    while sum(sizes) > room:
        sizes[0 if sizes[0] > sizes[1] else 1] -= 1
    assert sum(kept) == sum(sizes)
    assert sorted(kept) == sorted(sizes)


def test_targets(tokenizer: Any):
    def target(kind: str, label: Any) -> Any:
        return encode([Row("a", label=label)], tokenizer, kind, ["x", "y", "z"], 8)[0].target

    assert target("classify", "y") == 1
    assert target("multilabel", ("x", "z")) == [1.0, 0.0, 1.0]
    assert target("multilabel", ()) == [0.0, 0.0, 0.0]
    assert target("regress", 2.5) == 2.5
    assert target("classify", None) is None
    with pytest.raises(DataError, match=r"the label 'w' is not one of the task's \(x, y, z\)"):
        target("classify", "w")
    with pytest.raises(DataError, match=r"'y' is not a label for the kind regress"):
        target("regress", "y")


def test_rows_keep_their_order_over_many_calls(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHUNK", 2)
    rows = [Row("a"), Row("b", "c"), Row("d"), Row("e"), Row("f", "g")]
    examples = encode(rows, tokenizer, "classify", [], 16)
    assert [example.row for example in examples] == [0, 1, 2, 3, 4]
    alone = [encode([row], tokenizer, "classify", [], 16)[0].input_ids for row in rows]
    assert [example.input_ids for example in examples] == alone


def test_words_that_fit(tokenizer: Any):
    row = tag_row("Unbelievably good", "B-x", "O")
    assert encode([row], tokenizer, "tag", ["x"], 16) == [
        Example(
            row=0,
            input_ids=tokenizer("Unbelievably good")["input_ids"],
            token_type_ids=[0] * len(tokenizer("Unbelievably good")["input_ids"]),
            target=[1, 0],
            word_tokens=[1, len(tokenizer("Unbelievably")["input_ids"]) - 1],
            word_index=[0, 1],
            truncated=False,
        )
    ]


def test_byte_level_words_read_like_running_text(byte_tokenizer: Any):
    text = "we don't like New York"
    example = encode([tag_row(text)], byte_tokenizer, "tag", [], 64)[0]
    tokens = byte_tokenizer.convert_ids_to_tokens(example.input_ids)
    assert "".join(tokens) == "<s>we" + "ĠdonʼtĠlikeĠNewĠYork".replace("ʼ", "'") + "</s>"
    assert [tokens[at][:2] for at in tokens_of(example)[:2]] == ["we", "Ġd"]


def windows_of(row: Row, tokenizer: Any, max_length: int, stride: int) -> list[Example]:
    return encode([row], tokenizer, "tag", ["x"], max_length, stride)


@many
@given(words=TEXTS.filter(bool), max_length=st.integers(8, 40), stride=st.integers(0, 5))
def test_windows_cover_each_word_once(
    tokenizer: Any, words: list[str], max_length: int, stride: int
):
    row = row_of_words(words, ["O"] * len(words), "")
    windows = windows_of(row, tokenizer, max_length, stride)
    visible = {
        index
        for index, word in enumerate(words)
        if tokenizer(word, add_special_tokens=False)["input_ids"]
    }
    assert {word for window in windows for word in index_of(window)} == visible
    assert best_window(windows).keys() == visible
    for window in windows:
        assert len(window.input_ids) <= max_length
        assert index_of(window) == sorted(set(index_of(window)))
        assert len(index_of(window)) == len(tokens_of(window))
        assert window.target == [0] * len(index_of(window))
    for left, right in itertools.pairwise(windows):
        shared = [tokens_of(left)[i] for i, w in enumerate(index_of(left)) if w in index_of(right)]
        assert not shared or len(left.input_ids) - 1 - shared[0] <= stride
        assert index_of(right)[-1] > index_of(left)[-1]


@many
@given(words=TEXTS.filter(bool), max_length=st.integers(12, 40), stride=st.integers(0, 5))
def test_stitched_windows_say_what_one_long_window_says(
    tokenizer: Any, words: list[str], max_length: int, stride: int
):
    row = row_of_words(words, None, "")

    def first_tokens(windows: Sequence[Example]) -> list[int | None]:
        scores = [[w.input_ids[at] for at in tokens_of(w)] for w in windows]
        return stitch(windows, scores, len(words), None)

    cut = windows_of(row, tokenizer, max_length, stride)
    whole = windows_of(row, tokenizer, 512, 0)
    assert len(whole) == 1
    assert first_tokens(cut) == first_tokens(whole)


def test_a_word_counts_where_it_has_most_around_it(tokenizer: Any):
    row = tag_row("a b c d e f g h i j k l")
    windows = windows_of(row, tokenizer, 10, 4)
    assert [index_of(window) for window in windows] == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [4, 5, 6, 7, 8, 9, 10, 11],
    ]
    best = {word: number for word, (number, _) in best_window(windows).items()}
    assert best == {w: 0 if w < 6 else 1 for w in range(12)}
    scores = [["first"] * 8, ["second"] * 8]
    assert stitch(windows, scores, 12, "O") == ["first"] * 6 + ["second"] * 6


def test_words_that_the_tokenizer_drops_are_missing_not_lost(tokenizer: Any):
    row = row_of_words(["good", "\u200d", "one", "\ufe0f"], ["O", "B-x", "O", "O"], "")
    windows = windows_of(row, tokenizer, 16, 0)
    assert windows[0].word_index == [0, 2]
    assert windows[0].target == [0, 0]
    assert stitch(windows, [["B-x", "B-x"]], 4, "O") == ["B-x", "O", "B-x", "O"]


def test_a_text_of_which_nothing_is_left(tokenizer: Any):
    (window,) = windows_of(row_of_words(["\u200d"], ["O"], ""), tokenizer, 16, 0)
    assert window.input_ids == tokenizer("")["input_ids"]
    assert (index_of(window), tokens_of(window), window.target) == ([], [], [])
    assert stitch([window], [[]], 1, "O") == ["O"]


def test_a_word_longer_than_a_window_is_cut(tokenizer: Any):
    row = row_of_words(["good", "unbelievabilityness" * 5, "one"], None, "")
    windows = windows_of(row, tokenizer, 10, 2)
    assert [index_of(window) for window in windows] == [[0], [1], [2]]
    assert [window.truncated for window in windows] == [False, True, False]
    assert len(windows[1].input_ids) == 10


def test_real_noisy_words(tokenizer: Any, shared: Path):
    from pastina.data.read import read_rows
    from pastina.recipe import DataSpec

    rows = read_rows(shared / "wnut17" / "test.conll", "tag", DataSpec())
    labels = sorted({tag[2:] for row in rows for tag in row.tags or () if tag != "O"})
    tags = bio_tags(labels)
    windows: dict[int, list[Example]] = {}
    for example in encode(rows, tokenizer, "tag", labels, 48, 12):
        windows.setdefault(example.row, []).append(example)
    assert len(windows) == len(rows)
    for index, row in enumerate(rows):
        assert row.words is not None
        scores = [w.target for w in windows[index] if isinstance(w.target, list)]
        found = stitch(windows[index], scores, len(row.words), 0)
        assert [tags[int(number)] for number in found] == list(row.tags or ())


@pytest.mark.parametrize("kind", ["classify", "tag"])
def test_what_cannot_be_encoded(tokenizer: Any, kind: str):
    row = tag_row("a b c d e f g h i j k l")
    with pytest.raises(DataError, match="max_length 2 leaves no room for text"):
        encode([row], tokenizer, kind, [], 2)
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(BackboneError, match="SimpleNamespace is not a fast tokenizer"):
        encode([row], slow, kind, [], 16)


def test_a_stride_as_long_as_a_window(tokenizer: Any):
    with pytest.raises(DataError, match="stride 6 is not smaller than the 6 tokens of text"):
        windows_of(tag_row("a b c d e f g h i j"), tokenizer, 8, 6)
    assert len(windows_of(tag_row("a b c"), tokenizer, 8, 6)) == 1


def test_fifteen_thousand_short_rows_take_seconds(tokenizer: Any, shared: Path):
    lines = (shared / "clinc150" / "train.jsonl").read_text("utf-8").splitlines()
    rows = [Row(json.loads(line)["text"]) for line in lines]
    start = time.process_time()
    assert len(encode(rows, tokenizer, "classify", [], 128)) == 15_000
    assert time.process_time() - start < 10  # two on a free core; others may share this one


def test_a_tokenizer_that_knows_no_letters():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    empty = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(BackboneError, match="makes no token of the letter 'a'"):
        encode([Row("a")], empty, "classify", [], 16)
