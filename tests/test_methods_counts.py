"""How many numbers each method learns, on models of their published size."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from pastina.errors import RecipeError
from pastina.method_options import (
    BitFitOptions,
    BottleneckOptions,
    IA3Options,
    LayerNormOptions,
    LoraOptions,
    PrefixOptions,
    PromptOptions,
    PTuningV2Options,
    Section,
    TokensOptions,
)
from pastina.methods import attach
from pastina.methods.bitfit import bias_names
from pastina.methods.bottleneck import Bottleneck, BottleneckConfig

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
T5_SMALL: dict[str, Any] = {"tie_word_embeddings": True}
T5_BASE: dict[str, Any] = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertModel(BertConfig()),
    "bert, no pooler": lambda: BertModel(BertConfig(), add_pooling_layer=False),
    "bert-large": lambda: BertModel(BertConfig(**LARGE)),
    "roberta": lambda: RobertaModel(RobertaConfig(vocab_size=50265, type_vocab_size=1)),
    "vit": lambda: ViTModel(ViTConfig(), add_pooling_layer=False),
    "t5-small": lambda: T5EncoderModel(T5Config(**T5_SMALL)),
    "t5-base": lambda: T5EncoderModel(T5Config(**T5_BASE)),
}
QKV = ("query", "key", "value")
SIX = (*QKV, "out", "up", "down")


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    """Shapes only: the models have no numbers."""
    with torch.device("meta"):
        yield


def count(name: str, options: Section) -> int:
    model = attach(MODELS[name](), options, special_token_ids=(101, 102))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("bert", BitFitOptions(), 102_912),
        ("bert, no pooler", BitFitOptions(), 102_144),
        ("bert-large", BitFitOptions(), 272_384),
        ("roberta", BitFitOptions(), 102_912),
        ("vit", BitFitOptions(), 102_912),
        ("bert", BitFitOptions(biases="query_up"), 12 * (768 + 3072)),
        ("t5-small", BitFitOptions(add=True), 6 * (4 * 512 + 2048 + 512)),
        ("bert", LayerNormOptions(), 38_400),
        ("bert-large", LayerNormOptions(), 100_352),
        ("roberta", LayerNormOptions(), 38_400),
        ("vit", LayerNormOptions(), 38_400),
        ("t5-base", LayerNormOptions(), 768 * (2 * 12 + 1)),  # scales only
        ("bert", IA3Options(), 55_296),
        ("roberta", IA3Options(), 55_296),
        ("bert-large", IA3Options(), 147_456),
        ("vit", IA3Options(), 55_296),
        ("t5-small", IA3Options(), 6 * (512 + 512 + 2048)),
        ("bert", LoraOptions(r=8), 294_912),
        ("vit", LoraOptions(r=8), 294_912),
        ("vit", LoraOptions(r=8, parts=QKV), 442_368),
        ("vit", LoraOptions(r=16, parts=QKV), 884_736),
        ("vit", LoraOptions(r=8, parts=SIX), 1_327_104),
        ("vit", BottleneckOptions(reduction=96), 156_768),
        ("vit", BottleneckOptions(reduction=24), 599_424),
        ("vit", BottleneckOptions(reduction=12), 1_189_632),
        ("vit", BottleneckOptions(style="houlsby", reduction=96), 313_536),
        ("vit", BottleneckOptions(style="houlsby", reduction=24), 1_198_848),
        ("vit", BottleneckOptions(style="houlsby", reduction=12), 2_379_264),
        ("bert", BottleneckOptions(), 12 * (1536 * 48 + 48 + 768)),
        ("bert", BottleneckOptions(style="parallel"), 12 * (1536 * 384 + 384 + 768)),
        ("bert", PTuningV2Options(num_virtual_tokens=5), 92_160),
        ("roberta", PTuningV2Options(num_virtual_tokens=20), 368_640),
        ("bert-large", PTuningV2Options(num_virtual_tokens=10), 491_520),
        ("bert", PrefixOptions(num_virtual_tokens=10, inner_size=512), 9_857_024),
        ("bert", PromptOptions(num_virtual_tokens=20, init="random"), 20 * 768),
        ("bert", TokensOptions(), 2 * 768),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_published_counts(name: str, options: Section, expected: int) -> None:
    assert count(name, options) == expected


@pytest.mark.parametrize(("width", "expected"), [(8, 13_064), (32, 49_952), (64, 99_136)])
def test_one_bottleneck(width: int, expected: int) -> None:
    net = Bottleneck(768, BottleneckConfig(reduction=768 / width))
    assert sum(p.numel() for p in net.parameters()) == expected


def test_houlsby_has_two_nets_in_a_layer_and_the_others_one() -> None:
    for style, number in (("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)):
        model = attach(MODELS["bert"](), BottleneckOptions(style=style))  # type: ignore[arg-type]
        assert sum(isinstance(m, Bottleneck) for m in model.modules()) == 12 * number


def test_biases_are_those_whose_names_end_so() -> None:
    bart = BartModel(
        BartConfig(
            d_model=1024,
            encoder_layers=12,
            decoder_layers=12,
            encoder_ffn_dim=4096,
            decoder_ffn_dim=4096,
        )
    )
    numbers = sum(bart.get_submodule(name).bias.numel() for name in bias_names(bart, "all"))  # type: ignore[union-attr,operator]
    assert numbers == 333_824
    with pytest.raises(RecipeError, match=r"no biases to train.*method\.add = true"):
        count("t5-base", BitFitOptions())


def test_something_else_than_the_options_of_a_method() -> None:
    with pytest.raises(RecipeError, match=r"wanted; seen Section\. Pass for instance LoraOptions"):
        attach(BertModel(BertConfig(num_hidden_layers=1)), Section())
