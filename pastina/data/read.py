"""Data files become rows: one file, a whole data set, or a stream for prediction."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pastina.data.columns import find_columns
from pastina.data.conll import read_conll
from pastina.data.convert import to_row
from pastina.data.files import find_file, guess_format
from pastina.data.hub import read_hub
from pastina.data.label_studio import read_label_studio
from pastina.data.rows import Dataset, Row
from pastina.data.split import cut_dev, limit_rows, split_dev
from pastina.data.tables import Record, read_records
from pastina.errors import DataError
from pastina.recipe import DataSpec


def read_rows(path: str | Path, kind: str, spec: DataSpec) -> list[Row]:
    """The labelled rows of one file.

    Raises:
        DataError: anything is wrong with it; the text names file, line and column.
    """
    path = find_file(path)
    format = _format(path, kind, spec)
    if format == "conll":
        if kind != "tag":
            raise DataError(f"{path}: CoNLL files hold tags. Set kind to tag, not {kind}.")
        rows = list(read_conll(path))
    elif format == "label-studio":
        rows = list(read_label_studio(path, kind, spec))
    else:
        rows = [row for row, _ in _table_rows(path, format, kind, spec, labelled=True)]
    if not rows:
        raise DataError(f"{path}: no rows in it. Check the file.")
    return rows


def iter_rows(
    path: str | Path, spec: DataSpec, kind: str = "classify"
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Rows without labels, each with its record, one at a time: for files of any size.

    Reads csv, tsv, jsonl and parquet. No label column is needed; the record holds all columns.
    """
    path = find_file(path)
    format = guess_format(path) if spec.format == "auto" else spec.format
    if format in ("conll", "label-studio"):
        raise DataError(
            f"{path}: prediction reads csv, tsv, jsonl and parquet, not {format}. Convert the file."
        )
    rows = _table_rows(path, format, kind, spec, labelled=False)
    return ((row, record.values) for row, record in rows)


def load_dataset(kind: str, spec: DataSpec, seed: int) -> Dataset:
    """The parts that the recipe names, checked against each other.

    Without a dev part, one is drawn from the training rows. Label names come from all training
    rows, also those that `dev_share`, `dev_rows` or `limit` takes away.
    """
    parts = read_hub(kind, spec) if spec.hub else _read_files(kind, spec)
    train, dev, test = parts
    labels = label_names(train, kind)
    if not dev:
        train, dev = split_dev(train, kind, spec.dev_share, seed, spec.dev_rows)
    for name, rows in (("dev", dev), ("test", test)):
        check_labels(rows, kind, labels, name)
    train = limit_rows(train, kind, spec.limit, seed)
    dev = cut_dev(dev, kind, spec.dev_rows, seed)
    return Dataset(train, dev, test, labels, digest_rows(train, dev, test))


def label_names(rows: Sequence[Row], kind: str) -> tuple[str, ...]:
    """The sorted class names or span types of training rows; none for regress.

    Raises:
        DataError: there is nothing to learn: one class only, or no label anywhere.
    """
    if kind == "regress":
        return ()
    names = tuple(sorted({name for row in rows for name in _names(row, kind)}))
    if not names:
        what = "span" if kind == "tag" else "label"
        raise DataError(f"{_source(rows)}: no row has a {what}. Check the label column.")
    if kind == "classify" and len(names) == 1:
        raise DataError(
            f"{_source(rows)}: every row has the label {names[0]!r}. Training needs two classes "
            "or more; check the label column."
        )
    return names


def check_labels(rows: Sequence[Row], kind: str, labels: Sequence[str], part: str) -> None:
    """Raises a DataError when a row has a label that is not among these."""
    known = set(labels)
    for row in rows:
        for name in _names(row, kind):
            if name not in known:
                raise DataError(
                    f"{row.where}: the label {name!r} of the {part} part does not occur in the "
                    f"training part ({_some(labels)}). Add training rows for it, or correct it."
                )


def digest_rows(*parts: Sequence[Row]) -> str:
    """SHA-256 over the content of all rows of all parts, in order; not over where they stand."""
    digest = hashlib.sha256()
    for rows in parts:
        for row in rows:
            content = (row.text, row.text_pair, row.label, row.words, row.tags)
            digest.update(json.dumps(content).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def _names(row: Row, kind: str) -> Sequence[str]:
    if kind == "tag":
        return [tag[2:] for tag in row.tags or () if tag != "O"]
    if isinstance(row.label, tuple):
        return row.label
    return [row.label] if isinstance(row.label, str) else []


def _source(rows: Sequence[Row]) -> str:
    return rows[0].where.rsplit(", ", 1)[0]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _format(path: Path, kind: str, spec: DataSpec) -> str:
    format = guess_format(path, kind) if spec.format == "auto" else spec.format
    if kind == "tag" and format in ("csv", "tsv"):
        raise DataError(
            f"{path}: a {format} table cannot hold tags. Use JSONL (text and spans, or tokens and "
            "tags) or CoNLL."
        )
    return format


def _table_rows(
    path: Path, format: str, kind: str, spec: DataSpec, *, labelled: bool
) -> Iterator[tuple[Row, Record]]:
    records = read_records(path, format)
    first = next(records, None)
    if first is None:
        return
    where = f"{path}, line 1" if format in ("csv", "tsv") else first.where
    columns = find_columns(list(first.values), kind, spec, where, labelled)
    for record in chain([first], records):
        yield to_row(record, columns, kind, spec.align), record


def _read_files(kind: str, spec: DataSpec) -> tuple[list[Row], list[Row], list[Row]]:
    if spec.train is None:
        raise DataError("No training data is named. Set data.train to a file, or data.hub.")
    train, dev, test = (
        [] if name is None else read_rows(Path(spec.folder) / name, kind, spec)
        for name in (spec.train, spec.dev, spec.test)
    )
    return train, dev, test
