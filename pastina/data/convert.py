"""A record becomes a Row: texts are checked, labels read the way the kind needs them."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NoReturn

from pastina.data.columns import Columns
from pastina.data.rows import Row
from pastina.data.tables import Record
from pastina.errors import DataError
from pastina.spans import Span, check_bio, split_words, to_bio

Align = Literal["error", "widen"]


def to_row(record: Record, columns: Columns, kind: str, align: Align = "error") -> Row:
    """The row that a record describes; without a label where columns.label is None."""
    if kind == "tag":
        return _tag_row(record, columns, align)
    text = _text(record, columns.text)
    pair = None if columns.text_pair is None else _text(record, columns.text_pair)
    label = None
    if columns.label is not None:
        value, where = _value(record, columns.label), f"{record.where}, column {columns.label!r}"
        label = LABEL_READERS[kind](value, where)
    return Row(text, pair, label, where=record.where)


def class_label(value: Any, where: str) -> str:
    """One class name; whole numbers become strings."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    if value is None or isinstance(value, str):
        _fail(where, "the label is empty", "Give every row one label")
    what = "a list, which only the kinds multilabel and tag read" if isinstance(value, list) else ""
    _fail(where, f"{value!r} is {what or 'not a class name'}", "Write one word or whole number")


def class_labels(value: Any, where: str) -> tuple[str, ...]:
    """Class names, sorted, each once: a list, or a string split at `;`, else `|`, else `,`.

    None and an empty string mean that no class applies. A name that holds one of these signs needs
    the form of a JSON list: ["a, b", "c"].
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            _fail(where, f"{value!r} is not a JSON list ({error.msg})", "Correct it")
    if isinstance(value, str):
        mark = next((mark for mark in ";|" if mark in value), ",")
        value = [name for name in value.split(mark) if name.strip()]
    if not isinstance(value, list):
        value = [] if value is None else [value]
    return tuple(sorted({class_label(name, where) for name in value}))


def number_label(value: Any, where: str) -> float:
    """A finite number."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        number = float(value)
    except ValueError:
        _fail(where, f"{value!r} is not a number", "The kind regress needs one in every row")
    if not math.isfinite(number):
        _fail(where, f"{value!r} is not a finite number", "Correct or remove the row")
    if abs(number) > 1e30:
        _fail(where, f"{value!r} is too large a number", "Give the targets in another unit")
    return number


LABEL_READERS = {"classify": class_label, "multilabel": class_labels, "regress": number_label}


def row_of_words(tokens: Sequence[str], tags: Sequence[str] | None, where: str) -> Row:
    """A row for tagging whose text is the words with one space between them."""
    ends: list[tuple[int, int]] = []
    start = 0
    for token in tokens:
        ends.append((start, start + len(token)))
        start += len(token) + 1
    tags = None if tags is None else tuple(tags)
    return Row(" ".join(tokens), words=tuple(ends), tags=tags, where=where)


def row_of_spans(text: str, spans: Iterable[Span], align: Align, where: str) -> Row:
    """A row for tagging out of a text and its labelled stretches."""
    words = split_words(text)
    try:
        tags = to_bio(text, words, spans, align)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return Row(text, words=words, tags=tags, where=where)


def check_tag(tag: Any, where: str) -> str:
    """The tag, when it is O, B-type or I-type."""
    if isinstance(tag, str) and (tag == "O" or (tag[:2] in ("B-", "I-") and tag[2:].strip())):
        return tag
    _fail(where, f"{tag!r} is not a tag", "Tags are O, B-type and I-type (the scheme IOB2)")


def check_order(tags: Sequence[str], index_to_where: Callable[[int], str]) -> None:
    """Raises a DataError when an I- tag continues nothing."""
    index = check_bio(tags)
    if index is not None:
        before = repr(tags[index - 1]) if index else "the start of the sentence"
        _fail(
            index_to_where(index),
            f"the tag {tags[index]!r} follows {before}, so it continues nothing",
            f"A span begins with {'B' + tags[index][1:]!r} (the scheme IOB2)",
        )


def check_text(value: Any, where: str) -> str:
    """The text, when it is one: a string with something in it."""
    if not isinstance(value, str):
        _fail(where, f"{_short(value)} is not a text", "Put it in quotes, or choose another column")
    if not value.strip():
        _fail(where, "the text is empty", "Fill or remove the row")
    if not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
        _fail(where, "the text holds half of a character (a lone surrogate)", "Write it again")
    return value


def _tag_row(record: Record, columns: Columns, align: Align) -> Row:
    source = _value(record, columns.text)
    where = f"{record.where}, column {columns.text!r}"
    if not isinstance(source, list):
        return _text_row(check_text(source, where), record, columns, align)
    if not source:
        _fail(where, "the list of words is empty", "Fill or remove the row")
    tokens = [check_text(token, f"{where}, word {n}") for n, token in enumerate(source, 1)]
    if columns.label is None:
        return row_of_words(tokens, None, record.where)
    tags, place = _value(record, columns.label), f"{record.where}, column {columns.label!r}"
    if not isinstance(tags, list) or len(tags) != len(tokens):
        num_tags = len(tags) if isinstance(tags, list) else 0
        seen = f"{num_tags} tag{'s' * (num_tags != 1)}" if num_tags else _short(tags)
        _fail(place, f"{len(tokens)} words, but {seen}", "Give one tag per word")
    tags = [check_tag(tag, f"{place}, word {n}") for n, tag in enumerate(tags, 1)]
    check_order(tags, lambda index: f"{place}, word {index + 1}")
    return row_of_words(tokens, tags, record.where)


def _text_row(text: str, record: Record, columns: Columns, align: Align) -> Row:
    if columns.label is None:
        return Row(text, words=split_words(text), where=record.where)
    where = f"{record.where}, column {columns.label!r}"
    spans = _value(record, columns.label)
    if not isinstance(spans, list):
        _fail(where, f"{_short(spans)} is not a list of spans", SPAN_FORM)
    row = row_of_spans(text, [_span(span, where) for span in spans], align, where)
    return replace(row, where=record.where)


SPAN_FORM = 'A span is {"start": 0, "end": 5, "label": "name"} or [0, 5, "name"]'


def _span(value: Any, where: str) -> Span:
    if isinstance(value, dict):
        value = [value.get(key) for key in ("start", "end", "label")]
    match value:
        case [int(start), int(end), str(label)] if label.strip() and not isinstance(start, bool):
            return Span(start, end, label.strip())
    _fail(where, f"{_short(value)} is not a span", SPAN_FORM)


def _text(record: Record, column: str) -> str:
    return check_text(_value(record, column), f"{record.where}, column {column!r}")


def _value(record: Record, column: str) -> Any:
    if column not in record.values:
        seen = ", ".join(map(repr, record.values)) or "none"
        raise DataError(
            f"{record.where}: the column {column!r} is missing; seen: {seen}. Add it to this row."
        )
    return record.values[column]


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _fail(where: str, what: str, advice: str) -> NoReturn:
    raise DataError(f"{where}: {what}. {advice}.")
