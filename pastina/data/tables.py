"""Records (named values) out of csv, tsv, jsonl and parquet files, one at a time."""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pastina.data.files import read_lines
from pastina.errors import DataError, need


@dataclass(frozen=True, slots=True)
class Record:
    """Named values of one row of a file, and where they stand: "file, line 12"."""

    values: dict[str, Any]
    where: str


def read_records(path: Path, format: str) -> Iterator[Record]:
    """The records of a csv, tsv, jsonl or parquet file, lazily: it may be larger than memory."""
    return {"csv": _csv, "tsv": _tsv, "jsonl": _jsonl, "parquet": _parquet}[format](path)


def _csv(path: Path) -> Iterator[Record]:
    header = next((line for line in read_lines(path, newline="") if line.strip()), "")
    # Spreadsheets write semicolons where the comma is the decimal sign.
    delimiter = next((sign for sign in ",;\t" if sign in header), ",")
    lines = read_lines(path, newline="")
    return _records(path, csv.reader(lines, delimiter=delimiter, strict=True))


def _tsv(path: Path) -> Iterator[Record]:
    # text/tab-separated-values knows no quoting: a quote is a character like any other.
    lines = read_lines(path, newline="")
    return _records(path, csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True))


def _records(path: Path, reader: Any) -> Iterator[Record]:
    header: list[str] | None = None
    for line, fields in _numbered(path, reader):
        where = f"{path}, line {line}"
        if not fields:
            continue
        if header is None:
            header = fields
            check_header(header, where)
        elif len(fields) != len(header):
            raise DataError(
                f"{where}: {len(fields)} fields, but the header has {len(header)} "
                f"({', '.join(header)}). Quote fields that hold the separator."
            )
        else:
            yield Record(dict(zip(header, fields, strict=True)), where)


def _numbered(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Each row with the line on which it begins (a quoted field may hold line breaks)."""
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, line {line}: not valid CSV ({error}). Look for a quote that is not "
                "closed or not doubled."
            ) from None
        yield line, fields


def check_header(names: Iterable[str], where: str) -> None:
    """Raises a DataError when two columns have the same name."""
    seen: set[str] = set()
    for number, name in enumerate(names, 1):
        if name in seen:
            raise DataError(
                f"{where}, column {number}: the name {name!r} stands twice. Rename one of them."
            )
        seen.add(name)


def _jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        values = parse_json(line, path, number)
        if not isinstance(values, dict):
            raise DataError(
                f'{where}: {type(values).__name__} instead of an object like {{"text": ...}}. '
                "JSONL has one object per line."
            )
        yield Record(values, where)


def parse_json(content: str, path: Path, line: int = 1) -> Any:
    """The value of a JSON text that begins on this line of the file."""
    try:
        return json.loads(content, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {line + error.lineno - 1}, column {error.colno}: not valid JSON: "
            f"{error.msg}. Correct or remove it."
        ) from None
    except RecursionError:
        raise DataError(f"{path}, line {line}: JSON nested too deeply. Remove it.") from None
    except _DuplicateKeyError as error:
        raise DataError(
            f"{path}, line {line}: the key {error.args[0]!r} stands twice. Remove one of them."
        ) from None


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return values


def _parquet(path: Path) -> Iterator[Record]:
    parquet = need("pyarrow.parquet", "train")
    arrow = need("pyarrow", "train")
    try:
        with parquet.ParquetFile(path) as file:
            check_header(file.schema_arrow.names, str(path))
            names = _class_names(file.schema_arrow.metadata or {})
            number = 0
            for batch in file.iter_batches(1024):
                for values in batch.to_pylist():
                    number += 1
                    named = {key: _name(value, names.get(key)) for key, value in values.items()}
                    yield Record(named, f"{path}, row {number}")
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file ({error}). Check data.format.") from None


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Class names that `datasets` writes beside numbered labels, by column."""
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    inner = {name: feature.get("feature", feature) for name, feature in features.items()}
    return {name: feature["names"] for name, feature in inner.items() if "names" in feature}


def _name(value: Any, names: list[str] | None) -> Any:
    if names is None or value is None:
        return value
    if isinstance(value, list):
        return [_name(item, names) for item in value]
    return names[value] if 0 <= value < len(names) else None  # -1 stands for "no label"
