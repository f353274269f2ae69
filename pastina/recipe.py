"""The full description of a training run, and the only place where a default lives."""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from datetime import date, time
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from pastina.errors import RecipeError
from pastina.method_options import METHOD_FIT as METHOD_FIT
from pastina.method_options import METHOD_OPTIONS as METHOD_OPTIONS
from pastina.method_options import FullOptions as FullOptions
from pastina.method_options import LinearOptions as LinearOptions
from pastina.method_options import MethodOptions, Section
from pastina.method_options import PastaOptions as PastaOptions
from pastina.presets import with_preset

KindName = Literal["classify", "multilabel", "regress", "tag"]
PrecisionName = Literal["auto", "fp32", "bf16", "int8"]  # auto: bf16 where it is fast
DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"


Weight = Annotated[float, Field(gt=0, le=1e6)]
Rate = Annotated[float, Field(gt=0)]


class BackboneSpec(Section):
    """Which frozen transformer, a hub id or a folder, and how many of its layers, from below."""

    name: str = DEFAULT_BACKBONE
    revision: str | None = None
    num_layers: int | None = None  # -1: all but the top one; None: all

    @field_validator("num_layers")
    @classmethod
    def _some_are_left(cls, num_layers: int | None) -> int | None:
        if num_layers == 0:
            raise ValueError(
                "a backbone without layers learns nothing; leave it out for all of them"
            )
        return num_layers


class DataSpec(Section):
    """Where the examples are and how their columns are called.

    Files: csv, tsv, jsonl, json (Label Studio export), parquet, conll (token TAB tag). With `hub`,
    train, dev and test name its splits.
    """

    folder: str = "."  # in front of train, dev and test; they are relative to the working folder
    train: str | None = None
    dev: str | None = None
    test: str | None = None
    format: Literal["auto", "csv", "tsv", "jsonl", "parquet", "conll", "label-studio"] = "auto"
    hub: str | None = (
        None  # a hub id, a GLUE task as "glue/rte", or a folder that `datasets` can load
    )
    config: str | None = None
    text: str | None = None  # column names; None: found by name
    text_pair: str | None = None
    label: str | None = None
    dev_share: float = Field(
        default=0.1, gt=0, lt=1
    )  # of train, stratified, where no dev part is given
    dev_rows: int | None = Field(
        default=None, ge=1
    )  # of the dev part, drawn by the seed; where none is given, so many of train instead of a share
    limit: int | None = Field(
        default=None, ge=1
    )  # at most so many training rows, drawn by the seed
    max_length: int = Field(default=128, ge=8)  # tokens, special ones included
    stride: int = Field(default=32, ge=0)  # tagging: tokens that two neighbouring windows share
    align: Literal["error", "widen"] = "error"  # a span that cuts a word


class HeadSpec(Section):
    """What stands between the last hidden state and the answer."""

    pooling: Literal["auto", "pooler", "cls", "mean"] = "auto"
    dropout: float = Field(default=0.1, ge=0, lt=1)


class FitSpec(Section):
    """How the run learns. lr, head_lr and epochs left out: the method's own."""

    lr: float | None = Field(default=None, gt=0)
    head_lr: float | None = Field(default=None, gt=0)
    epochs: int | None = Field(default=None, ge=1)
    batch: int = Field(default=32, ge=1)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_eps: float = Field(default=1e-8, gt=0)
    warmup: float = Field(default=0.06, ge=0, lt=1)  # share of all steps
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    layer_decay: float = Field(default=1.0, gt=0, le=10)  # of the rate, from layer to layer below
    layer_rates: tuple[Rate, ...] | None = None  # times lr, for each layer of the backbone
    slot_rates: tuple[Rate, ...] | None = None  # times lr, for each vector of a layer (pasta)
    everywhere_lr: float | None = Field(
        default=None, gt=0
    )  # of the vectors of method.everywhere; None: lr
    rank_lr: float | None = Field(default=None, gt=0)  # of the products of method.rank; None: lr
    bias_lr: float | None = Field(
        default=None, gt=0
    )  # of the biases of method.bias_layers; None: BitFit's
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    consistency: float = Field(default=0.0, ge=0)  # weight of what two dropout masks differ by
    teacher: str | None = None  # folder of a run, or an adapter
    teacher_weight: float = Field(default=0.5, gt=0, le=1)
    teacher_temperature: float = Field(default=2.0, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    clip: float = Field(default=1.0, ge=0)  # largest gradient norm; 0: none
    patience: int | None = Field(
        default=None, ge=1
    )  # epochs without a better dev metric before stopping
    score_every: int = Field(default=1, ge=1)  # epochs between two scores of dev; the last has one
    class_weights: Literal["balanced"] | dict[str, Weight] | None = None
    precision: PrecisionName = "auto"
    metric: str | None = None  # of dev, picks the best epoch; None: the kind's first
    seed: int = Field(default=13, ge=0, lt=2**32)
    report_to: tuple[str, ...] = ()  # names of accelerate's trackers
    save_seconds: float = Field(
        default=60.0, ge=0
    )  # between two resumable states; 0: after each step


class Recipe(Section):
    """A run, whole. Build it from keywords, or with `read_recipe`."""

    name: str | None = None  # also names the run's folder, such as "acme/tickets"
    kind: KindName = "classify"
    preset: str | None = None  # settings below those that are given, see presets.py
    backbone: BackboneSpec = BackboneSpec()
    method: MethodOptions = PastaOptions()
    data: DataSpec = DataSpec()
    head: HeadSpec = HeadSpec()
    fit: FitSpec = FitSpec()

    @model_validator(mode="before")
    @classmethod
    def _on_its_preset(cls, values: Any) -> Any:
        has_one = isinstance(values, Mapping) and values.get("preset") is not None
        return with_preset(values) if has_one else values

    @field_validator("name")
    @classmethod
    def _stays_in_its_folder(cls, name: str | None) -> str | None:
        if name is not None and any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError("the name must not lead to another folder")
        return name

    def resolved(self) -> "Recipe":
        """The same recipe with the method's own learning rates and epochs where none were given."""
        own = METHOD_FIT[self.method.name]
        fit = self.fit.model_copy(
            update={
                "lr": self.fit.lr or own.lr,
                "head_lr": self.fit.head_lr or own.head_lr,
                "epochs": self.fit.epochs or own.epochs,
            }
        )
        if isinstance(self.method, PastaOptions) and self.method.bias_layers is not None:
            bias_lr = fit.bias_lr or METHOD_FIT["bitfit"].lr
            fit = fit.model_copy(update={"bias_lr": bias_lr})
        return self.model_copy(update={"fit": fit})


def read_recipe(path: str | Path | None, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a TOML file (or the default one) with `section.key=value` overrides applied.

    Values are read as TOML where they can be (`fit.lr=1e-2`, `method.layers=[0,1]`), else as text.

    Raises:
        RecipeError: no such file, not TOML, an unknown key (names the nearest), a value out of range.
    """
    values = _read_toml(Path(path)) if path is not None else {}
    for override in overrides:
        _apply_override(values, override)
    return make_recipe(values, source=str(path) if path is not None else "the recipe")


def make_recipe(values: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """The checked recipe of plain nested values; see `read_recipe`."""
    if isinstance(method := values.get("method"), Mapping) and "name" not in method:
        values = {**values, "method": {"name": PastaOptions().name, **method}}
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        complaints = "; ".join(_explain(complaint) for complaint in error.errors())
        raise RecipeError(f"{source}: {complaints}.".replace("?.", "?")) from None


def with_values(recipe: Recipe, settings: Mapping[str, Any], source: str) -> Recipe:
    """The recipe with other values by key, laid over what it says itself.

    What it leaves out stays left out: another method or preset brings its own. `method` and `backbone`
    may be a name alone.

    Raises:
        RecipeError: as `read_recipe` says; a preset beside that of the recipe.
    """
    values = recipe.model_dump(mode="json", exclude_unset=True)
    if "method" in values:  # built in Python it need not say its name
        values["method"]["name"] = recipe.method.name
    if "preset" in settings and recipe.preset is not None:
        raise RecipeError(
            f"{source}: the recipe has the preset {recipe.preset!r} already, and its settings stand in "
            "the recipe. Leave it out there to choose among presets."
        )
    for key, value in sorted(settings.items(), key=lambda item: item[0].count(".")):
        _lay(values, key, value)  # the method before its options
    return make_recipe(values, source)


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML that `read_recipe` reads back to the same recipe."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def check_precision(precision: Any) -> None:
    """Nothing, if there is such a precision.

    Raises:
        RecipeError: there is not.
    """
    if precision not in get_args(PrecisionName):
        raise RecipeError(
            f"There is no precision {precision!r}. Take one of {', '.join(get_args(PrecisionName))}."
        )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe {path}. Name a TOML file that exists.") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder. Name a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not a TOML file: {error}.") from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key.rpartition(".")[2]:
        raise RecipeError(f"{override!r} is not an override. Write it as section.key=value.")
    _lay(values, key, _parse_value(text, key))


# sections that a name alone may stand for
_NAMED = ("backbone", "method")


def _lay(values: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at its key; a name alone chooses the method or the backbone."""
    *sections, leaf = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{key!r}: {section!r} is a value, not a section.")
    is_name = not sections and leaf in _NAMED and isinstance(value, str)
    values[leaf] = _named(values.get(leaf), value) if is_name else value


def parse_choices(text: str) -> tuple[str, list[Any]]:
    """A key and the values to try for it.

    Raises:
        RecipeError: not KEY=VALUE,VALUE,...

    >>> parse_choices("fit.lr=1e-2,3e-2")
    ('fit.lr', [0.01, 0.03])
    """
    key, equals, values = text.partition("=")
    parsed = [_parse_value(value.strip(), key.strip()) for value in _split_values(values)]
    if not equals or not key or not all(v != "" for v in parsed):
        raise RecipeError(f"--try takes KEY=VALUE,VALUE,..., not {text!r}.")
    return key.strip(), parsed


def _split_values(text: str) -> list[str]:
    """At commas that are not inside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _named(section: Any, name: str) -> dict[str, Any]:
    """What `method=linear` makes of a section: what was said of another method goes with it."""
    if not isinstance(section, dict) or section.get("name", name) != name:
        return {"name": name}
    return {**section, "name": name}


def _parse_value(text: str, key: str) -> Any:
    if key in _NAMED and not text.lstrip().startswith("{"):
        return text
    if text.strip().lower() == "none":
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if isinstance(value, date | time) else value  # name=2026-01-31 is a name


# what others call a key
_OTHER_WORDS = {"learning_rate": "lr", "batch_size": "batch", "num_epochs": "epochs"}


def _explain(error: Any) -> str:
    """One pydantic complaint in our words; the union's tag is left out of the location."""
    parts = [str(part) for part in error["loc"] if part not in _METHOD_NAMES]
    location = ".".join(parts)
    if error["type"] == "extra_forbidden":
        known = _keys_at(error["loc"][:-1])
        other = _OTHER_WORDS.get(parts[-1])
        near = [other] if other in known else difflib.get_close_matches(parts[-1], known, n=1)
        near = near or _homes(parts[-1])
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {location!r}; {hint}"
    if error["type"] == "union_tag_invalid":
        seen = error["input"].get("name") if isinstance(error["input"], Mapping) else error["input"]
        near = difflib.get_close_matches(str(seen), _METHOD_NAMES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_METHOD_NAMES)}"
        return f"unknown method {seen!r}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    seen = "" if isinstance(error["input"], Mapping | Recipe) else f", not {error['input']!r}"
    return f"{location}: {message}{seen}".removeprefix(": ")


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    """The keys that a recipe knows at this place."""
    model: Any = Recipe
    for part in location:
        if part in _METHOD_NAMES:
            model = METHOD_OPTIONS[part]
        elif part != "method":
            model = model.model_fields[part].annotation
    return list(model.model_fields)


def _homes(key: str) -> list[str]:
    """The sections in which this key would be right."""
    sections = ["backbone", "data", "head", "fit"]
    return [f"{section}.{key}" for section in sections if key in _keys_at((section,))]


_METHOD_NAMES = tuple(METHOD_OPTIONS)
