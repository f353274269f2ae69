"""Texts from arguments, standard input or files into records of answers, as a stream."""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from pastina.adapter import Card
from pastina.data.files import find_file, read_lines
from pastina.data.read import iter_rows
from pastina.data.rows import Row
from pastina.errors import DataError
from pastina.files import whole_file
from pastina.predict import Predictor
from pastina.recipe import DataSpec

_CHUNK = 1024  # rows answered together; memory does not grow with the file
Source = Iterator[tuple[Row, dict[str, Any]]]
ANSWER_COLUMNS = {
    "classify": ("label", "score", "scores", "truncated", "error"),
    "multilabel": ("labels", "scores", "truncated", "error"),
    "regress": ("value", "truncated", "error"),
    "tag": ("spans", "truncated", "error"),
}


def read_texts(
    card: Card,
    texts: Sequence[str] | None,
    file: Path | None,
    stdin: IO[str],
    *,
    text_column: str | None = None,
    pair_column: str | None = None,
) -> Source:
    """Rows to answer, each with the record that the answer is added to.

    A .txt file is read like standard input: a text in each line, a pair with a TAB between.

    Raises:
        DataError: nothing to read; an odd number of texts for a task that reads pairs.
    """
    if file is not None and file.suffix.lower() == ".txt" and not (text_column or pair_column):
        return _from_lines(read_lines(find_file(file)), card.is_pair, str(file))
    if file is not None:
        spec = _columns(card, text_column, pair_column)
        return iter_rows(file, spec, card.kind)
    if texts:
        return _from_arguments(texts, card.is_pair)
    if stdin.isatty():
        raise DataError("No text to answer. Give texts, --file, or lines on standard input.")
    return _from_lines(_decoded(stdin), card.is_pair, "standard input")


def _columns(card: Card, text_column: str | None, pair_column: str | None) -> DataSpec:
    """The columns that are asked for, else those that the task was trained with."""
    if text_column is None and pair_column is None:
        trained = card.recipe["data"]
        text_column, pair_column = trained.get("text"), trained.get("text_pair")
    return DataSpec(text=text_column, text_pair=pair_column)


def answer_records(
    predictor: Predictor, source: Source, *, keep_going: bool = False
) -> Iterator[dict[str, Any]]:
    """Each record with its answer, in order.

    keep_going: a row that cannot be answered gets an `error` instead, and the others their answers.

    Columns of the file that are called like a part of the answer, such as the label that somebody
    gave to the text, become given_label and so on.
    """
    while chunk := list(islice(source, _CHUNK)):
        answers = _answer(predictor, [row for row, _ in chunk], keep_going)
        for (_, record), answer in zip(chunk, answers, strict=True):
            yield _keep_given(record, predictor.card.kind) | answer


def _answer(predictor: Predictor, rows: list[Row], keep_going: bool) -> list[dict[str, Any]]:
    try:
        return [answer.as_dict() for answer in predictor.predict_rows(rows)]
    except DataError as error:
        if not keep_going:
            raise
        if len(rows) == 1:
            return [{"error": str(error)}]
        middle = len(rows) // 2
        return [
            a for part in (rows[:middle], rows[middle:]) for a in _answer(predictor, part, True)
        ]


def _keep_given(record: dict[str, Any], kind: str) -> dict[str, Any]:
    """The record; a column that has the name of a part of the answer is kept as given_NAME."""
    kept: dict[str, Any] = {}
    for name, value in record.items():
        new = name
        while new in ANSWER_COLUMNS[kind] or new in kept or (new != name and new in record):
            new = f"given_{new}"
        kept[new] = value
    return kept


def write_records(
    records: Iterable[dict[str, Any]], out: Path | None, format: str, kind: str
) -> None:
    """Write the records as they come: to standard output, or to a file that appears when it is whole.

    Raises:
        DataError: `out` is a folder; a record does not fit the table.
    """
    if out is None:
        _write(records, sys.stdout, format, kind)
        return
    if out.is_dir():
        raise DataError(f"{out} is a folder. Name a file to write to.")
    with whole_file(out) as file:
        _write(records, file, format, kind)


def _write(records: Iterable[dict[str, Any]], file: IO[str], format: str, kind: str) -> None:
    lines = _jsonl_lines(records) if format == "jsonl" else _csv_lines(records, kind)
    for line in lines:
        file.write(line)
        file.flush()


def _jsonl_lines(records: Iterable[dict[str, Any]]) -> Iterator[str]:
    for record in records:
        yield json.dumps(record, ensure_ascii=False, default=str) + "\n"


def _csv_lines(records: Iterable[dict[str, Any]], kind: str) -> Iterator[str]:
    line = io.StringIO()
    writer = csv.DictWriter(line, [], restval="", lineterminator="\n")
    for number, record in enumerate(records, start=1):
        if not writer.fieldnames:
            writer.fieldnames = list(dict.fromkeys([*record, *ANSWER_COLUMNS[kind]]))
            writer.writeheader()
        if other := [name for name in record if name not in writer.fieldnames]:
            raise DataError(
                f"Row {number} has the column {other[0]!r}, which the first row does not have; a CSV "
                "table cannot hold that. Write jsonl."
            )
        writer.writerow({"truncated": False} | {name: _cell(v) for name, v in record.items()})
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def _cell(value: Any) -> Any:
    """Lists and tables stand in a CSV cell as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _from_arguments(texts: Sequence[str], is_pair: bool) -> Source:
    if not is_pair:
        for i, text in enumerate(texts):
            yield Row(text=text, where=f"text {i + 1}"), {"text": text}
        return
    if len(texts) % 2:
        raise DataError(f"This task reads pairs of texts; {len(texts)} texts were given.")
    for i in range(0, len(texts), 2):
        first, second = texts[i], texts[i + 1]
        row = Row(text=first, text_pair=second, where=f"pair {i // 2 + 1}")
        yield row, {"text": first, "text_pair": second}


def _decoded(lines: Iterable[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise DataError(f"Standard input is not UTF-8 ({error.reason}). Convert it.") from None


def _from_lines(lines: Iterable[str], is_pair: bool, name: str) -> Source:
    for number, line in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        line = line.rstrip("\n")
        if not is_pair:
            yield Row(text=line, where=where), {"text": line}
            continue
        first, tab, second = line.partition("\t")
        if not tab:
            raise DataError(f"{where}: this task reads pairs of texts, with a TAB between the two.")
        row = Row(text=first, text_pair=second, where=where)
        yield row, {"text": first, "text_pair": second}
