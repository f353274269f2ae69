"""CoNLL files: one word per line, its tag in the last column, white space between sentences."""

from collections.abc import Iterator
from pathlib import Path

from pastina.data.convert import check_order, check_tag, row_of_words
from pastina.data.files import read_lines
from pastina.data.rows import Row
from pastina.errors import DataError


def read_conll(path: Path) -> Iterator[Row]:
    """One row per sentence.

    Columns are separated by tabs, or by spaces where the first word line has no tab; the first is
    the word and the last its IOB2 tag. Lines of white space end a sentence; `-DOCSTART-` lines are
    skipped.
    """
    separator: str | None = None
    num_columns = 0
    words: list[tuple[str, str]] = []
    number = 0
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip() or line.startswith("-DOCSTART-"):
            if words:
                yield _sentence(words, path, number - len(words))
                words = []
            continue
        if separator is None:
            separator = "\t" if "\t" in line else " "
        fields = _fields(line, separator)
        num_columns = num_columns or len(fields)
        words.append(_word(fields, num_columns, f"{path}, line {number}"))
    if words:
        yield _sentence(words, path, number - len(words) + 1)


def _fields(line: str, separator: str) -> list[str]:
    if separator == "\t":
        return line.rstrip("\n").split("\t")
    return [field for field in line.rstrip("\n").split(" ") if field]


def _word(fields: list[str], num_columns: int, where: str) -> tuple[str, str]:
    if len(fields) != num_columns or num_columns < 2:
        wanted = max(num_columns, 2)
        raise DataError(
            f"{where}: {len(fields)} column{'s' * (len(fields) != 1)} instead of {wanted}. "
            "Every line holds a word and its tag, separated by a tab."
        )
    if not fields[0].strip():
        raise DataError(
            f"{where}, column 1: the word is empty. Remove the line, or write the word."
        )
    return fields[0], check_tag(fields[-1].strip(), f"{where}, column {num_columns}")


def _sentence(words: list[tuple[str, str]], path: Path, first_line: int) -> Row:
    tokens, tags = zip(*words, strict=True)
    check_order(tags, lambda index: f"{path}, line {first_line + index}")
    return row_of_words(tokens, tags, f"{path}, line {first_line}")
