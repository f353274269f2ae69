"""Which modules of a transformer a method works on: its products, norms and biases, by name.

PEFT's own tables of targets differ from the papers for some architectures and lack others, so we name
the modules ourselves, each with its layer.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from pastina.errors import BackboneError, RecipeError
from pastina.methods.layers import config_above, find_layers, model_name

PARTS = ("query", "key", "value", "out", "up", "down")


@dataclass(frozen=True, slots=True)
class Products:
    """What the linear products of a layer are called; up, down: of the feed-forward net.

    Where query, key and value are one product, all three have its name.
    """

    query: str
    key: str
    value: str
    out: str
    up: tuple[str, ...]
    down: str

    @property
    def is_fused(self) -> bool:
        """Whether query, key and value are one product."""
        return self.query == self.value


_BERT = Products(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
)
_T5 = Products(
    query="layer.0.SelfAttention.q",
    key="layer.0.SelfAttention.k",
    value="layer.0.SelfAttention.v",
    out="layer.0.SelfAttention.o",
    up=("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"),
    down="layer.1.DenseReluDense.wo",
)
PRODUCTS: dict[str, Products] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "deberta-v2": Products(
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        out="attention.output.dense",
        up=("intermediate.dense",),
        down="output.dense",
    ),
    "distilbert": Products(
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        out="attention.out_lin",
        up=("ffn.lin1",),
        down="ffn.lin2",
    ),
    "mpnet": Products(
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        out="attention.attn.o",
        up=("intermediate.dense",),
        down="output.dense",
    ),
    "albert": Products(
        query="albert_layers.0.attention.query",
        key="albert_layers.0.attention.key",
        value="albert_layers.0.attention.value",
        out="albert_layers.0.attention.dense",
        up=("albert_layers.0.ffn",),
        down="albert_layers.0.ffn_output",
    ),
    "modernbert": Products(
        query="attn.Wqkv",
        key="attn.Wqkv",
        value="attn.Wqkv",
        out="attn.Wo",
        up=("mlp.Wi",),
        down="mlp.Wo",
    ),
    "vit": Products(
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        out="attention.o_proj",
        up=("mlp.fc1",),
        down="mlp.fc2",
    ),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
}


def find_products(model: nn.Module) -> Products:
    """What the products of this model's layers are called.

    Raises:
        BackboneError: the architecture is not known.
    """
    names = find_layers(model).names
    config = config_above(dict(model.named_modules()), names[0])
    kind = getattr(config, "model_type", model_name(model))
    if kind not in PRODUCTS:
        raise BackboneError(
            f"The products of a {kind!r} layer are not known; known are {', '.join(PRODUCTS)}. Name "
            "the modules by a pattern (method.targets), or choose another method."
        )
    return PRODUCTS[kind]


def product_names(
    model: nn.Module, parts: Iterable[str], layers: Iterable[str] | None = None
) -> list[str]:
    """The full names of these parts (see PARTS) in the layers, in order, each once.

    layers: names; None: all of the model.
    """
    products, modules = find_products(model), dict(model.named_modules())
    found: dict[str, None] = {}
    for layer in find_layers(model).names if layers is None else layers:
        for part in parts:
            value = getattr(products, part)
            for name in (value,) if isinstance(value, str) else value:
                if (full := f"{layer}.{name}") in modules:
                    found[full] = None
    if not found:
        raise BackboneError(f"{model_name(model)} has none of {', '.join(parts)} in its layers.")
    return list(found)


def norm_names(model: nn.Module) -> list[str]:
    """The full names of the norms with weights, wherever they are in the backbone."""
    return [name for name, module in model.named_modules() if _is_norm(module)]


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    named_so = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm")
    return named_so and isinstance(weight, nn.Parameter) and weight.dim() == 1


def check_pattern(model: nn.Module, pattern: str, key: str) -> str:
    """The pattern, if it fits a module of the model; key: of the recipe, where it stands.

    Raises:
        RecipeError: it is no pattern, or fits none.
    """
    names = [name for name, _ in model.named_modules() if name]
    try:
        fits = any(_fitting(pattern, names))
    except re.error as error:
        raise RecipeError(f"{key} = {pattern!r} is not a pattern: {error}.") from None
    if not fits:
        near = difflib.get_close_matches(pattern, names, n=2, cutoff=0.0)
        raise RecipeError(
            f"{key} = {pattern!r} fits the whole name of no module. Names are such as "
            f"{' and '.join(near)}."
        )
    return pattern


def as_pattern(model: nn.Module, names: Sequence[str]) -> str:
    """A pattern that fits exactly these modules, the same for any number of layers if it can be.

    PEFT compares it with the whole name. It stands in the adapter's config, where a list of all names
    would be long and, as PEFT makes a set of it, in another order each time.
    """
    every = [name for name, _ in model.named_modules()]
    short = "|".join(dict.fromkeys(_any_layer(name) for name in names))
    if set(_fitting(short, every)) == set(names):
        return short
    return "|".join(re.escape(name) for name in names)


def _any_layer(name: str) -> str:
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))


def _fitting(pattern: str, names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if re.fullmatch(pattern, name))
