import tomllib
from pathlib import Path

import pytest

from pastina.errors import RecipeError
from pastina.recipe import (
    DEFAULT_BACKBONE,
    METHOD_FIT,
    LinearOptions,
    PastaOptions,
    Recipe,
    make_recipe,
    read_recipe,
    recipe_toml,
)

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(p for p in FOLDER.rglob("*.toml") if p.parent.name != "bench")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert recipe.data.train or recipe.data.hub, "no data is named"
    assert read_recipe(None) != recipe


def test_there_are_recipes_to_check() -> None:
    """The eight GLUE tasks and CoNLL with two models, and the eight shared data sets."""
    assert len([p for p in RECIPES if p.parent.name == "pasta-paper"]) == 18
    assert len([p for p in RECIPES if p.parent.name == "minilm"]) == 8


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("fit.epoch=3", ["'fit.epoch'", "did you mean 'epochs'"]),
        ("fit.learning_rate=3", ["'fit.learning_rate'", "did you mean 'lr'?"]),
        ("fit.batch_size=3", ["'fit.batch_size'", "did you mean 'batch'?"]),
        ("fit.xyz=3", ["'fit.xyz'", "known keys: lr, head_lr"]),
        ("lr=3", ["'lr'", "did you mean 'fit.lr'?"]),
        ("fit.max_length=9", ["'fit.max_length'", "did you mean 'data.max_length'?"]),
        ("dta.train=x.csv", ["'dta'", "did you mean 'data'"]),
        ("method.num_slot=2", ["'method.num_slot'", "did you mean 'num_slots'"]),
        ("method=past", ["unknown method 'past'", "did you mean 'pasta'"]),
        ("method=xyz", ["unknown method 'xyz'", "known: pasta, linear, full"]),
        ("kind=classifier", ["kind", "'classify'", "not 'classifier'"]),
        ("fit.epochs=0", ["fit.epochs", "greater than or equal to 1", "not 0"]),
        ("fit.epochs=many", ["fit.epochs", "not 'many'"]),
        ("fit.lr=nan", ["fit.lr", "finite"]),
        ("name=../up", ["name: ", "not '../up'"]),
        ("fit.lr=-1", ["fit.lr", "greater than 0"]),
        ("fit.batch=none", ["fit.batch", "not None"]),
        ("method.dropout=1.0", ["method.dropout", "less than 1"]),
        ("fit", ["'fit' is not an override", "section.key=value"]),
        ("=3", ["'=3' is not an override"]),
        ("kind.x=3", ["kind"]),
    ],
)
def test_a_bad_override_says_what_is_wrong(override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(None, ["kind=tag", override] if override == "kind.x=3" else [override])
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(("?", "."))
    assert not text.endswith("?.")
    for word in words:
        assert word in text


def test_overrides_win_over_the_file_and_keep_their_types(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('kind = "tag"\n[fit]\nlr = 1.0\nepochs = 7\n[method]\nname = "pasta"\n')
    recipe = read_recipe(
        path,
        [
            "fit.lr=1e-2",
            "fit.seed=7",
            "data.train=a=b,c.csv",
            "method.layers=[0, 1]",
            "fit.class_weights=balanced",
            "fit.patience=none",
            "name=2026-01-31",
            'fit.report_to=["tensorboard"]',
        ],
    )
    assert (recipe.kind, recipe.fit.lr, recipe.fit.epochs, recipe.fit.seed) == ("tag", 0.01, 7, 7)
    assert recipe.data.train == "a=b,c.csv"
    assert recipe.method == PastaOptions(layers=(0, 1))
    assert (recipe.fit.class_weights, recipe.fit.patience) == ("balanced", None)
    assert recipe.name == "2026-01-31"
    assert recipe.fit.report_to == ("tensorboard",)


@pytest.mark.parametrize("slots", ["middle", "[0.5]", "1.5", "{a=1}"])
def test_slots_are_words_or_numbers(slots: str) -> None:
    with pytest.raises(
        RecipeError, match=r"method\.slots: should be 'all', 'first', 'rest' or a li"
    ):
        read_recipe(None, [f"method.slots={slots}"])
    assert read_recipe(None, ["method.slots=[1, 0]"]).method == PastaOptions(slots=(1, 0))


def test_none_is_a_way_to_share() -> None:
    recipe = read_recipe(None, ["method.share=all", "method.share=none"])
    assert recipe.method == PastaOptions(share="none")


def test_another_method_leaves_the_first_ones_options_behind(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        '[method]\nname = "pasta"\nnum_slots = 2\n[backbone]\nname = "a/b"\nrevision = "1"\n'
    )
    other = read_recipe(path, ["method=linear", "backbone=c/d"])
    assert other.method == LinearOptions()
    assert (other.backbone.name, other.backbone.revision) == ("c/d", None)
    same = read_recipe(path, ["method=pasta", "backbone=a/b"])
    assert same.method == PastaOptions(num_slots=2)
    assert same.backbone.revision == "1"
    before = read_recipe(None, ["method.num_slots=2", "method=pasta"])
    assert before.method == PastaOptions(num_slots=2)


def test_what_does_not_fit_a_method_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'method\.num_slots'"):
        read_recipe(None, ["method=linear", "method.num_slots=2"])


@pytest.mark.parametrize("key", ["method", "backbone"])
def test_a_name_alone_in_the_file_can_be_overridden(tmp_path: Path, key: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f'{key} = "linear"\n')
    assert read_recipe(path, [f"{key}=pasta"]) == read_recipe(None, [f"{key}=pasta"])


def test_a_recipe_survives_toml(tmp_path: Path) -> None:
    recipe = make_recipe(
        {
            "name": "acme/tickets-2.1",
            "kind": "multilabel",
            "method": {"share": "by_token", "layers": [1, 2], "init_std": 1e-7},
            "data": {"train": "ä.csv", "text": 'quotes " and\nlines'},
            "fit": {"lr": 1 / 3, "class_weights": {"a.b": 2.0, "ü": 0.1}, "report_to": ["wandb"]},
        }
    )
    path = tmp_path / "r.toml"
    path.write_text(recipe_toml(recipe), encoding="utf-8")
    assert read_recipe(path) == recipe
    path.write_text(recipe_toml(recipe.resolved()), encoding="utf-8")
    assert read_recipe(path) == recipe.resolved()


@pytest.mark.parametrize("method", METHOD_FIT)
def test_rates_and_epochs_left_out_are_the_methods_own(method: str) -> None:
    own, names = METHOD_FIT[method], [f"method={method}"]
    if method == "peft":
        names.append("method.type=VERA")
    fit = read_recipe(None, names).resolved().fit
    assert (fit.lr, fit.head_lr, fit.epochs) == own
    fit = read_recipe(None, [*names, "fit.lr=0.5", "fit.epochs=7"]).resolved().fit
    assert (fit.lr, fit.head_lr, fit.epochs) == (0.5, own.head_lr, 7)


def test_defaults() -> None:
    recipe = Recipe()
    assert recipe.backbone.name == DEFAULT_BACKBONE
    assert recipe.method == PastaOptions()
    assert tomllib.loads(recipe_toml(recipe))["kind"] == "classify"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "There is no recipe"), (b"kind = ", "not a TOML file"), (b"\xff", "not a TOML file")],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "r.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError, match=words):
        read_recipe(path)
    with pytest.raises(RecipeError, match="is a folder"):
        read_recipe(tmp_path)
