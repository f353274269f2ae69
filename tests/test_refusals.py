"""Settings and data with which a run would teach nothing, or spoil another run, are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import pastina
from pastina.errors import DataError, RecipeError
from pastina.recipe import Recipe, make_recipe
from pastina.training.fit import LOCK
from tests.backbone_folder import write_rows

Toy = Callable[..., Recipe]


def test_two_runs_in_one_folder(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with FileLock(folder / LOCK), pytest.raises(RecipeError, match="Another process trains into"):
        pastina.train(toy(fit={"epochs": 1}), folder)
    run = pastina.train(toy(fit={"epochs": 1}), folder)
    assert not (run.folder / LOCK).exists()


def test_special_tokens_that_no_text_has(toy: Toy, tmp_path: Path) -> None:
    recipe = toy(method={"name": "pasta", "special_token_ids": [99999]})
    with pytest.raises(RecipeError, match=r"No text holds one of the special tokens \[99999\]"):
        pastina.train(recipe, tmp_path / "run")


def test_a_run_that_did_not_begin_leaves_no_folder(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    recipe = toy(method={"name": "lora"}, fit={"precision": "int8"})
    for folder in (tmp_path / "new" / "run", tmp_path / "mine", tmp_path / "mine" / "run"):
        with pytest.raises(RecipeError, match="no int8 products"):
            pastina.train(recipe, folder)
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "mine").iterdir()) == []


def test_targets_that_are_all_the_same(toy: Toy, tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": 2.5} for i in range(12)]
    file = str(write_rows(tmp_path / "same.jsonl", rows))
    with pytest.raises(DataError, match=r"Every training row has the target 2\.5"):
        pastina.train(toy("regress", data={"train": file, "dev": file}), tmp_path / "run")


def test_windows_that_share_more_than_half(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.stride = 20 is more than half"):
        pastina.train(toy("tag", data={"max_length": 32, "stride": 20}), tmp_path / "run")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "../evil"}, "must not lead to another folder"),
        ({"name": "/evil"}, "must not lead to another folder"),
        ({"fit": {"class_weights": {"a": -2.0}}}, "greater than 0"),
        ({"fit": {"class_weights": {"a": 1e38}}}, "less than or equal"),
        ({"fit": {"seed": 2**64}}, "less than"),
        ({"method": {"special_token_ids": []}}, "at least 1"),
    ],
)
def test_recipes_that_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe(values)
