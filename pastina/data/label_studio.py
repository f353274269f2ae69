"""Label Studio's JSON export: an array of tasks, each with its data and its annotations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pastina.data.columns import Columns, find_columns
from pastina.data.convert import check_text, row_of_spans, to_row
from pastina.data.files import read_lines
from pastina.data.rows import Row
from pastina.data.tables import Record, parse_json
from pastina.errors import DataError
from pastina.recipe import DataSpec
from pastina.spans import Span


def read_label_studio(path: Path, kind: str, spec: DataSpec) -> Iterator[Row]:
    """One row per task, labelled by its first annotation that is not cancelled.

    Choices are read for classify and multilabel, labelled stretches for tag, ratings and numbers
    for regress. A task whose annotations were all cancelled is skipped; one without any is an
    error.
    """
    tasks = parse_json("".join(read_lines(path)), path)
    if not isinstance(tasks, list):
        raise DataError(f"{path}: not an array of tasks. Export from Label Studio as JSON.")
    for number, task in enumerate(tasks, 1):
        where = f"{path}, task {number}"
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
            raise DataError(
                f'{where}: no "data" in it. Export from Label Studio as JSON, not JSON-MIN; other '
                "tables of records belong in JSONL."
            )
        if "id" in task:
            where += f" (id {task['id']})"
        result = _result(task, where)
        if result is not None:
            yield _row(task["data"], result, kind, spec, where)


def _result(task: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    annotations = task.get("annotations")
    if not annotations:
        raise DataError(f"{where}: no annotation. Label the task, or leave it out of the export.")
    for annotation in annotations:
        if not annotation.get("was_cancelled"):
            return annotation.get("result") or []
    return None


def _row(
    data: dict[str, Any], result: list[dict[str, Any]], kind: str, spec: DataSpec, where: str
) -> Row:
    strings = [name for name, value in data.items() if isinstance(value, str)]
    columns = find_columns(strings, kind, spec.model_copy(update={"label": None}), where, False)
    if kind == "tag":
        text = check_text(data[columns.text], where)
        spans = [_span(text, item["value"], where) for item in _of_type(result, "labels")]
        return row_of_spans(text, spans, spec.align, where)
    value = _target(result, kind, where)
    columns = Columns(columns.text, columns.text_pair, "annotation")
    return to_row(Record({**data, "annotation": value}, where), columns, kind)


def _of_type(result: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [item for item in result if key in item.get("value", {})]


def _target(result: list[dict[str, Any]], kind: str, where: str) -> Any:
    if kind == "regress":
        keys = ("rating", "number")
        numbers = [item["value"][key] for key in keys for item in _of_type(result, key)]
        return _one(numbers, "rating or number", where)
    choices = [c for item in _of_type(result, "choices") for c in item["value"]["choices"]]
    return choices if kind == "multilabel" else _one(choices, "choice", where)


def _one(values: list[Any], what: str, where: str) -> Any:
    if len(values) == 1:
        return values[0]
    seen = ", ".join(map(repr, values)) or "none"
    raise DataError(f"{where}: one {what} is needed; seen: {seen}. Correct the annotation.")


def _span(text: str, value: dict[str, Any], where: str) -> Span:
    labels = value["labels"]
    start, end = value.get("start"), value.get("end")
    if len(labels) != 1 or type(start) is not int or type(end) is not int:
        raise DataError(
            f"{where}: a stretch from {start!r} to {end!r} with the labels {labels}. "
            "Each needs whole numbers and exactly one label."
        )
    quoted = value.get("text")
    if isinstance(quoted, str) and not _same(text[start:end], quoted):
        start, end = _from_utf16(text, start, end)
        if not _same(text[start:end], quoted):
            raise DataError(
                f"{where}: the stretch {value['start']}..{value['end']} ({labels[0]}) should read "
                f"{quoted!r}, but the text does not have it there. Was the text changed?"
            )
    return Span(start, end, labels[0])


def _same(found: str, quoted: str) -> bool:
    return "".join(found.split()) == "".join(quoted.replace("\\n", "\n").split())


def _from_utf16(text: str, start: int, end: int) -> tuple[int, int]:
    # Browsers count UTF-16 units: an emoji is two of them, but one character here.
    units = text.encode("utf-16-le")
    before, inside = units[: 2 * start], units[2 * start : 2 * end]
    first = len(before.decode("utf-16-le", "ignore"))
    return first, first + len(inside.decode("utf-16-le", "ignore"))
