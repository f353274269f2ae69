"""Presets: settings by name, below what a recipe says itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import pastina
from pastina.bench.grid import Cell, content_id, read_grid
from pastina.errors import RecipeError
from pastina.method_options import LinearOptions
from pastina.presets import PRESETS
from pastina.recipe import (
    FitSpec,
    PastaOptions,
    Recipe,
    make_recipe,
    read_recipe,
    recipe_toml,
)
from tests.backbone_folder import toy_rows

Toy = Callable[..., Recipe]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_it_stands_for(name: str, tmp_path: Path) -> None:
    recipe, spelled = make_recipe({"preset": name}), make_recipe(PRESETS[name])
    assert recipe.model_copy(update={"preset": None}) == spelled
    assert recipe != Recipe()
    assert content_id(recipe) == content_id(spelled), "the same runs, so the same results"
    path = tmp_path / "r.toml"
    path.write_text(recipe_toml(recipe.resolved()), encoding="utf-8")
    assert read_recipe(path) == recipe.resolved()


def test_the_grid_that_measures_it_means_the_preset() -> None:
    grid = read_grid(Path(__file__).parents[1] / "recipes" / "bench" / "gap.toml")
    same = {"precision": "bf16", "seed": 13}
    for data, values in grid.recipes.items():
        wide, *_ = grid.search(Cell(data, "pasta-wide"))  # then more epochs, and fewer layers
        wanted = make_recipe({**values, "preset": "pasta-wide"}).resolved()
        assert wide.recipe.method == wanted.method
        assert wide.recipe.fit == wanted.fit.model_copy(update=same)
        best = [job.recipe for job in grid.search(Cell(data, "pasta-best"))]
        if wanted.kind != "tag":
            assert best[0] == wide.recipe
            continue
        tagger = make_recipe({**values, "preset": "pasta-tagger"}).resolved()
        fit = tagger.fit.model_copy(update=same)
        assert {recipe.method.model_dump_json() for recipe in best} == {
            tagger.method.model_dump_json()
        }
        assert any(r.fit == fit and r.backbone == tagger.backbone for r in best)


def test_what_a_recipe_says_goes_before_its_preset(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'preset = "pasta-wide"\n[method]\nshare = "none"\n[fit]\nschedule = "constant"\n'
    )
    recipe = read_recipe(path, ["fit.lr=0.5"])
    assert isinstance(recipe.method, PastaOptions)
    assert (recipe.method.share, recipe.method.everywhere) == ("none", True)
    assert (recipe.fit.schedule, recipe.fit.lr) == ("constant", 0.5)
    assert read_recipe(path, ["preset=none"]).method == PastaOptions()
    same = Recipe(preset="pasta-wide", method=PastaOptions(dropout=0.3), fit=FitSpec(lr=0.5))
    assert same.method == PastaOptions(dropout=0.3, share="by_token", everywhere=True)
    assert same.fit.lr == 0.5


def test_presets_that_are_refused() -> None:
    with pytest.raises(RecipeError, match="unknown preset 'pasta-wid'; did you mean 'pasta-wide'"):
        read_recipe(None, ["preset=pasta-wid"])
    with pytest.raises(RecipeError, match="unknown preset 3; known: pasta-wide"):
        read_recipe(None, ["preset=3"])
    with pytest.raises(RecipeError, match="is one of pasta, but the method is linear"):
        read_recipe(None, ["preset=pasta-wide", "method=linear"])
    with pytest.raises(ValueError, match="is one of pasta, but the method is linear"):
        Recipe(preset="pasta-wide", method=LinearOptions(name="linear"))
    with pytest.raises(RecipeError, match="must be a table, not 'pasta'"):
        make_recipe({"preset": "pasta-wide", "method": "pasta"})


@pytest.mark.parametrize(
    ("preset", "kind"),
    [
        ("pasta-wide", "classify"),
        ("pasta-wide", "pair"),
        ("pasta-wide", "tag"),
        ("pasta-tagger", "tag"),
    ],
)
def test_a_run_with_a_preset(preset: str, kind: str, toy: Toy, tmp_path: Path) -> None:
    recipe = toy(kind, fit={"epochs": 2, "precision": "fp32"})
    values = recipe.model_dump(mode="json", exclude_unset=True, exclude={"method"})
    run = pastina.train(make_recipe({**values, "preset": preset}), tmp_path / "run")
    alone = pastina.load(run.adapter, precision="fp32")
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    vectors = [tensor for name, tensor in tensors.items() if "pasta_vectors" in name]
    assert {len(tensor) for tensor in vectors} == {3}, "[CLS], [SEP] and every token"
    assert sum("pasta_ups" in name for name in tensors) == 2 * (preset == "pasta-tagger")
    tasks = pastina.Tasks(recipe.backbone, precision="fp32")
    tasks.add(run.adapter, "wide")
    rows = toy_rows(kind, 6)
    texts = [(r["text"], r["text_pair"]) if kind == "pair" else r["text"] for r in rows]
    together = tasks.predict([("wide", text) for text in texts])
    for one, other in zip(alone.predict(texts), together, strict=True):
        assert (one.label, one.spans) == (other.label, other.spans)
