"""Finds a data file, tells its format, and yields its lines; whatever is wrong is named by line."""

import difflib
from collections.abc import Iterator
from pathlib import Path

from pastina.errors import DataError

ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".conll": "conll",
    ".bio": "conll",
    ".iob2": "conll",
}


def find_file(path: str | Path) -> Path:
    """The path of a file that exists.

    Raises:
        DataError: nothing is there (names that look similar are shown), or it is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder, but a file is needed. Name one file in it.")
    if path.is_file():
        return path
    if not path.parent.is_dir():
        raise DataError(f"{path} does not exist: there is no folder {path.parent}.")
    names = [other.name for other in path.parent.iterdir() if other.is_file()]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f" Similar files there: {', '.join(near)}." if near else " Check the path."
    raise DataError(f"{path} does not exist.{hint}")


def guess_format(path: Path, kind: str | None = None) -> str:
    """The format of a file, from its ending and, for .json, its first sign.

    Tagging reads .tsv and .txt as `token TAB tag`, because a plain table cannot hold tags.
    """
    ending = path.suffix.lower()
    if kind == "tag" and ending in (".tsv", ".txt"):
        return "conll"
    if ending == ".json":
        first = next((line.strip() for line in read_lines(path) if line.strip()), "")
        return "label-studio" if first.startswith("[") else "jsonl"
    if ending in ENDINGS:
        return ENDINGS[ending]
    raise DataError(
        f"{path}: the ending {ending!r} tells no format. Set data.format to one of csv, tsv, "
        "jsonl, parquet, conll, label-studio."
    )


def read_lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """The lines of a UTF-8 file, with or without a byte order mark."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as lines:
            for number, line in enumerate(lines, 1):
                if "\0" in line:
                    raise DataError(
                        f"{path}, line {number}, column {line.index(chr(0)) + 1}: a NUL byte. "
                        "The file is binary or UTF-16; save it as UTF-8 text."
                    )
                yield line
    except UnicodeDecodeError:
        raise DataError(_encoding_message(path)) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _encoding_message(path: Path) -> str:
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                return f"{path}: the file is UTF-16, not UTF-8. Save it as UTF-8."
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"{path}, line {number}, column {error.start + 1}: the byte "
                    f"0x{line[error.start]:02x} (offset {offset + error.start} in the file) is not "
                    "UTF-8. Save the file as UTF-8."
                )
            offset += len(line)
    return f"{path}: the file is not UTF-8. Save it as UTF-8."
