"""The recipes that come along: each is valid, and says what it is."""

import re
from pathlib import Path

import pytest

from pastina.data.files import find_file
from pastina.data.hub import glue_task
from pastina.recipe import DEFAULT_BACKBONE, PastaOptions, read_recipe, recipe_toml

ROOT = Path(__file__).parents[1]
GRIDS = ROOT / "recipes" / "bench"
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.toml") if p.parent != GRIDS)
PAPER = [path for path in RECIPES if path.parent.name == "pasta-paper"]
MINILM = [path for path in RECIPES if path.parent.name == "minilm"]
GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte")

each = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
each_paper = pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
each_minilm = pytest.mark.parametrize("path", MINILM, ids=lambda path: path.stem)


def test_which_there_are() -> None:
    wanted = {f"{model}-{task}" for model in ("bert-large", "roberta-large") for task in GLUE}
    wanted |= {"bert-large-conll2003", "roberta-large-conll2003"}
    assert {path.stem for path in PAPER} == wanted
    assert len(MINILM) == 8


@each
def test_it_is_valid_and_survives_being_written(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    copy = tmp_path / "copy.toml"
    copy.write_text(recipe_toml(recipe), encoding="utf-8")
    assert read_recipe(copy) == recipe
    assert path.read_text(encoding="utf-8").startswith("# "), "the first line says what it is"


@each_minilm
def test_minilm_recipes_take_the_default_backbone_and_data_that_is_there(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.backbone.name == DEFAULT_BACKBONE
    assert recipe.fit.seed == 13
    folder = (ROOT / recipe.data.folder).resolve()
    assert recipe.data.train
    assert recipe.data.test
    if not folder.is_dir():
        pytest.skip(f"the data is not here: {recipe.data.folder}")
    for name in (recipe.data.train, recipe.data.dev, recipe.data.test):
        if name is not None:
            assert find_file(folder / name).stat().st_size > 0


@each_paper
def test_paper_recipes_have_the_published_settings(path: Path) -> None:
    recipe, text = read_recipe(path), path.read_text(encoding="utf-8")
    method, fit = recipe.method, recipe.fit
    assert isinstance(method, PastaOptions)
    assert (method.init_std, method.dropout, recipe.head.dropout) == (0.02, 0.1, 0.1)
    assert (fit.weight_decay, fit.warmup, fit.clip, fit.schedule) == (0, 0, 0, "linear")
    assert (fit.seed, recipe.data.max_length) == (42, 128)
    is_roberta = path.stem.startswith("roberta")
    if recipe.kind == "tag":
        assert (fit.lr, fit.head_lr, fit.epochs, fit.batch, fit.adam_eps) == (
            3e-3,
            3e-3,
            100,
            16,
            1e-8,
        )
        is_pair = False
    else:
        assert (fit.epochs, fit.batch, fit.adam_eps) == (150, 32, 1e-6)
        assert recipe.head.pooling == ("cls" if is_roberta else "pooler")
        task = glue_task(recipe.data.hub or "", None)
        assert path.stem.endswith(f"-{task}")
        is_pair = task not in ("cola", "sst2")
    slots = (4 if is_roberta else 3) if is_pair else 2
    assert method.num_slots == slots
    stated = re.search(r"(\d) slots, ([\d,]+) numbers", text)
    assert stated is not None
    assert stated.groups() == (str(slots), f"{24 * slots * 1024:,}")
