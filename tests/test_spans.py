import doctest
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pastina import spans
from pastina.errors import DataError
from pastina.spans import Span, check_bio, from_bio, split_words, to_bio

TEXT = "Call Mr. Li in New York, please"


def words_of(text: str) -> list[str]:
    return [text[start:end] for start, end in split_words(text)]


def test_examples_in_docstrings():
    assert doctest.testmod(spans).failed == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("  \n\t ", []),
        ("hello", ["hello"]),
        ("don't", ["don", "'", "t"]),
        ("a-b...", ["a", "-", "b", ".", ".", "."]),
        ("snake_case 3.5", ["snake_case", "3", ".", "5"]),
        ("我爱 Berlin", ["我", "爱", "Berlin"]),
        ("東京タワーに", ["東", "京", "タ", "ワ", "ー", "に"]),
        ("iPhone手机", ["iPhone", "手", "机"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("I ❤\ufe0f you", ["I", "❤\ufe0f", "you"]),
        ("a \u200d b", ["a", "\u200d", "b"]),
        ("e\u0301te", ["e\u0301te"]),
        ("a\u00a0b", ["a", "b"]),
    ],
)
def test_split_words(text: str, words: list[str]):
    assert words_of(text) == words


@settings(deadline=None)
@given(st.text())
def test_words_hold_everything_but_white_space(text: str):
    words = split_words(text)
    assert "".join(words_of(text)) == "".join(text.split())
    assert all(start < end for start, end in words)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(words))
    assert not any(re.search(r"\s", word) for word in words_of(text))


def test_to_bio():
    words = split_words(TEXT)
    tags = to_bio(TEXT, words, [Span(15, 23, "place"), Span(5, 11, "person")])
    assert tags == ("O", *("B-person", "I-person", "I-person"), "O", "B-place", "I-place", "O", "O")


def test_white_space_at_the_ends_of_a_span_does_not_count():
    words = split_words(TEXT)
    assert to_bio(TEXT, words, [Span(14, 19, "x")]) == to_bio(TEXT, words, [Span(15, 18, "x")])


def test_neighbours_of_one_type_stay_apart():
    text = "Ann Bob"
    tags = to_bio(text, split_words(text), [Span(0, 3, "p"), Span(4, 7, "p")])
    assert tags == ("B-p", "B-p")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            [Span(15, 21, "place")],
            "The span 15..21 'New Yo' (place) cuts the word 'York' (19..23). "
            'Move its ends, or set data.align = "widen" to take whole words.',
        ),
        (
            [Span(6, 11, "p")],
            "The span 6..11 'r. Li' (p) cuts the word 'Mr' (5..7). "
            'Move its ends, or set data.align = "widen" to take whole words.',
        ),
        (
            [Span(0, 4, "a"), Span(0, 8, "b")],
            "The span 0..8 'Call Mr.' (b) overlaps The span 0..4 'Call' (a).",
        ),
        (
            [Span(15, 99, "x")],
            "The span 15..99 (x) lies outside the text, which has 31 characters.",
        ),
        ([Span(-1, 4, "x")], "The span -1..4 (x) lies outside the text, which has 31 characters."),
        ([Span(4, 3, "x")], "The span 4..3 (x) lies outside the text, which has 31 characters."),
        ([Span(4, 5, "x")], "The span 4..5 (x) holds no text."),
        ([Span(4, 4, "x")], "The span 4..4 (x) holds no text."),
    ],
)
def test_spans_that_make_no_sense(found: list[Span], message: str):
    message = message.replace("overlaps The", "overlaps the")
    with pytest.raises(DataError) as caught:
        to_bio(TEXT, split_words(TEXT), found)
    assert str(caught.value) == message


def test_widen_takes_whole_words():
    words = split_words(TEXT)
    tags = to_bio(TEXT, words, [Span(16, 20, "place")], align="widen")
    assert tags == to_bio(TEXT, words, [Span(15, 23, "place")])


def test_widened_spans_must_not_share_a_word():
    with pytest.raises(DataError, match="shares the word 'abcd' with another span"):
        to_bio("abcd", [(0, 4)], [Span(0, 2, "x"), Span(2, 4, "y")], align="widen")


def test_a_span_between_given_words_is_an_error():
    with pytest.raises(DataError, match="holds no word"):
        to_bio("a - b", [(0, 1), (4, 5)], [Span(2, 3, "x")])


def test_from_bio_reads_what_a_model_says():
    words = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    tags = ["I-a", "I-a", "I-b", "B-b", "O"]
    assert from_bio(words, tags, [0.9, 0.5, 0.7, 0.8, 1.0]) == (
        Span(0, 3, "a", 0.5),
        Span(4, 5, "b", 0.7),
        Span(6, 7, "b", 0.8),
    )


@pytest.mark.parametrize(
    ("tags", "index"),
    [
        ([], None),
        (["O", "B-a", "I-a", "I-a", "B-a"], None),
        (["I-a"], 0),
        (["B-a", "I-b"], 1),
        (["B-a", "O", "I-a"], 2),
        (["B-a", "I-a", "I-b"], 2),
    ],
)
def test_check_bio(tags: list[str], index: int | None):
    assert check_bio(tags) == index


@st.composite
def labelled_texts(draw: st.DrawFn) -> tuple[str, list[Span]]:
    text = draw(st.text(alphabet=st.sampled_from("ab1 .,-\n我é❤\u0301"), max_size=40))
    words = split_words(text)
    found: list[Span] = []
    next_word = 0
    while next_word < len(words) and draw(st.booleans()):
        first = draw(st.integers(next_word, len(words) - 1))
        last = draw(st.integers(first, len(words) - 1))
        label = draw(st.sampled_from(["a", "b-c", "I-x"]))
        found.append(Span(words[first][0], words[last][1], label))
        next_word = last + 1
    return text, found


@settings(deadline=None)
@given(labelled_texts())
def test_spans_survive_the_way_there_and_back(case: tuple[str, list[Span]]):
    text, found = case
    words = split_words(text)
    tags = to_bio(text, words, reversed(found))
    assert check_bio(tags) is None
    assert from_bio(words, tags) == tuple(found)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"]), max_size=12))
def test_reading_tags_loses_none_and_writing_them_is_legal(tags: list[str]):
    text = "x " * len(tags)
    words = split_words(text)
    again = to_bio(text, words, from_bio(words, tags))
    assert check_bio(again) is None
    assert [tag[2:] for tag in again] == [tag[2:] for tag in tags]
    if check_bio(tags) is None:
        assert list(again) == tags


@settings(deadline=None)
@given(st.lists(st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"]), max_size=12))
def test_spans_equal_those_of_seqeval(tags: list[str]):
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    words = [(index, index + 1) for index in range(len(tags))]
    ours = {(span.label, span.start, span.end - 1) for span in from_bio(words, tags)}
    assert ours == set(labeling.get_entities(tags))
