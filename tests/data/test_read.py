import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pastina.data.convert import class_labels
from pastina.data.files import guess_format
from pastina.data.read import digest_rows, iter_rows, load_dataset, read_rows
from pastina.data.rows import Row
from pastina.data.samples import sample_path
from pastina.data.split import limit_rows, split_dev
from pastina.errors import DataError
from pastina.recipe import DataSpec
from pastina.spans import from_bio

Write = Callable[[str, str | bytes], str]


def read(name: str, kind: str = "classify", **options: object) -> list[Row]:
    return read_rows(name, kind, DataSpec.model_validate(options))


def content(rows: list[Row]) -> list[tuple[str, object]]:
    return [(row.text, row.label) for row in rows]


def spans(row: Row) -> list[tuple[str, str]]:
    assert row.words is not None
    assert row.tags is not None
    return [(row.text[s.start : s.end], s.label) for s in from_bio(row.words, row.tags)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'text,label\nhello,1\n"good, bye",2\n'),
        ("a.csv", '\ufeffText , Label\r\nhello,1\r\n"good, bye",2\r\n'),
        ("a.csv", "text;label\nhello;1\ngood, bye;2\n"),
        ("a.csv", "text\tlabel\nhello\t1\ngood, bye\t2"),
        ("a.csv", 'id,LABEL,text\n7,1,hello\n\n8, 2 ,"good, bye"\n'),
        ("a.tsv", "text\tlabel\nhello\t1\ngood, bye\t2\n"),
        ("a.jsonl", '{"text": "hello", "label": 1}\n\n{"text": "good, bye", "label": "2"}\n'),
        ("a.ndjson", '\ufeff{"text": "hello", "label": 1}\n{"label": 2, "text": "good, bye"}\n'),
        ("a.json", '{"text": "hello", "label": 1}\n{"text": "good, bye", "label": 2}\n'),
    ],
)
def test_tables_of_all_forms(write: Write, name: str, text: str):
    assert content(read(write(name, text))) == [("hello", "1"), ("good, bye", "2")]


def test_a_tsv_has_no_quotes(write: Write):
    rows = read(write("a.tsv", 'text\tlabel\n"hello" he said\tx\n'))
    assert rows[0].text == '"hello" he said'


def test_lines_are_those_of_the_file(write: Write):
    rows = read(write("a.csv", 'text,label\n"one\ntwo",x\n\nthree,y\n'))
    assert [row.where for row in rows] == ["a.csv, line 2", "a.csv, line 5"]
    assert rows[0].text == "one\ntwo"


@pytest.mark.parametrize(
    "columns",
    [
        ("text", "text_pair"),
        ("sentence1", "sentence2"),
        ("Premise", "Hypothesis"),
        ("question", "sentence"),
        ("question", "answer"),
        ("query", "passage"),
    ],
)
def test_pairs_are_found_by_name_in_any_order(write: Write, columns: tuple[str, str]):
    first, second = columns
    name = write("a.jsonl", json.dumps({second: "b", "idx": 0, "label": "x", first: "a"}))
    row = read(name)[0]
    assert (row.text, row.text_pair) == ("a", "b")


def test_named_columns_win(write: Write):
    name = write("a.csv", "question,answer,label,topic\nq,a,1,2\n")
    assert read(name, text="answer", label="topic") == [Row("a", label="2", where="a.csv, line 2")]
    row = read(name, text="Answer", text_pair="question")[0]
    assert (row.text, row.text_pair, row.label) == ("a", "q", "1")
    assert read(name, text_pair="answer")[0].text == "q"


def test_numbers_and_truth_values_are_class_names(write: Write):
    name = write("a.jsonl", '{"text": "a", "label": true}\n{"text": "b", "label": -1}\n')
    assert content(read(name)) == [("a", "true"), ("b", "-1")]


def test_regress(write: Write):
    name = write("a.csv", "sentence1,sentence2,score\na,b,4.5\nc,d,3\n")
    assert [row.label for row in read(name, "regress")] == [4.5, 3.0]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("b; a", ("a", "b")),
        ("a|b|a", ("a", "b")),
        ("a, b,", ("a", "b")),
        ("", ()),
        (None, ()),
        ([], ()),
        (["x, y", 3], ("3", "x, y")),
        ('["x, y"]', ("x, y",)),
        (7, ("7",)),
    ],
)
def test_multilabel(value: Any, names: tuple[str, ...]):
    assert class_labels(value, "here") == names


@given(st.sets(st.text(st.characters(categories=["L", "N"]), min_size=1)), st.sampled_from(";|,"))
@settings(deadline=None)
def test_labels_survive_all_ways_to_write_them(names: set[str], sign: str):
    expected = tuple(sorted(names))
    assert class_labels(sign.join(names), "here") == expected
    assert class_labels(json.dumps(list(names)), "here") == expected
    assert class_labels(list(names), "here") == expected


CONLL = "-DOCSTART- -X- O\n\nNew NNP B-loc\nYork NNP I-loc\n \n\t\nis VBZ O\n"


@pytest.mark.parametrize("separator", [" ", "\t", "  "])
def test_conll(write: Write, separator: str):
    rows = read(write("a.conll", CONLL.replace(" ", separator)), "tag")
    assert [row.text for row in rows] == ["New York", "is"]
    assert [row.where for row in rows] == ["a.conll, line 3", "a.conll, line 7"]
    assert rows[0].tags == ("B-loc", "I-loc")
    assert rows[0].words == ((0, 3), (4, 8))


def test_words_of_no_width_survive(write: Write):
    rows = read(write("a.conll", "a\tO\n\u200d\tO\n\ufe0f\tB-x\n"), "tag")
    assert rows[0].words == ((0, 1), (2, 3), (4, 5))


@pytest.mark.parametrize(
    "record",
    [
        {"text": "in New York", "spans": [{"start": 3, "end": 11, "label": "loc"}]},
        {"text": "in New York", "label": [[3, 11, "loc"]]},
        {"tokens": ["in", "New", "York"], "tags": ["O", "B-loc", "I-loc"]},
        {
            "id": 1,
            "tokens": ["in", "New", "York"],
            "pos_tags": [1, 2, 2],
            "NER_tags": ["O", "B-loc", "I-loc"],
        },
        {"tokens": ["in", "New", "York"], "tags": ["O", "B-loc", "I-loc"], "text": "in New York"},
    ],
)
def test_tagging_records(write: Write, record: dict[str, object]):
    row = read(write("a.jsonl", json.dumps(record)), "tag")[0]
    assert row == Row(
        "in New York",
        words=((0, 2), (3, 6), (7, 11)),
        tags=("O", "B-loc", "I-loc"),
        where="a.jsonl, line 1",
    )


def test_a_span_may_grow_to_whole_words(write: Write):
    name = write("a.jsonl", '{"text": "in Yorkshire", "spans": [[3, 7, "loc"]]}')
    assert spans(read(name, "tag", align="widen")[0]) == [("Yorkshire", "loc")]


def task(text: str, *values: dict[str, object], **more: object) -> dict[str, object]:
    result = [{"from_name": "x", "to_name": "text", "value": value} for value in values]
    return {"id": 1, "data": {"text": text}, "annotations": [{"result": result, **more}]}


def write_tasks(write: Write, *tasks: object) -> str:
    return write("a.json", json.dumps(list(tasks), indent=1))


def test_label_studio_choices(write: Write):
    name = write_tasks(
        write,
        task("a", {"choices": ["x"]}),
        task("b", {"choices": ["y"]}, was_cancelled=True),
        task("c", {"choices": ["y"]}, was_cancelled=False),
    )
    assert content(read(name)) == [("a", "x"), ("c", "y")]
    assert content(read(name, "multilabel")) == [("a", ("x",)), ("c", ("y",))]


def test_label_studio_takes_the_first_annotation_that_counts(write: Write):
    several = task("a", {"choices": ["x"]}, was_cancelled=True)
    second, third = task("", {"choices": ["y"]}), task("", {"choices": ["z"]})
    several["annotations"] = [
        annotation
        for one in (several, second, third)
        for annotation in one["annotations"]  # type: ignore[union-attr]
    ]
    assert content(read(write_tasks(write, several))) == [("a", "y")]


def test_label_studio_numbers_and_empty_results(write: Write):
    assert content(read(write_tasks(write, task("a", {"rating": 4})), "regress")) == [("a", 4.0)]
    empty = write_tasks(write, task("a"))
    assert content(read(empty, "multilabel")) == [("a", ())]
    assert spans(read(empty, "tag")[0]) == []


def test_label_studio_spans(write: Write):
    name = write_tasks(
        write, task("in New York", {"start": 3, "end": 11, "text": "New York", "labels": ["loc"]})
    )
    assert spans(read(name, "tag")[0]) == [("New York", "loc")]


def test_label_studio_counts_an_emoji_as_two(write: Write):
    value = {"start": 6, "end": 10, "text": "York", "labels": ["loc"]}
    name = write_tasks(write, task("\U0001f600 in York", {**value, "start": 6, "end": 10}))
    assert spans(read(name, "tag")[0]) == [("York", "loc")]


def test_parquet(tmp_path: Path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["a", "b"], "label": [0, 1]}), path)
    assert content(read(str(path))) == [("a", "0"), ("b", "1")]
    assert read(str(path))[1].where == f"{path}, row 2"


def test_parquet_with_the_class_names_of_datasets(tmp_path: Path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = ["O", "B-x", "I-x"]
    features = {"ner_tags": {"feature": {"names": names, "_type": "ClassLabel"}, "_type": "List"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = arrow.table({"tokens": [["a", "b"]], "ner_tags": [[1, 2]]})
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    assert spans(read(str(tmp_path / "a.parquet"), "tag")[0]) == [("a b", "x")]


@pytest.mark.parametrize(
    ("name", "kind", "format"),
    [
        ("a.tsv", "classify", "tsv"),
        ("a.tsv", "tag", "conll"),
        ("a.txt", "tag", "conll"),
        ("a.CSV", None, "csv"),
        ("a.bio", "tag", "conll"),
        ("a.parquet", "regress", "parquet"),
    ],
)
def test_formats_by_ending(name: str, kind: str | None, format: str):
    assert guess_format(Path(name), kind) == format


def test_a_stream_needs_no_labels_and_keeps_the_record(write: Write):
    name = write("a.csv", "id,text\n7,hello\n8,bye\n")
    stream = iter_rows(name, DataSpec())
    assert next(stream) == (
        Row("hello", where="a.csv, line 2"),
        {"id": "7", "text": "hello"},
    )
    assert next(stream)[1]["id"] == "8"
    assert next(stream, None) is None


def test_a_stream_is_lazy(write: Write):
    name = write("a.jsonl", '{"text": "a"}\nbroken\n')
    stream = iter_rows(name, DataSpec())
    assert next(stream)[0].text == "a"
    with pytest.raises(DataError, match=r"^a\.jsonl, line 2, column 1: not valid JSON"):
        next(stream)


def test_a_stream_for_tagging_has_words(write: Write):
    name = write("a.jsonl", '{"text": "don\'t"}\n{"text": "go"}\n')
    assert [row.words for row, _ in iter_rows(name, DataSpec(), "tag")] == [
        ((0, 3), (3, 4), (4, 5)),
        ((0, 2),),
    ]
    name = write("a.jsonl", '{"tokens": ["don\'t", "go"], "text": "x"}\n')
    assert [row.words for row, _ in iter_rows(name, DataSpec(), "tag")] == [((0, 5), (6, 8))]


def rows_of(*sizes: int) -> list[Row]:
    rows = [Row(f"{c}-{i}", label=f"c{c}") for c, size in enumerate(sizes) for i in range(size)]
    random.Random(0).shuffle(rows)
    return rows


def counts(rows: list[Row]) -> Counter[object]:
    return Counter(row.label for row in rows)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=8),
    st.floats(0.01, 0.99),
    st.integers(0, 3),
)
def test_a_drawn_dev_part_leaves_each_class_something(sizes: list[int], share: float, seed: int):
    rows = rows_of(*sizes)
    if max(sizes) == 1:
        return
    train, dev = split_dev(rows, "classify", share, seed)
    assert sorted(row.text for row in train + dev) == sorted(row.text for row in rows)
    assert counts(train).keys() == counts(rows).keys()
    assert len(dev) == min(max(1, round(len(rows) * share)), len(rows) - len(sizes))
    assert (train, dev) == split_dev(rows, "classify", share, seed)
    assert dev == [row for row in rows if row in dev]


def test_a_dev_part_has_the_shares_of_the_classes():
    _, dev = split_dev(rows_of(100, 50, 10), "classify", 0.1, 1)
    assert counts(dev) == {"c0": 10, "c1": 5, "c2": 1}
    assert dev != split_dev(rows_of(100, 50, 10), "classify", 0.1, 2)[1]


def test_other_kinds_are_drawn_at_random():
    rows = [Row(str(i), label=float(i)) for i in range(50)]
    train, dev = split_dev(rows, "regress", 0.2, 1)
    assert (len(train), len(dev)) == (40, 10)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=8), st.integers(8, 60))
def test_a_limit_keeps_each_class(sizes: list[int], limit: int):
    rows = rows_of(*sizes)
    kept = limit_rows(rows, "classify", limit, 1)
    assert len(kept) == min(limit, len(rows))
    assert counts(kept).keys() == counts(rows).keys()
    assert kept == [row for row in rows if row in kept]


def samples(name: str, **options: object) -> DataSpec:
    folder = sample_path(f"{name}_train.jsonl").parent
    names = {part: f"{name}_{part}.jsonl" for part in ("train", "dev", "test")}
    return DataSpec.model_validate({"folder": str(folder), **names, **options})


def test_load_dataset_draws_by_the_seed():
    spec = samples("intents", dev=None, limit=100)
    dataset = load_dataset("classify", spec, seed=3)
    assert (len(dataset.train), len(dataset.dev), len(dataset.test)) == (100, 32, 64)
    assert dataset == load_dataset("classify", spec, seed=3)
    other = load_dataset("classify", spec, seed=4)
    assert other.digest != dataset.digest
    assert other.labels == dataset.labels


def test_so_many_dev_rows():
    """Cut where there is a dev part, drawn from train where there is none; train never shares a row."""
    given = load_dataset("classify", samples("intents"), seed=3)
    cut = load_dataset("classify", samples("intents", dev_rows=16), seed=3)
    assert len(cut.dev) == 16
    assert set(counts(list(cut.dev)).values()) == {2}, "classes keep their shares"
    assert set(cut.dev) < set(given.dev)
    assert cut.train == given.train
    other = load_dataset("classify", samples("intents", dev_rows=16), seed=4)
    assert other.dev != cut.dev
    drawn = load_dataset("classify", samples("intents", dev=None, dev_rows=100, limit=50), seed=3)
    assert (len(drawn.train), len(drawn.dev)) == (50, 100)
    assert set(drawn.train) | set(drawn.dev) < set(given.train)
    assert not set(drawn.train) & set(drawn.dev)
    with pytest.raises(DataError, match=r"dev_rows is 1000, but 320 training rows can give 312"):
        load_dataset("classify", samples("intents", dev=None, dev_rows=1000), seed=3)
    assert len(load_dataset("classify", samples("intents", dev_rows=1000), seed=3).dev) == 64


def test_the_digest_is_about_content_only():
    row = Row("a", label="x", where="here")
    digest = digest_rows([row], [], [])
    assert len(digest) == 64
    assert digest == digest_rows([Row("a", label="x", where="there")], [], [])
    others = [Row("b", label="x"), Row("a", label="y"), Row("a", "", "x"), Row("a")]
    found = {digest_rows([other], [], []) for other in others} | {digest_rows([], [row], [])}
    assert len(found | {digest}) == 6


def test_sample_intents():
    dataset = load_dataset("classify", samples("intents"), seed=1)
    assert len(dataset.labels) == 8
    for rows, least in ((dataset.train, 40), (dataset.dev, 8), (dataset.test, 8)):
        assert min(Counter(row.label for row in rows).values()) >= least
    texts = [row.text for part in (dataset.train, dataset.dev, dataset.test) for row in part]
    assert len(set(texts)) == len(texts)


def test_sample_orders():
    dataset = load_dataset("tag", samples("orders"), seed=1)
    assert dataset.labels == ("amount", "date", "product")
    assert (len(dataset.train), len(dataset.dev), len(dataset.test)) == (250, 55, 55)
    products = [
        {text.lower() for row in part for text, label in spans(row) if label == "product"}
        for part in (dataset.train, dataset.dev, dataset.test)
    ]
    assert not products[0] & (products[1] | products[2])


def test_a_sample_that_does_not_exist():
    with pytest.raises(DataError, match=r"^There is no sample 'x'\. The samples are intents_dev"):
        sample_path("x")


def test_reading_text_imports_nothing_heavy():
    code = (
        "import sys, pastina.data.read, pastina.data.encode, pastina.data.samples;"
        "print([m for m in ('torch', 'datasets', 'pandas', 'sklearn', 'pyarrow', 'transformers') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
