"""The readers against public data sets, where they are at hand."""

from pathlib import Path

import pytest

from pastina.data.read import load_dataset, read_rows
from pastina.recipe import DataSpec

FILES = [
    ("banking77/train.csv", "classify", 10_003),
    ("banking77/test.csv", "classify", 3_080),
    ("clinc150/train.jsonl", "classify", 15_000),
    ("clinc150/dev.jsonl", "classify", 3_000),
    ("clinc150/test.jsonl", "classify", 4_500),
    ("clinc150/oos_train.jsonl", "classify", 100),
    ("clinc150/oos_dev.jsonl", "classify", 100),
    ("clinc150/oos_test.jsonl", "classify", 1_000),
    ("snips/intent_train.jsonl", "classify", 13_084),
    ("snips/intent_dev.jsonl", "classify", 700),
    ("snips/intent_test.jsonl", "classify", 700),
    ("snips/slots_train.jsonl", "tag", 13_084),
    ("snips/slots_dev.jsonl", "tag", 700),
    ("snips/slots_test.jsonl", "tag", 700),
    ("wnut17/train.conll", "tag", 3_394),
    ("wnut17/dev.conll", "tag", 1_009),
    ("wnut17/test.conll", "tag", 1_287),
    ("bc5cdr/train.tsv", "tag", 4_560),
    ("bc5cdr/dev.tsv", "tag", 4_581),
    ("bc5cdr/test.tsv", "tag", 4_797),
    ("qnli/train.jsonl", "classify", 4_463),
    ("qnli/test.jsonl", "classify", 1_000),
    ("stsb/train.jsonl", "regress", 3_749),
    ("stsb/dev.jsonl", "regress", 1_000),
    ("stsb/test.jsonl", "regress", 879),
]


@pytest.mark.parametrize(("name", "kind", "num_rows"), FILES)
def test_every_row_is_read(shared: Path, name: str, kind: str, num_rows: int):
    rows = read_rows(shared / name, kind, DataSpec())
    assert len(rows) == num_rows
    for row in rows:
        assert row.where.startswith(f"{shared / name}, line ")
        assert (row.text_pair is not None) == (name.split("/")[0] in ("qnli", "stsb"))
        if kind == "tag":
            assert row.words
            assert row.tags
            assert len(row.words) == len(row.tags)
            assert row.text.split(" ") == [row.text[start:end] for start, end in row.words]


@pytest.mark.parametrize(
    ("folder", "kind", "names", "num_labels"),
    [
        ("clinc150", "classify", ("train.jsonl", "dev.jsonl", "test.jsonl"), 150),
        ("banking77", "classify", ("train.csv", None, "test.csv"), 77),
        ("snips", "tag", ("slots_train.jsonl", "slots_dev.jsonl", "slots_test.jsonl"), 39),
        ("wnut17", "tag", ("train.conll", "dev.conll", "test.conll"), 6),
        ("bc5cdr", "tag", ("train.tsv", "dev.tsv", "test.tsv"), 2),
        ("stsb", "regress", ("train.jsonl", "dev.jsonl", "test.jsonl"), 0),
    ],
)
def test_whole_data_sets(
    shared: Path, folder: str, kind: str, names: tuple[str, str | None, str], num_labels: int
):
    train, dev, test = names
    spec = DataSpec(folder=str(shared / folder), train=train, dev=dev, test=test)
    dataset = load_dataset(kind, spec, seed=1)
    assert len(dataset.labels) == num_labels
    assert list(dataset.labels) == sorted(dataset.labels)
    assert min(len(dataset.train), len(dataset.dev), len(dataset.test)) > 0


def test_a_quoted_line_break_does_not_shift_the_line_numbers(shared: Path):
    path = shared / "banking77" / "train.csv"
    last = read_rows(path, "classify", DataSpec())[-1]
    line = int(last.where.rsplit(" ", 1)[1])
    assert path.read_text("utf-8").split("\n")[line - 1].startswith(last.text[:20])
