"""The method itself: notes on the paper, section 9."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, RobertaConfig
from transformers import RobertaModel as Roberta

from pastina.errors import AdapterError, BackboneError, DataError, PastinaError, RecipeError
from pastina.methods import (
    METHODS,
    FullConfig,
    LinearConfig,
    PastaConfig,
    attach,
    train_mode,
)
from pastina.methods._peft import register
from pastina.methods.pasta import PastaLayer, PastaModel
from pastina.recipe import FullOptions, LinearOptions, PastaOptions
from tests.models import CLS, LAYERS, SEP, TinyTask, batch, bert, build, task

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

IDS = (CLS, SEP)


def tuned(model: nn.Module | None = None, **settings: Any) -> Any:
    settings = {"special_token_ids": IDS, "num_slots": 3, **settings}
    return get_peft_model(model or build("bert"), PastaConfig(**settings)).eval()


def vectors(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if "pasta_vectors" in n]


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, PastaLayer)]


def added_in_forward(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """What every layer added to its input."""
    seen: list[Tensor] = []
    handles = []
    for layer in layers(model):
        handles.append(layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
        handles.append(
            layer.base_layer.register_forward_pre_hook(
                lambda _, args: seen.append(args[0] - seen.pop())
            )
        )
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


# --- counts ---------------------------------------------------------------------------------------

BASE: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
LARGE: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
BASE["intermediate_size"], LARGE["intermediate_size"] = 3072, 4096
ROBERTA: dict[str, Any] = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}
PUBLISHED: dict[str, tuple[Any, int]] = {
    "bert-base-uncased": (BertConfig(**BASE, vocab_size=30522), 109_482_240),
    "bert-large-uncased": (BertConfig(**LARGE, vocab_size=30522), 335_141_888),
    "bert-large-cased": (BertConfig(**LARGE, vocab_size=28996), 333_579_264),
    "roberta-base": (RobertaConfig(**BASE, **ROBERTA), 124_645_632),
    "roberta-large": (RobertaConfig(**LARGE, **ROBERTA), 355_359_744),
}


def empty(name: str) -> Any:
    config, _ = PUBLISHED[name]
    with init_empty_weights(include_buffers=True):
        return Roberta(config) if isinstance(config, RobertaConfig) else BertModel(config)


@pytest.mark.parametrize(
    ("name", "shared", "two", "three", "four"),
    [
        ("bert-base-uncased", 9_216, 18_432, 27_648, 36_864),
        ("bert-large-uncased", 24_576, 49_152, 73_728, 98_304),
        ("bert-large-cased", 24_576, 49_152, 73_728, 98_304),
        ("roberta-base", 9_216, 18_432, 27_648, 36_864),
        ("roberta-large", 24_576, 49_152, 73_728, 98_304),
    ],
)
def test_counts_of_the_paper(name: str, shared: int, two: int, three: int, four: int) -> None:
    model = empty(name)
    total = sum(p.numel() for p in model.parameters())
    assert total == PUBLISHED[name][1]
    for settings, expected in [
        ({"num_slots": 3, "share": "all"}, shared),
        ({"num_slots": 2}, two),
        ({"num_slots": 3}, three),
        ({"num_slots": 4}, four),
        ({"num_slots": 3, "share": "by_token"}, two),
    ]:
        adapted = tuned(model, **settings)
        assert adapted.get_nb_trainable_parameters() == (expected, total + expected)
        model = adapted.unload()


@pytest.mark.parametrize(
    ("name", "num_slots", "labels", "expected", "percent"),
    [
        ("bert-large-cased", 2, 2, 51_202, 0.015347),
        ("bert-large-cased", 3, 2, 75_778, 0.022711),
        ("bert-large-cased", 3, 3, 76_803, 0.023019),
        ("bert-large-cased", 3, 1, 74_753, 0.022404),
        ("bert-large-cased", 2, 9, 58_377, 0.017497),
        ("bert-base-uncased", 2, 2, 19_970, 0.018237),
        ("bert-base-uncased", 3, 2, 29_186, None),
        ("bert-base-uncased", 3, 3, 29_955, None),
        ("bert-base-uncased", 2, 9, 25_353, None),
        ("roberta-large", 4, 3, 101_379, 0.02853),
    ],
)
def test_counts_with_a_linear_head(
    name: str, num_slots: int, labels: int, expected: int, percent: float | None
) -> None:
    config, total = PUBLISHED[name]
    with init_empty_weights(include_buffers=True):
        model = TinyTask(empty(name), labels)
    head = config.hidden_size * labels + labels
    model = tuned(model, num_slots=num_slots, modules_to_save=["classifier"])
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learning == expected
    if name == "roberta-large":
        assert round(100 * expected / total, 5) == percent
    elif percent is not None:
        assert round(100 * expected / (total + expected), 6) == percent
    shapes = sorted(tuple(p.shape) for p in model.parameters() if p.requires_grad)
    tables = [(num_slots, config.hidden_size)] * config.num_hidden_layers
    assert shapes == sorted([*tables, (labels, config.hidden_size), (labels,)])
    assert head + len(tables) * num_slots * config.hidden_size == expected


# --- numbers --------------------------------------------------------------------------------------


def test_row_alone_equals_row_in_a_mixed_batch() -> None:
    model = tuned().double()
    ids = torch.tensor([[CLS, 7, SEP, 0, 0], [CLS, 7, SEP, 8, SEP]])
    mask = (ids != 0).long()
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask).last_hidden_state
        alone = model(input_ids=ids[:1, :3]).last_hidden_state
    torch.testing.assert_close(both[:1, :3], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_slots", [2, 3])
def test_sequence_classification_equals_hooks(num_slots: int) -> None:
    config = bert(num_labels=3)
    torch.manual_seed(0)
    plain = BertForSequenceClassification(config).eval()
    inputs = batch("bert")
    if num_slots == 2:
        inputs = {key: value[[0, 2]] for key, value in inputs.items()}
    model = tuned(plain, num_slots=num_slots, modules_to_save=["classifier"], init_std=1.0)
    ours = model(**inputs).logits
    other = BertForSequenceClassification(config).eval()
    rank = torch.zeros_like(inputs["input_ids"])
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        places = [place for place, token in enumerate(ids) if token in IDS]
        rank[row, places] = torch.arange(1, len(places) + 1)
    blocks: Any = other.bert.encoder.layer
    for block, own in zip(blocks, vectors(model), strict=True):
        table = torch.cat([torch.zeros(1, own.shape[1]), own.detach()])
        block.register_forward_pre_hook(lambda _, args, t=table: (args[0] + t[rank], *args[1:]))
    other.load_state_dict({k: v.clone() for k, v in model.unload().state_dict().items()})
    assert torch.equal(ours, other(**inputs).logits)


def test_a_vector_acts_from_its_own_layer_on() -> None:
    model, inputs = tuned(), batch("bert")
    seen: list[Tensor] = []
    for layer in layers(model):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def states() -> list[Tensor]:
        seen.clear()
        with torch.no_grad():
            last = model(**inputs).last_hidden_state
        return [*seen, last]

    before = states()
    with torch.no_grad():
        vectors(model)[1][1] += 1.0
    changes = [(a - b).abs().max().item() for a, b in zip(before, states(), strict=True)]
    assert changes[:2] == [0, 0]
    assert min(changes[2:]) > 0


def test_gradient_is_the_sum_over_the_batch() -> None:
    model, inputs = tuned().double(), batch("bert")
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        kept.append(args[0])

    for layer in layers(model):
        layer.base_layer.register_forward_pre_hook(keep)
    model(**inputs).last_hidden_state.square().sum().backward()
    for hidden, parameter in zip(kept, vectors(model), strict=True):
        assert hidden.grad is not None
        expected = torch.zeros_like(parameter)
        for row, ids in enumerate(inputs["input_ids"].tolist()):
            places = [place for place, token in enumerate(ids) if token in IDS]
            for slot, place in enumerate(places):
                expected[slot] += hidden.grad[row, place]
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected)


def test_the_residual_branch_carries_the_vector() -> None:
    config = bert(
        hidden_size=3,
        num_attention_heads=1,
        num_hidden_layers=1,
        intermediate_size=4,
        layer_norm_eps=0.0,
    )
    model = tuned(BertModel(config), num_slots=1, special_token_ids=[CLS])
    layer = layers(model)[0]
    with torch.no_grad():
        for part in (layer.base_layer.attention.output, layer.base_layer.output):
            part.dense.weight.zero_()
            part.dense.bias.zero_()
        vectors(model)[0].copy_(torch.tensor([[0.0, 2.0, 0.0]]))
        hidden = torch.tensor([[[3.0, 1.0, -1.0], [3.0, 1.0, -1.0]]])
        layer.register_forward_pre_hook(lambda _, args: (hidden, *args[1:]))
        out = model(input_ids=torch.tensor([[CLS, 7]])).last_hidden_state[0]
    torch.testing.assert_close(
        out[0], torch.tensor([0.70711, 0.70711, -1.41421]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(out[1], torch.tensor([1.22474, 0.0, -1.22474]), atol=1e-4, rtol=0)


def test_initial_values() -> None:
    torch.manual_seed(0)
    config = bert(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    config.intermediate_size = 4
    with init_empty_weights():
        model = BertModel(config)
    model.encoder.layer = nn.ModuleList(TinyBlock() for _ in range(24))
    tables = torch.stack([p.detach() for p in vectors(tuned(model, num_slots=2))])
    assert tables.shape == (24, 2, 1024)
    assert abs(tables.std().item() / 0.02 - 1) < 0.02
    assert abs(tables.norm(dim=-1).mean().item() / 0.64 - 1) < 0.03
    assert tables.mean().abs() < 0.001
    assert not any(p.any() for p in vectors(tuned(init_std=0)))


class TinyBlock(nn.Module):
    """A layer with next to no weights, so that a wide model fits into a test."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def test_dropout_of_the_vectors() -> None:
    model = tuned(dropout=0.1, init_std=0.0)
    with torch.no_grad():
        for parameter in vectors(model):
            parameter.fill_(3.0)
    ids = torch.tensor([[CLS, 7, SEP, 8, SEP]] * 40)
    specials = [0, 2, 4]
    train_mode(model)
    torch.manual_seed(0)
    added = [layer[:, specials] for layer in added_in_forward(model, {"input_ids": ids})]
    dropped = torch.stack(added).abs() < 1e-3
    kept = torch.stack(added)[~dropped]
    torch.testing.assert_close(kept, torch.full_like(kept, 3.0 / 0.9), rtol=0, atol=1e-5)
    assert 0.08 < dropped.float().mean() < 0.12
    assert (dropped[:, 0] != dropped[:, 1]).any(), "examples"
    assert (dropped[:, :, 0] != dropped[:, :, 1]).any(), "slots"
    assert (dropped[0] != dropped[1]).any(), "layers"
    assert (dropped[..., 0] != dropped[..., 1]).any(), "elements"
    model.eval()
    exact = added_in_forward(model, {"input_ids": ids})
    torch.testing.assert_close(
        exact[0][:, specials], torch.full((40, 3, 16), 3.0), rtol=0, atol=1e-5
    )


def test_tied_slots() -> None:
    ids = torch.tensor([[CLS, 7, SEP, 8, SEP]])
    by_token = tuned(share="by_token", init_std=1.0)
    assert [tuple(p.shape) for p in vectors(by_token)] == [(2, 16)] * LAYERS
    added = added_in_forward(by_token, {"input_ids": ids})[0][0]
    own = vectors(by_token)[0].detach()
    torch.testing.assert_close(added[[0, 2, 4]], own[[0, 1, 1]], rtol=0, atol=1e-5)
    shared = tuned(share="all", init_std=1.0)
    assert [tuple(p.shape) for p in vectors(shared)] == [(1, 16)] * LAYERS
    added = added_in_forward(shared, {"input_ids": ids})[0][0]
    torch.testing.assert_close(
        added[[0, 2, 4]], vectors(shared)[0].detach().expand(3, -1), rtol=0, atol=1e-5
    )
    for model in (by_token, shared):
        model(input_ids=ids).last_hidden_state.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vectors(model))


def test_a_subset_of_layers() -> None:
    model = tuned(layers=[2, 0])
    assert [layer.layer_name for layer in layers(model)] == ["encoder.layer.0", "encoder.layer.2"]
    with pytest.raises(RecipeError, match=r"names layer 3.*0 to 2"):
        tuned(layers=[1, 3])


def test_bfloat16_backbone_keeps_vectors_in_fp32() -> None:
    config = PastaConfig(special_token_ids=IDS, num_slots=3)
    model = get_peft_model(build("bert").bfloat16(), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in vectors(model)} == {torch.float32}
    out = model(**batch("bert")).last_hidden_state
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in vectors(model))


# --- modes ----------------------------------------------------------------------------------------


def test_train_mode_of_each_method() -> None:
    options: dict[str, Any] = {
        "modules_to_save": ["classifier"],
        "special_token_ids": IDS,
        "num_slots": 3,
    }
    pasta = attach(task(), PastaOptions(), **options)
    train_mode(pasta)
    inner: Any = pasta.get_base_model()
    assert inner.training
    assert inner.dropout.training
    assert inner.classifier.modules_to_save["default"].training
    on = {type(m).__name__ for m in inner.bert.modules() if m.training}
    assert on == {"PastaLayer", "ParameterDict"}, (
        "vectors alone are in train mode within the backbone"
    )

    linear = attach(task(), LinearOptions(), modules_to_save=["classifier"])
    train_mode(linear)
    inner: Any = linear.get_base_model()
    assert not any(m.training for m in inner.bert.modules())
    assert inner.dropout.training
    assert inner.classifier.modules_to_save["default"].training

    full = attach(task(), FullOptions())
    train_mode(full)
    assert all(m.training for m in full.modules())
    with pytest.raises(BackboneError, match="no adapter"):
        train_mode(task())


def test_train_mode_with_a_head_inside_the_backbone_and_a_wrapper_around() -> None:
    model = attach(
        build("bert"),
        PastaOptions(),
        special_token_ids=IDS,
        num_slots=3,
        modules_to_save=["pooler"],
    )
    wrapped = nn.ModuleDict({"module": model})
    train_mode(wrapped)
    inner: Any = model.get_base_model()
    assert inner.pooler.modules_to_save["default"].dense.training
    assert not inner.embeddings.dropout.training


def test_linear_on_an_architecture_that_pasta_does_not_know() -> None:
    parts = {"body": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), "head": nn.Linear(2, 2)}
    model = get_peft_model(nn.ModuleDict(parts), LinearConfig(modules_to_save=["head"]))
    train_mode(model)
    inner: Any = model.get_base_model()
    assert not inner["body"][1].training
    assert inner["head"].modules_to_save["default"].training


# --- attach, linear, full -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [PastaOptions(), LinearOptions(), FullOptions()])
def test_attach_saves_and_loads(
    options: PastaOptions | LinearOptions | FullOptions, tmp_path: Path
) -> None:
    model = attach(
        task(), options, special_token_ids=IDS, num_slots=3, modules_to_save=["classifier"]
    ).eval()
    learning = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in learning:
            parameter.add_(0.1)
    expected = model(**batch("bert"))["logits"]
    model.save_pretrained(str(tmp_path))
    seed = 9 if options.name == "full" else 0  # a full adapter brings the backbone along
    again = PeftModel.from_pretrained(task(seed=seed), tmp_path).eval()
    assert torch.equal(again(**batch("bert"))["logits"], expected)
    assert not any(p.requires_grad for p in again.parameters())
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert type(config).__name__.removesuffix("Config").lower() == options.name
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert (size > 30_000) == (options.name == "full")


def test_what_learns_with_each_method() -> None:
    heads: dict[str, Any] = {"modules_to_save": ["classifier"]}
    linear = attach(task(), LinearOptions(), **heads)
    assert linear.get_nb_trainable_parameters()[0] == 2 * 16 + 2
    full = attach(task(), FullOptions(), **heads)
    assert full.get_nb_trainable_parameters()[0] == sum(p.numel() for p in task().parameters())
    pasta = attach(task(), PastaOptions(), special_token_ids=IDS, num_slots=2, **heads)
    assert pasta.get_nb_trainable_parameters()[0] == LAYERS * 2 * 16 + 34


def test_recipe_options_go_before_the_arguments() -> None:
    options = PastaOptions(
        num_slots=2,
        share="by_token",
        layers=(1,),
        init_std=0.0,
        dropout=0.25,
        special_token_ids=(7,),
    )
    model = attach(
        task(), options, special_token_ids=IDS, num_slots=3, modules_to_save=["classifier"]
    )
    config = model.peft_config["default"]
    assert isinstance(config, PastaConfig)
    assert (config.num_slots, config.special_token_ids, config.layers) == (2, (7,), (1,))
    assert (config.share, config.init_std, config.dropout) == ("by_token", 0.0, 0.25)


def test_methods_match_the_recipe() -> None:
    for name, method in METHODS.items():
        assert method.name == name == method.options.model_fields["name"].default
        assert method.title
        assert method.paper.startswith("https://")


def test_linear_and_full_unload_and_disable() -> None:
    inputs = batch("bert")
    with torch.no_grad():
        plain = task()(**inputs)["logits"]
        linear: Any = attach(task(), LinearOptions(), modules_to_save=["classifier"]).eval()
        for parameter in linear.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
        moved = linear(**inputs)["logits"]
        assert not torch.equal(moved, plain)
        with linear.disable_adapter():
            assert torch.equal(linear(**inputs)["logits"], plain)
        assert torch.equal(linear.merge_and_unload()(**inputs)["logits"], moved)
        full: Any = attach(task(), FullOptions()).eval()
        with pytest.raises(PastinaError, match="cannot be switched off"):
            full.base_model.disable_adapter_layers()
        with pytest.raises(PastinaError, match="one such adapter"):
            full.add_adapter("second", FullConfig())
        assert torch.equal(full.merge_and_unload()(**inputs)["logits"], plain)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"share": "some"}, "none, by_token, all; seen 'some'"),
        ({"num_slots": 0}, "num_slots.*seen 0"),
        ({"num_slots": 2.0}, r"num_slots.*seen 2\.0"),
        ({"share": ["all"]}, r"none, by_token, all; seen \['all'\]"),
        ({"init_std": "a"}, "init_std must be a number from 0; seen 'a'"),
        ({"init_std": None}, "init_std.*seen None"),
        ({"dropout": "a"}, "dropout must be at least 0 and below 1; seen 'a'"),
        ({"dropout": [0.1]}, r"dropout.*seen \[0\.1\]"),
        ({"dropout": math.nan}, "dropout.*nan"),
        ({"dropout": False}, "dropout.*seen False"),
        ({"layers": 1}, "layers must be a list.*seen 1"),
        ({"slots": None}, "slots must be a list.*seen None"),
        ({"layer_slots": 5}, "layer_slots must name a slot.*seen 5"),
        ({"modules_to_save": "classifier"}, "modules_to_save.*the text 'classifier'"),
        ({"modules_to_save": [1]}, r"modules_to_save must be a list of module names; seen \[1\]"),
        ({"target_modules": 5}, "target_modules must be a list of layer names; seen 5"),
        ({"target_modules": [None]}, r"target_modules.*\[None\]"),
        ({"target_modules": []}, r"target_modules.*\[\]"),
        ({"init_std": -1.0}, "init_std.*seen -1"),
        ({"init_std": math.nan}, "init_std.*nan"),
        ({"dropout": 1.0}, "dropout.*seen 1"),
        ({"dropout": -0.1}, "dropout.*seen -0.1"),
        ({"special_token_ids": []}, r"special_token_ids.*\[\]"),
        ({"special_token_ids": [1, 1]}, r"special_token_ids.*\[1, 1\]"),
        ({"special_token_ids": [1, None]}, "special_token_ids.*None"),
        ({"special_token_ids": "12"}, "special_token_ids.*'12'"),
        ({"special_token_ids": [-1]}, r"special_token_ids.*below 0.*-1"),
        ({"layers": [-1]}, "layers.*below 0"),
        ({"layers": [True]}, "layers.*True"),
        ({"fixed_positions": [0, 1], "num_slots": 1}, "needs 2 slots"),
        ({"fixed_positions": [0], "share": "by_token"}, "by_token"),
        ({"target_modules": "layer"}, "target_modules.*'layer'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        PastaConfig(**settings)


def test_overflow_in_a_forward_leaves_the_model_usable() -> None:
    model, inputs = tuned(), batch("bert")
    expected = model(**inputs).last_hidden_state
    with pytest.raises(DataError, match=r"Row 0 holds 4 special tokens.*only 3 slots"):
        model(input_ids=torch.tensor([[CLS, SEP, SEP, SEP]]))
    assert torch.equal(model(**inputs).last_hidden_state, expected)


def test_nothing_of_a_forward_is_kept() -> None:
    model, inputs = tuned(), batch("bert")
    context = layers(model)[0].context
    assert all(layer.context is context for layer in layers(model))
    model(**inputs)
    assert context.frame is None
    handle = layers(model)[1].base_layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    assert context.frame is None
    handle.remove()
    with pytest.raises(BackboneError, match="outside the forward"):
        layers(model)[0](torch.zeros(1, 2, 16))


def test_layers_that_are_not_what_pasta_expects() -> None:
    model = tuned()
    first = layers(model)[0]
    for wrong, text in (
        (lambda args: (args[0][0],), r"shape \(2, 16\)"),
        (lambda args: (args[0][:, :1],), r"1 x 1 tokens for input_ids of \(1, 2\)"),
        (lambda args: (), "without hidden states"),
    ):
        handle = first.register_forward_pre_hook(lambda _, args, w=wrong: w(args))
        with pytest.raises(BackboneError, match=text):
            model(input_ids=torch.tensor([[CLS, SEP]]))
        handle.remove()


def test_slots_are_found_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from pastina.methods import placement

    calls = []
    real = placement.rank_special_tokens
    monkeypatch.setattr(
        placement, "rank_special_tokens", lambda *args: (calls.append(1), real(*args))[1]
    )
    model = tuned()
    model(**batch("bert"))
    model(**batch("bert"))
    assert len(calls) == 2


def test_positional_arguments_of_the_backbone() -> None:
    model, inputs = tuned(), batch("bert", "left")
    by_name = model(**inputs).last_hidden_state
    by_place = model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    assert torch.equal(by_name, by_place)


def test_a_model_without_special_tokens_says_what_to_pass() -> None:
    with pytest.raises(BackboneError, match=r"special_token_ids=\[tokenizer"):
        get_peft_model(build("bert"), PastaConfig())


def test_merging_is_refused_with_the_reason() -> None:
    model = tuned()
    for act in (model.merge_and_unload, model.base_model.merge_adapter, layers(model)[0].merge):
        with pytest.raises(PastinaError, match="depends on the position"):
            act()
    with pytest.raises(PastinaError, match="depends on the position"):
        layers(model)[0].unmerge()


def test_heads_that_do_not_exist() -> None:
    with pytest.raises(RecipeError, match=r"\['head'\] fits no module.*bert, dropout, classifier"):
        tuned(task(), modules_to_save=["head"])
    with pytest.raises(RecipeError, match="none is named"):
        get_peft_model(task(), LinearConfig())


def test_adapter_files_that_do_not_fit(tmp_path: Path) -> None:
    tuned(layers=[0, 2]).save_pretrained(str(tmp_path))
    other = BertModel(bert(hidden_size=32))
    with pytest.raises(AdapterError, match=r"\(3, 16\).*needs \(3, 32\)"):
        PeftModel.from_pretrained(other, tmp_path)
    config = PastaConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, PastaConfig)
    config.layers = None
    with pytest.raises(AdapterError, match=r"lacks 1 of 3 tables.*layer\.1\.pasta_vectors"):
        PeftModel.from_pretrained(build("bert"), tmp_path, config=config)
    config.layers = (0,)
    with pytest.raises(BackboneError, match=r"layer\.2\.pasta_vectors.*does not have"):
        PeftModel.from_pretrained(build("bert"), tmp_path, config=config)


def test_registration_refuses_a_name_that_is_taken() -> None:
    register("PASTA", PastaConfig, PastaModel)  # our own: as if the module were loaded again
    with pytest.raises(PastinaError, match=r"already has a method 'LORA'.*peft"):
        register("LORA", PastaConfig, PastaModel)
