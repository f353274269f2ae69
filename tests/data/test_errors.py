"""Every way in which a file can be wrong, with the whole sentence that the user reads."""

import json
from collections.abc import Callable

import pytest

from pastina.data.read import iter_rows, load_dataset, read_rows
from pastina.errors import DataError
from pastina.recipe import DataSpec

Write = Callable[[str, str | bytes], str]


def message(name: str, kind: str = "classify", **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(name, kind, DataSpec.model_validate(options))
    return str(caught.value)


TABLES = [
    (
        "a.csv",
        b"text,label\nfine,x\nna\xefve,y\n",
        "a.csv, line 3, column 3: the byte 0xef (offset 20 in the file) is not UTF-8. "
        "Save the file as UTF-8.",
    ),
    (
        "a.csv",
        "text,label\nhello,x\n".encode("utf-16"),
        "a.csv: the file is UTF-16, not UTF-8. Save it as UTF-8.",
    ),
    (
        "a.csv",
        "text,label\nhel\0lo,x\n",
        "a.csv, line 2, column 4: a NUL byte. The file is binary or UTF-16; save it as UTF-8 text.",
    ),
    (
        "a.csv",
        "title,label\nhello,x\n",
        "a.csv, line 1: no column is the text; seen: 'title', 'label'. "
        "Set data.text to the name of the right one.",
    ),
    (
        "a.csv",
        "text,kind\nhello,x\n",
        "a.csv, line 1: no column is the label; seen: 'text', 'kind'. "
        "Set data.label to the name of the right one.",
    ),
    (
        "a.csv",
        "text,content,label\nhello,x,y\n",
        "a.csv, line 1: more than one column could be the text; seen: 'text', 'content' "
        "(of 'text', 'content', 'label'). Set data.text to the name of the right one.",
    ),
    (
        "a.csv",
        "text,intent,label\nhello,x,y\n",
        "a.csv, line 1: more than one column could be the label; seen: 'intent', 'label' "
        "(of 'text', 'intent', 'label'). Set data.label to the name of the right one.",
    ),
    (
        "a.csv",
        "text,label,text\nhello,x,y\n",
        "a.csv, line 1, column 3: the name 'text' stands twice. Rename one of them.",
    ),
    (
        "a.csv",
        'text,label\nhello,x\n"two\nlines",y\nhello, world,x\n',
        "a.csv, line 5: 3 fields, but the header has 2 (text, label). "
        "Quote fields that hold the separator.",
    ),
    (
        "a.csv",
        'text,label\nhello,x\n"two\nlines\n\n" ,y\n',
        "a.csv, line 3: not valid CSV (',' expected after '\"'). "
        "Look for a quote that is not closed or not doubled.",
    ),
    (
        "a.csv",
        'text,label\nhello,x\n"no end,x\nnext,y\n',
        "a.csv, line 3: not valid CSV (unexpected end of data). "
        "Look for a quote that is not closed or not doubled.",
    ),
    (
        "a.csv",
        "text,label\nhello,x\n  ,y\n",
        "a.csv, line 3, column 'text': the text is empty. Fill or remove the row.",
    ),
    (
        "a.csv",
        "text,text_pair,label\nhello,,x\n",
        "a.csv, line 2, column 'text_pair': the text is empty. Fill or remove the row.",
    ),
    (
        "a.csv",
        "text,label\nhello, \n",
        "a.csv, line 2, column 'label': the label is empty. Give every row one label.",
    ),
    ("a.csv", "", "a.csv: no rows in it. Check the file."),
    ("a.csv", "text,label\n", "a.csv: no rows in it. Check the file."),
    ("a.jsonl", "\n\n", "a.jsonl: no rows in it. Check the file."),
    (
        "a.tsv",
        'text\tlabel\n"hello\tx\tz\n',
        "a.tsv, line 2: 3 fields, but the header has 2 (text, label). "
        "Quote fields that hold the separator.",
    ),
    (
        "a.jsonl",
        '{"text": "a", "label": "x"}\n{"text": "b" "label": "y"}\n',
        "a.jsonl, line 2, column 14: not valid JSON: Expecting ',' delimiter. Correct or remove it.",
    ),
    (
        "a.jsonl",
        "[1]\n",
        'a.jsonl, line 1: list instead of an object like {"text": ...}. '
        "JSONL has one object per line.",
    ),
    (
        "a.jsonl",
        '{"text": "a", "label": "x", "text": "b"}\n',
        "a.jsonl, line 1: the key 'text' stands twice. Remove one of them.",
    ),
    (
        "a.jsonl",
        '{"text": "a", "label": "x"}\n\n{"text": "b"}\n',
        "a.jsonl, line 3: the column 'label' is missing; seen: 'text'. Add it to this row.",
    ),
    (
        "a.jsonl",
        '{"text": 7, "label": "x"}\n',
        "a.jsonl, line 1, column 'text': 7 is not a text. "
        "Put it in quotes, or choose another column.",
    ),
    (
        "a.jsonl",
        '{"text": "\\ud83d!", "label": "x"}\n',
        "a.jsonl, line 1, column 'text': the text holds half of a character (a lone surrogate). "
        "Write it again.",
    ),
    (
        "a.jsonl",
        '{"text": "a", "label": ["x"]}\n',
        "a.jsonl, line 1, column 'label': ['x'] is a list, which only the kinds multilabel and "
        "tag read. Write one word or whole number.",
    ),
    (
        "a.jsonl",
        '{"text": "a", "label": 1.5}\n',
        "a.jsonl, line 1, column 'label': 1.5 is not a class name. Write one word or whole number.",
    ),
    (
        "a.txt",
        "text\n",
        "a.txt: the ending '.txt' tells no format. Set data.format to one of csv, tsv, jsonl, "
        "parquet, conll, label-studio.",
    ),
    ("a.conll", "a\tO\n", "a.conll: CoNLL files hold tags. Set kind to tag, not classify."),
]


@pytest.mark.parametrize(("name", "content", "expected"), TABLES)
def test_tables(write: Write, name: str, content: str | bytes, expected: str):
    assert message(write(name, content)) == expected


@pytest.mark.parametrize(
    ("value", "shown"),
    [("NaN", "nan"), ("Infinity", "inf"), ("-Infinity", "-inf"), ('"nan"', "'nan'")],
)
def test_targets_that_are_not_finite(write: Write, value: str, shown: str):
    name = write("a.jsonl", f'{{"text": "a", "label": {value}}}\n')
    assert message(name, "regress") == (
        f"a.jsonl, line 1, column 'label': {shown} is not a finite number. "
        "Correct or remove the row."
    )


@pytest.mark.parametrize("value", ['"4,5"', '"many"', "true", "null", "[1]"])
def test_targets_that_are_not_numbers(write: Write, value: str):
    name = write("a.jsonl", f'{{"text": "a", "score": {value}}}\n')
    assert message(name, "regress") == (
        f"a.jsonl, line 1, column 'score': {json.loads(value)!r} is not a number. "
        "The kind regress needs one in every row."
    )


def test_a_broken_list_of_labels(write: Write):
    name = write("a.csv", 'text,labels\nhello,"[""x"", "\n')
    assert message(name, "multilabel") == (
        "a.csv, line 2, column 'labels': '[\"x\", ' is not a JSON list (Expecting value). Correct it."
    )


TAGGED = [
    (
        "a.conll",
        "EU\tB-org\nrejects\nGerman\tB-misc\n",
        "a.conll, line 2: 1 column instead of 2. "
        "Every line holds a word and its tag, separated by a tab.",
    ),
    (
        "a.conll",
        "EU\tNNP\tB-org\nrejects\tO\n",
        "a.conll, line 2: 2 columns instead of 3. "
        "Every line holds a word and its tag, separated by a tab.",
    ),
    (
        "a.conll",
        "EU NNP B-org\n\nsome words in a row\n",
        "a.conll, line 3: 5 columns instead of 3. "
        "Every line holds a word and its tag, separated by a tab.",
    ),
    (
        "a.conll",
        "EU\tO\n\tO\n",
        "a.conll, line 2, column 1: the word is empty. Remove the line, or write the word.",
    ),
    (
        "a.conll",
        "EU\tORG\n",
        "a.conll, line 1, column 2: 'ORG' is not a tag. "
        "Tags are O, B-type and I-type (the scheme IOB2).",
    ),
    (
        "a.conll",
        "EU\tS-org\n",
        "a.conll, line 1, column 2: 'S-org' is not a tag. "
        "Tags are O, B-type and I-type (the scheme IOB2).",
    ),
    (
        "a.conll",
        "-DOCSTART-\tO\n\nIn\tO\nNew\tO\nYork\tI-loc\n",
        "a.conll, line 5: the tag 'I-loc' follows 'O', so it continues nothing. "
        "A span begins with 'B-loc' (the scheme IOB2).",
    ),
    (
        "a.conll",
        "In\tO\n \t \nYork\tI-loc\nis\tO\n\n",
        "a.conll, line 3: the tag 'I-loc' follows the start of the sentence, so it continues "
        "nothing. A span begins with 'B-loc' (the scheme IOB2).",
    ),
    (
        "a.jsonl",
        '{"tokens": ["a", "b"], "tags": ["O", "I-x"]}\n',
        "a.jsonl, line 1, column 'tags', word 2: the tag 'I-x' follows 'O', so it continues "
        "nothing. A span begins with 'B-x' (the scheme IOB2).",
    ),
    (
        "a.jsonl",
        '{"tokens": ["a", "b"], "tags": ["O"]}\n',
        "a.jsonl, line 1, column 'tags': 2 words, but 1 tag. Give one tag per word.",
    ),
    (
        "a.jsonl",
        '{"tokens": ["a", ""], "tags": ["O", "O"]}\n',
        "a.jsonl, line 1, column 'tokens', word 2: the text is empty. Fill or remove the row.",
    ),
    (
        "a.jsonl",
        '{"tokens": [], "tags": []}\n',
        "a.jsonl, line 1, column 'tokens': the list of words is empty. Fill or remove the row.",
    ),
    (
        "a.jsonl",
        '{"text": "in York", "spans": [{"start": 3, "end": 9, "label": "x"}]}\n',
        "a.jsonl, line 1, column 'spans': The span 3..9 (x) lies outside the text, "
        "which has 7 characters.",
    ),
    (
        "a.jsonl",
        '{"text": "in York", "spans": [[0, 7, "x"], [3, 7, "y"]]}\n',
        "a.jsonl, line 1, column 'spans': The span 3..7 'York' (y) overlaps the span 0..7 "
        "'in York' (x).",
    ),
    (
        "a.jsonl",
        '{"text": "in York", "spans": [[3, 5, "x"]]}\n',
        "a.jsonl, line 1, column 'spans': The span 3..5 'Yo' (x) cuts the word 'York' (3..7). "
        'Move its ends, or set data.align = "widen" to take whole words.',
    ),
    (
        "a.jsonl",
        '{"text": "in York", "spans": [{"start": 3, "stop": 5}]}\n',
        "a.jsonl, line 1, column 'spans': [3, None, None] is not a span. "
        'A span is {"start": 0, "end": 5, "label": "name"} or [0, 5, "name"].',
    ),
    (
        "a.jsonl",
        '{"text": "in York", "spans": "3-7"}\n',
        "a.jsonl, line 1, column 'spans': '3-7' is not a list of spans. "
        'A span is {"start": 0, "end": 5, "label": "name"} or [0, 5, "name"].',
    ),
    (
        "a.jsonl",
        '{"tokens": ["a"], "tags": ["O"], "text": "a", "spans": []}\n',
        "a.jsonl, line 1: more than one column could be the text; seen: 'tokens', 'text' "
        "(of 'tokens', 'tags', 'text', 'spans'). Set data.text to the name of the right one.",
    ),
    (
        "a.csv",
        "text,spans\n",
        "a.csv: a csv table cannot hold tags. Use JSONL (text and spans, or tokens and tags) "
        "or CoNLL.",
    ),
]


@pytest.mark.parametrize(("name", "content", "expected"), TAGGED)
def test_tagging(write: Write, name: str, content: str, expected: str):
    assert message(write(name, content), "tag") == expected


def studio(**task: object) -> str:
    return json.dumps([{"id": 41, "data": {"text": "in York"}, **task}], indent=1)


def annotation(**value: object) -> dict[str, object]:
    return {"result": [{"type": "x", "value": value}]}


@pytest.mark.parametrize(
    ("content", "kind", "expected"),
    [
        (
            studio(annotations=[]),
            "tag",
            "no annotation. Label the task, or leave it out of the export.",
        ),
        (
            studio(annotations=[annotation(choices=["a", "b"])]),
            "classify",
            "one choice is needed; seen: 'a', 'b'. Correct the annotation.",
        ),
        (
            studio(annotations=[{"result": []}]),
            "classify",
            "one choice is needed; seen: none. Correct the annotation.",
        ),
        (
            studio(annotations=[annotation(start=3, end=7, labels=["x", "y"])]),
            "tag",
            "a stretch from 3 to 7 with the labels ['x', 'y']. "
            "Each needs whole numbers and exactly one label.",
        ),
        (
            studio(annotations=[annotation(start=2, end=6, text="York", labels=["x"])]),
            "tag",
            "the stretch 2..6 (x) should read 'York', but the text does not have it there. "
            "Was the text changed?",
        ),
        (
            studio(annotations=[annotation(start=3, end=5, text="Yo", labels=["x"])]),
            "tag",
            "The span 3..5 'Yo' (x) cuts the word 'York' (3..7). "
            'Move its ends, or set data.align = "widen" to take whole words.',
        ),
        (
            studio(data={"title": "in York"}, annotations=[{"result": []}]),
            "tag",
            "no column is the text; seen: 'title'. Set data.text to the name of the right one.",
        ),
    ],
)
def test_label_studio(write: Write, content: str, kind: str, expected: str):
    assert message(write("a.json", content), kind) == f"a.json, task 1 (id 41): {expected}"


def test_label_studio_files_of_another_form(write: Write):
    assert message(write("a.json", '[{"text": "a"}]')) == (
        'a.json, task 1: no "data" in it. Export from Label Studio as JSON, not JSON-MIN; '
        "other tables of records belong in JSONL."
    )
    assert message(write("a.json", '[\n {"data": {}},\n oops]')) == (
        "a.json, line 3, column 2: not valid JSON: Expecting value. Correct or remove it."
    )
    assert message(write("a.jsonl", "{}"), format="label-studio") == (
        "a.jsonl: not an array of tasks. Export from Label Studio as JSON."
    )


def test_files_that_are_not_there(write: Write):
    write("train.csv", "text,label\na,x\n")
    assert message("trian.csv") == ("trian.csv does not exist. Similar files there: train.csv.")
    assert message("zzz") == "zzz does not exist. Check the path."
    assert message("no/train.csv") == "no/train.csv does not exist: there is no folder no."
    assert message(".") == ". is a folder, but a file is needed. Name one file in it."


def test_a_named_column_that_is_not_there(write: Write):
    name = write("a.csv", "text,label,topic\na,x,y\n")
    assert message(name, label="topics") == (
        "a.csv, line 1: there is no column 'topics' (data.label); the columns are "
        "'text', 'label', 'topic'. Did you mean 'topic'?"
    )


def test_two_likely_tag_columns(write: Write):
    name = write("a.jsonl", '{"tokens": ["a"], "tags": ["O"], "ner_tags": ["O"]}')
    assert message(name, "tag") == (
        "a.jsonl, line 1: more than one column could be the label; seen: 'tags', 'ner_tags' "
        "(of 'tokens', 'tags', 'ner_tags'). Set data.label to the name of the right one."
    )


def test_a_file_that_is_no_parquet(write: Write):
    pytest.importorskip("pyarrow")
    text = message(write("a.parquet", "text,label\n"))
    assert text.startswith("a.parquet is not a parquet file (")


def load_message(kind: str = "classify", **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(kind, DataSpec.model_validate(options), seed=1)
    return str(caught.value)


def test_a_data_set_without_training_data():
    assert load_message() == ("No training data is named. Set data.train to a file, or data.hub.")


def test_one_class_only(write: Write):
    assert load_message(train=write("a.csv", "text,label\na,x\nb,x\n")) == (
        "a.csv: every row has the label 'x'. Training needs two classes or more; "
        "check the label column."
    )


def test_nothing_to_learn(write: Write):
    assert load_message("tag", train=write("a.conll", "a\tO\n\nb\tO\n")) == (
        "a.conll: no row has a span. Check the label column."
    )
    assert load_message("multilabel", train=write("a.csv", "text,labels\na,\nb,\n")) == (
        "a.csv: no row has a label. Check the label column."
    )


@pytest.mark.parametrize("part", ["dev", "test"])
def test_labels_that_training_has_not_seen(write: Write, part: str):
    write("train.csv", "text,label\na,x\nb,y\nc,x\nd,y\n")
    write("other.csv", "text,label\na,x\nb,z\n")
    assert load_message(train="train.csv", **{part: "other.csv"}) == (
        f"other.csv, line 3: the label 'z' of the {part} part does not occur in the training part "
        "(x, y). Add training rows for it, or correct it."
    )
    write("train.jsonl", '{"text": "a", "spans": [[0, 1, "x"]]}\n' * 2)
    write("other.jsonl", '{"text": "a", "spans": []}\n{"text": "a", "spans": [[0, 1, "z"]]}\n')
    assert load_message("tag", train="train.jsonl", **{part: "other.jsonl"}) == (
        f"other.jsonl, line 2: the label 'z' of the {part} part does not occur in the training "
        "part (x). Add training rows for it, or correct it."
    )


def test_too_few_rows_to_draw_from(write: Write):
    write("a.csv", "text,label\na,x\nb,y\n")
    assert load_message(train="a.csv") == (
        "No dev part can be drawn: 2 training rows, at most one of each class. "
        "Give more rows, or a dev file."
    )
    assert load_message(train="a.csv", dev="a.csv", limit=1) == (
        "data.limit is 1, but there are 2 classes. Set it to 2 or more."
    )


def test_prediction_reads_tables_only(write: Write):
    with pytest.raises(DataError) as caught:
        iter_rows(write("a.conll", "a\tO\n"), DataSpec())
    assert str(caught.value) == (
        "a.conll: prediction reads csv, tsv, jsonl and parquet, not conll. Convert the file."
    )
