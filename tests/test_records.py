"""Rows in, records out: nothing of the user's is lost, one bad row need not end the rest."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pastina
from pastina.data.rows import Row
from pastina.errors import DataError
from pastina.predict import Predictor
from pastina.records import _keep_given, answer_records, read_texts
from tests.backbone_folder import toy_recipe, write_rows


@pytest.fixture(scope="module")
def task(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = tmp_path_factory.mktemp("records")
    recipe = toy_recipe(bert, folder, fit={"epochs": 1})
    return pastina.load(pastina.train(recipe, folder / "run").folder)


def rows(*texts: str) -> Iterator[tuple[Row, dict[str, Any]]]:
    for number, text in enumerate(texts, start=1):
        yield Row(text=text, where=f"line {number}"), {"text": text}


def test_a_bad_row_ends_the_rest(task: Predictor) -> None:
    with pytest.raises(DataError, match="line 2"):
        list(answer_records(task, rows("a pear", " ", "a saw")))


def test_a_bad_row_gets_an_error_if_asked(task: Predictor) -> None:
    texts = ("a pear", " ", "a saw", "[SEP] [SEP] [SEP]", "plum")
    found = list(answer_records(task, rows(*texts), keep_going=True))
    assert [record["text"] for record in found] == list(texts)
    assert ["error" in record for record in found] == [False, True, False, True, False]
    assert "line 2" in found[1]["error"]
    (alone,) = answer_records(task, rows("plum"))
    assert found[4]["label"] == alone["label"]
    assert found[4]["score"] == pytest.approx(alone["score"], abs=1e-5)


@pytest.mark.parametrize(
    ("record", "kept"),
    [
        ({"text": "a", "label": "x"}, {"text": "a", "given_label": "x"}),
        ({"label": 1, "given_label": 2}, {"given_given_label": 1, "given_label": 2}),
        ({"given_label": 2, "label": 1}, {"given_label": 2, "given_given_label": 1}),
        ({"id": 3}, {"id": 3}),
    ],
)
def test_no_column_is_lost(record: dict[str, Any], kept: dict[str, Any]) -> None:
    assert _keep_given(record, "classify") == kept


def test_the_columns_of_the_training_file(bert: Path, tmp_path: Path) -> None:
    recipe = toy_recipe(bert, tmp_path, fit={"epochs": 1})
    task = pastina.load(pastina.train(recipe, tmp_path / "run").folder)
    trained = task.card.recipe | {"data": task.card.recipe["data"] | {"text": "message"}}
    card = task.card.model_copy(update={"recipe": trained})
    file = write_rows(tmp_path / "new.jsonl", [{"message": "a pear", "text": "other"}])
    ((row, _),) = read_texts(card, None, file, io.StringIO())
    assert row.text == "a pear"
    ((row, _),) = read_texts(card, None, file, io.StringIO(), text_column="text")
    assert row.text == "other"
