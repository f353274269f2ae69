"""Hub data sets through local folders only."""

from pathlib import Path
from typing import Any

import pytest

from pastina.data.hub import GLUE_TEXTS, glue_columns, glue_task
from pastina.data.read import load_dataset
from pastina.errors import DataError, PastinaWarning
from pastina.recipe import DataSpec


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(module.config, "HF_DATASETS_OFFLINE", True, raising=False)
    module.disable_progress_bars()
    return module


def make_glue(datasets: Any, hidden: int | float, label: Any) -> Any:
    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": label,
            "idx": datasets.Value("int32"),
        }
    )

    def part(*labels: float) -> Any:
        columns = {
            "sentence1": [f"first {i}" for i in range(len(labels))],
            "sentence2": [f"second {i}" for i in range(len(labels))],
            "label": list(labels),
            "idx": list(range(len(labels))),
        }
        return datasets.Dataset.from_dict(columns, features=features)

    return datasets.DatasetDict(
        train=part(0, 1, 0, 1), validation=part(1, 0), test=part(hidden, hidden)
    )


def test_class_names_come_from_the_features(datasets: Any, tmp_path: Path):
    label = datasets.ClassLabel(names=["entailment", "not_entailment"])
    make_glue(datasets, -1, label).save_to_disk(str(tmp_path / "rte"))
    spec = DataSpec(folder=str(tmp_path), hub="rte")
    with pytest.warns(PastinaWarning, match="split test: 2 of 2 rows have no label and are left"):
        dataset = load_dataset("classify", spec, seed=1)
    assert dataset.labels == ("entailment", "not_entailment")
    assert [row.label for row in dataset.dev] == ["not_entailment", "entailment"]
    assert (dataset.dev[0].text, dataset.dev[0].text_pair) == ("first 0", "second 0")
    assert dataset.dev[1].where == f"{tmp_path / 'rte'}, split validation, row 2"
    assert list(dataset.test) == []


def test_the_hidden_numbers_of_a_test_part_are_left_out(datasets: Any, tmp_path: Path):
    make_glue(datasets, -1.0, datasets.Value("float32")).save_to_disk(str(tmp_path / "stsb"))
    spec = DataSpec(folder=str(tmp_path), hub="stsb")
    with pytest.warns(PastinaWarning, match="2 of 2 rows have no label"):
        dataset = load_dataset("regress", spec, seed=1)
    assert [row.label for row in dataset.dev] == [1.0, 0.0]
    assert list(dataset.test) == []


def test_tags_become_names(datasets: Any, tmp_path: Path):
    names = datasets.ClassLabel(names=["O", "B-loc", "I-loc"])
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "pos_tags": datasets.List(datasets.Value("int32")),
            "ner_tags": datasets.List(names),
        }
    )
    columns = {
        "tokens": [["New", "York"], ["is"]],
        "pos_tags": [[1, 1], [2]],
        "ner_tags": [[1, 2], [0]],
    }
    table = datasets.Dataset.from_dict(columns, features=features)
    table.save_to_disk(str(tmp_path / "ner"))
    dataset = load_dataset("tag", DataSpec(folder=str(tmp_path), hub="ner", dev_share=0.5), seed=1)
    assert dataset.labels == ("loc",)
    rows = [*dataset.train, *dataset.dev]
    assert sorted((row.text, row.tags) for row in rows) == [
        ("New York", ("B-loc", "I-loc")),
        ("is", ("O",)),
    ]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_folders_of_files(datasets: Any, tmp_path: Path, ending: str):
    (tmp_path / "my").mkdir()
    for part in ("train", "validation", "test"):
        table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1]})
        getattr(table, f"to_{ending}")(str(tmp_path / "my" / f"{part}.{ending}"))
    dataset = load_dataset("classify", DataSpec(folder=str(tmp_path), hub="my"), seed=1)
    assert [(row.text, row.label) for row in dataset.test] == [("a", "0"), ("b", "1"), ("c", "1")]


def test_splits_can_be_named_and_rows_without_text_are_left_out(datasets: Any, tmp_path: Path):
    table = datasets.Dataset.from_dict({"text": ["a", "b", "", "d"], "label": ["x", "y", "x", "y"]})
    whole = datasets.DatasetDict(learn=table, check=table.select([0, 1]))
    whole.save_to_disk(str(tmp_path / "my"))
    spec = DataSpec(folder=str(tmp_path), hub="my", train="learn", dev="check")
    with pytest.warns(PastinaWarning, match="split learn: 1 of 4 rows have no text"):
        dataset = load_dataset("classify", spec, seed=1)
    assert (len(dataset.train), len(dataset.dev)) == (3, 2)

    with pytest.raises(
        DataError, match=r"there is no split 'lern' \(data\.train\); its splits are"
    ):
        load_dataset("classify", spec.model_copy(update={"train": "lern"}), seed=1)
    with pytest.raises(DataError, match=r"no labelled training rows\. Its splits are learn, check"):
        load_dataset("classify", DataSpec(folder=str(tmp_path), hub="my"), seed=1)


def test_a_name_that_cannot_be_loaded(datasets: Any, tmp_path: Path):
    with pytest.raises(
        DataError, match=r"^The data set 'no/such' \(config None\) cannot be loaded"
    ):
        load_dataset("classify", DataSpec(folder=str(tmp_path), hub="no/such"), seed=1)


@pytest.mark.parametrize(
    ("hub", "config", "task"),
    [
        ("glue/rte", None, "rte"),
        ("glue", "mnli", "mnli"),
        ("nyu-mll/glue", "qqp", "qqp"),
        ("nyu-mll/glue/cola", None, "cola"),
        ("imdb", None, None),
        ("someone/rte", None, None),
    ],
)
def test_glue_names(hub: str, config: str | None, task: str | None):
    assert glue_task(hub, config) == task


def test_unknown_glue_tasks():
    with pytest.raises(
        DataError, match=r"^There is no GLUE task 'snli'\. The tasks are cola, sst2"
    ):
        glue_task("glue/snli", None)


def test_glue_columns():
    assert len(GLUE_TEXTS) == 9
    spec = glue_columns(DataSpec(hub="glue/qnli"), "qnli")
    assert (spec.text, spec.text_pair, spec.label) == ("question", "sentence", "label")
    spec = glue_columns(DataSpec(hub="glue/cola"), "cola")
    assert (spec.text, spec.text_pair) == ("sentence", None)
    spec = glue_columns(DataSpec(hub="glue/rte", text="sentence2"), "rte")
    assert (spec.text, spec.text_pair) == ("sentence2", None)
