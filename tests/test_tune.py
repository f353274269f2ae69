"""The search of settings on dev."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import pastina
from pastina.errors import PastinaError, RecipeError
from pastina.recipe import METHOD_FIT, Recipe, parse_choices, read_recipe, recipe_toml
from tests import processes

Toy = Callable[..., Recipe]
FIT = {"precision": "fp32", "epochs": 2, "batch": 8}


def test_the_best_on_dev_wins(toy: Toy, tmp_path: Path) -> None:
    """A rate that cannot learn loses; the winner's recipe trains to the score that is told."""
    recipe = toy(fit=FIT, data={"test": "there-is-no-such-file.jsonl"})
    grid = {"fit.epochs": [1, 2], "fit.head_lr": [1e-9, 3e-2]}
    with pytest.raises(PastinaError, match="there-is-no-such-file"):
        pastina.tune(recipe, tmp_path / "broken", grid=grid)
    recipe = toy(fit=FIT | {"lr": 1e-9})
    tuned = pastina.tune(recipe, tmp_path / "tuned", grid=grid, seeds=[1, 2])
    assert len(tuned.trials) == 4
    assert tuned.recipe.fit.head_lr == 3e-2
    assert read_recipe(tmp_path / "tuned" / "recipe.toml") == tuned.recipe
    scores = [trial.score for trial in tuned.trials if trial.score is not None]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]
    best = tuned.trials[0]
    assert best.score == tuned.score == pytest.approx(sum(best.scores.values()) / 2)
    fit = tuned.recipe.fit.model_copy(update={"seed": 2})
    again = pastina.train(tuned.recipe.model_copy(update={"fit": fit}), tmp_path / "again")
    assert again.metrics[tuned.metric] == pytest.approx(best.scores[2], abs=1e-4)
    trials = json.loads((tmp_path / "tuned" / "trials.json").read_text())
    assert [trial["settings"] for trial in trials] == [trial.settings for trial in tuned.trials]


def test_the_smallest_error_wins(toy: Toy, tmp_path: Path) -> None:
    recipe = toy("regress", fit=FIT | {"metric": "rmse"})
    tuned = pastina.tune(recipe, tmp_path / "tuned", grid={"fit.head_lr": [1e-9, 3e-2]})
    assert tuned.recipe.fit.head_lr == 3e-2
    assert tuned.score == min(trial.score for trial in tuned.trials if trial.score is not None)


def test_a_trial_that_fails_comes_last(toy: Toy, tmp_path: Path) -> None:
    recipe = toy(fit=FIT | {"clip": 0})
    tuned = pastina.tune(recipe, tmp_path / "tuned", grid={"fit.lr": [1e30, 1e-2]})
    assert [trial.score is None for trial in tuned.trials] == [False, True]
    assert "became" in (tuned.trials[1].error or "")
    assert "failed" in (tmp_path / "tuned" / "trials.md").read_text()
    with pytest.raises(PastinaError, match="Every trial failed"):
        pastina.tune(recipe, tmp_path / "all", grid={"fit.lr": [1e30]})


def test_default_grids(toy: Toy, tmp_path: Path) -> None:
    tuned = pastina.tune(toy(fit=FIT | {"epochs": 1}), tmp_path / "pasta")
    assert len(tuned.trials) == 9
    tuned = pastina.tune(
        toy(fit=FIT | {"epochs": 1}, method={"name": "linear"}), tmp_path / "linear"
    )
    assert {tuple(trial.settings) for trial in tuned.trials} == {("fit.head_lr",)}


def test_methods_are_tried_by_name(toy: Toy, tmp_path: Path) -> None:
    """What the recipe leaves out is the method's own, not that of the recipe's method."""
    for key, method in (("method", {}), ("method", {"share": "all"}), ("method.name", {})):
        recipe = toy(fit=FIT, method=method)
        out = tmp_path / f"{key} {len(method)}"
        tuned = pastina.tune(recipe, out, grid={key: ["lora", "pasta", "linear"]})
        assert not tuned.failed
        winner = read_recipe(out / "recipe.toml")
        assert winner == tuned.recipe
        assert winner.method.name == tuned.trials[0].settings[key]
        assert winner.fit.lr is None
        members = [read_recipe(out / f"trials/{i:03d}/recipe.toml") for i in range(3)]
        assert [member.method.name for member in members] == ["lora", "pasta", "linear"]
        assert [member.fit.lr for member in members] == [
            METHOD_FIT[m.method.name].lr for m in members
        ]
        assert getattr(members[1].method, "share", None) == method.get("share", "none")
        again = pastina.train(winner, out / "again")
        assert again.metrics[tuned.metric] == pytest.approx(tuned.score, abs=1e-4)


def test_a_method_comes_before_its_options(toy: Toy, tmp_path: Path) -> None:
    recipe = toy(fit=FIT | {"epochs": 1}, method={"name": "linear"})
    grid = {"method.rank": [0, 1], "method": ["pasta"]}
    tuned = pastina.tune(recipe, tmp_path / "out", grid=grid)
    members = [read_recipe(tmp_path / f"out/trials/{i:03d}/recipe.toml") for i in range(2)]
    assert not tuned.failed
    assert [getattr(member.method, "rank", None) for member in members] == [0, 1]


def test_presets_are_tried(toy: Toy, tmp_path: Path) -> None:
    recipe = toy(fit=FIT | {"epochs": 1})
    tuned = pastina.tune(recipe, tmp_path / "out", grid={"preset": [None, "pasta-tagger"]})
    assert not tuned.failed
    plain, preset = (read_recipe(tmp_path / f"out/trials/{i:03d}/recipe.toml") for i in range(2))
    assert (getattr(plain.method, "rank", None), getattr(preset.method, "rank", None)) == (0, 2)
    assert (preset.fit.epochs, preset.fit.schedule) == (1, "cosine")


def test_another_search_is_not_resumed(toy: Toy, tmp_path: Path) -> None:
    recipe, out = toy(fit=FIT | {"epochs": 1}), tmp_path / "out"
    pastina.tune(recipe, out, grid={"fit.lr": [1e-2, 3e-2]})
    before = contents(out)
    others: list[tuple[Recipe, dict[str, list[float]], list[int] | None, str]] = [
        (recipe, {"fit.lr": [1e-2, 5e-2]}, None, r"other settings: .*0.03.*, not .*0.05"),
        (recipe, {"fit.lr": [1e-2]}, None, "other settings"),
        (recipe, {"fit.lr": [1e-2, 3e-2, 5e-2]}, None, "other settings"),
        (recipe, {"fit.lr": [1e-2, 3e-2]}, [1, 2], "other seeds"),
        (toy(fit=FIT | {"epochs": 2}), {"fit.lr": [1e-2, 3e-2]}, None, "another recipe"),
    ]
    for other, grid, seeds, words in others:
        with pytest.raises(RecipeError, match=words):
            pastina.tune(other, out, grid=grid, seeds=seeds, resume=True)
        assert contents(out) == before
    (out / "search.json").write_text("[]")
    with pytest.raises(RecipeError, match="does not describe a search"):
        pastina.tune(recipe, out, grid={"fit.lr": [1e-2, 3e-2]}, resume=True)
    with pytest.raises(RecipeError, match="nothing to resume"):
        pastina.tune(recipe, tmp_path / "other", resume=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_search_that_could_not_begin_leaves_nothing(toy: Toy, tmp_path: Path) -> None:
    recipe = toy(fit=FIT, data={"train": "there-is-no-such-file.jsonl"})
    for grid, words in (
        ({"fit.lr": [1e-2]}, "Every trial failed"),
        ({"method": ["full"]}, "backbone"),
    ):
        with pytest.raises(PastinaError, match=words):
            pastina.tune(recipe, tmp_path / "new" / "out", grid=grid)
        assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(PastinaError, match="Every trial failed"):
        pastina.tune(recipe, tmp_path / "empty", grid={"fit.lr": [1e-2]})
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"fit.seed": [1]}, "seeds"),
        ({"fit.metric": ["accuracy", "macro_f1"]}, "cannot be compared"),
        ({"data.dev_rows": [2, 20], "fit.lr": [1e-2]}, "cannot be compared"),
        ({"fit.rate": [1.0]}, "fit.rate"),
        ({"fit.lr": [-1.0]}, "fit.lr"),
    ],
)
def test_refusals(grid: dict[str, list[float]], words: str, toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        pastina.tune(toy(), tmp_path / "tuned", grid=grid)
    with pytest.raises(RecipeError, match=r"preset 'pasta-wide' already"):
        pastina.tune(
            toy(preset="pasta-wide"), tmp_path / "tuned", grid={"preset": ["pasta-tagger"]}
        )


def test_choices() -> None:
    assert parse_choices("method.layers=[0,1],[1]") == ("method.layers", [[0, 1], [1]])
    assert parse_choices("method=lora,{name='ia3'}") == ("method", ["lora", {"name": "ia3"}])
    assert parse_choices("head.pooling=cls, mean") == ("head.pooling", ["cls", "mean"])
    for bad in ("fit.lr", "fit.lr=", "=1", "fit.lr=1,,2"):
        with pytest.raises(RecipeError, match="KEY=VALUE"):
            parse_choices(bad)


def test_command(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(recipe_toml(toy(fit=FIT | {"epochs": 1})))
    args = ["tune", "r.toml", "--try", "fit.lr=1e-2,3e-2", "--seeds", "1,2", "--out", "found"]
    done = processes.pastina(*args, folder=tmp_path)
    assert done.code == 0, done.err
    assert done.out == (tmp_path / "found" / "trials.md").read_text()
    again = processes.pastina(*args, folder=tmp_path)
    assert (again.code, "not empty" in again.err) == (1, True)
    resumed = processes.pastina(*args, "--resume", "--json", folder=tmp_path)
    assert resumed.code == 0, resumed.err
    assert len(json.loads(resumed.out)["trials"]) == 2
    other = ["tune", "r.toml", "--try", "method=linear,lora", "--out", "found", "--resume"]
    refused = processes.pastina(*other, folder=tmp_path)
    assert (refused.code, "begun with other settings" in refused.err) == (1, True)
    failing = ["tune", "r.toml", "fit.clip=0", "--try", "fit.lr=1e30,1e-2", "--out", "some"]
    some = processes.pastina(*failing, folder=tmp_path)
    assert (some.code, "1 of 2 trials failed; the first, fit.lr=1e+30" in some.err) == (0, True)
    wrong = processes.pastina("tune", "r.toml", "--seeds", "one", folder=tmp_path)
    assert wrong.code == 2
