"""Character spans <-> words <-> IOB2 tags: pure functions."""

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pastina.errors import DataError

Words = Sequence[tuple[int, int]]  # character ranges (start, end), end exclusive, in order

# Scripts that write words without white space between them and that tokenizers split by character.
_CJK = (
    "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U000323af"
)


@dataclass(frozen=True, slots=True)
class Span:
    """A labelled stretch of a text: characters start (inclusive) to end (exclusive)."""

    start: int
    end: int
    label: str
    score: float | None = None


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    # Python's \w leaves out combining marks, without which words of Hindi or Arabic fall apart.
    marks = "".join(c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.category(c)[0] == "M")
    letter = rf"(?![{_CJK}])[\w{marks}]"
    return re.compile(
        rf"[{_CJK}][{marks}]*"
        rf"|(?:{letter})+(?:[\u200c\u200d](?:{letter})+)*"  # zero-width (non-)joiners inside a word
        rf"|[^\w\s][{marks}]*"
    )


def split_words(text: str) -> tuple[tuple[int, int], ...]:
    """The words of a text: runs of letters and digits, single punctuation marks, single CJK signs.

    Every character that is not white space belongs to exactly one word.

    >>> text = "Don't pay 5€!"
    >>> [text[start:end] for start, end in split_words(text)]
    ['Don', "'", 't', 'pay', '5', '€', '!']
    """
    return tuple(match.span() for match in _word_pattern().finditer(text))


def to_bio(
    text: str, words: Words, spans: Iterable[Span], align: Literal["error", "widen"] = "error"
) -> tuple[str, ...]:
    """One IOB2 tag per word.

    White space at both ends of a span does not count. A span that cuts a word is an error, or grows
    to the whole word with align="widen".

    >>> to_bio("in New York", [(0, 2), (3, 6), (7, 11)], [Span(3, 11, "place")])
    ('O', 'B-place', 'I-place')

    Raises:
        DataError: a span is empty, lies outside the text, overlaps another, or cuts a word.
    """
    tags = ["O"] * len(words)
    previous: Span | None = None
    next_free = 0
    for span in sorted((_trim(text, span) for span in spans), key=lambda s: (s.start, s.end)):
        if previous is not None and span.start < previous.end:
            raise DataError(f"The {_show(text, span)} overlaps the {_show(text, previous)}.")
        first, last = _covered_words(text, words, span, next_free, align)
        if tags[first] != "O":
            shared = text[slice(*words[first])]
            raise DataError(
                f"The {_show(text, span)} shares the word {shared!r} with another span."
            )
        tags[first : last + 1] = [f"B-{span.label}"] + [f"I-{span.label}"] * (last - first)
        previous, next_free = span, last
    return tuple(tags)


def _trim(text: str, span: Span) -> Span:
    if not 0 <= span.start <= span.end <= len(text):
        raise DataError(
            f"The span {span.start}..{span.end} ({span.label}) lies outside the text, "
            f"which has {len(text)} characters."
        )
    inside = text[span.start : span.end]
    start = span.start + len(inside) - len(inside.lstrip())
    end = span.end - len(inside) + len(inside.rstrip())
    if start >= end:
        raise DataError(f"The span {span.start}..{span.end} ({span.label}) holds no text.")
    return Span(start, end, span.label, span.score)


def _covered_words(
    text: str, words: Words, span: Span, search_from: int, align: str
) -> tuple[int, int]:
    """Indices of the first and the last word that the span touches."""
    first = search_from
    while first < len(words) and words[first][1] <= span.start:
        first += 1
    last = first
    while last + 1 < len(words) and words[last + 1][0] < span.end:
        last += 1
    if first == len(words) or words[first][0] >= span.end:
        raise DataError(f"The {_show(text, span)} holds no word.")
    for start, end in (words[first], words[last]):
        if align == "error" and (start < span.start or end > span.end):
            raise DataError(
                f"The {_show(text, span)} cuts the word {text[start:end]!r} ({start}..{end}). "
                'Move its ends, or set data.align = "widen" to take whole words.'
            )
    return first, last


def _show(text: str, span: Span) -> str:
    return f"span {span.start}..{span.end} {text[span.start : span.end]!r} ({span.label})"


def from_bio(
    words: Words, tags: Sequence[str], scores: Sequence[float] | None = None
) -> tuple[Span, ...]:
    """The spans that the tags of a prediction describe.

    An I- tag that does not continue a span of its own type opens a new one: the reading of the
    conlleval script and of seqeval's default mode. scores holds one number per word; a span is as
    sure as its least sure word.

    >>> from_bio([(0, 2), (3, 6), (7, 11)], ["O", "B-place", "I-place"])
    (Span(start=3, end=11, label='place', score=None),)
    """
    assert len(words) == len(tags)
    groups: list[tuple[int, int]] = []  # indices of words, end exclusive
    for index, tag in enumerate(tags):
        if tag == "O":
            continue
        if tag[0] == "I" and groups and groups[-1][1] == index and tags[index - 1][2:] == tag[2:]:
            groups[-1] = (groups[-1][0], index + 1)
        else:
            groups.append((index, index + 1))
    return tuple(
        Span(
            words[first][0],
            words[end - 1][1],
            tags[first][2:],
            None if scores is None else min(scores[first:end]),
        )
        for first, end in groups
    )


def check_bio(tags: Sequence[str]) -> int | None:
    """Index of the first I- tag without a B- or I- of its type before it, or None.

    >>> check_bio(["O", "I-place"])
    1
    """
    previous = "O"
    for index, tag in enumerate(tags):
        if tag.startswith("I-") and (previous == "O" or previous[2:] != tag[2:]):
            return index
        previous = tag
    return None
