"""Variants of PASTA: other slots and positions, every token, scales, keys and values, extra tokens.

Shape letters: B rows, T tokens, H hidden.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import pastina
from pastina.data.encode import encode
from pastina.data.rows import Row
from pastina.engine import PackedEngine, ReferenceEngine, make_engine
from pastina.errors import AdapterError, BackboneError, DataError, RecipeError
from pastina.methods import PastaConfig
from pastina.methods.ordinary import rank_ordinary
from pastina.methods.pasta import PastaLayer
from pastina.recipe import PastaOptions, Recipe
from pastina.slots import rank_special_tokens
from pastina.tasks import Tasks
from tests.adapter_folder import make_adapter
from tests.models import CLS, HIDDEN, LAYERS, SEP, SPECIAL, batch, build
from tests.test_engine import check_equal, for_pooling, learn, make_batch, make_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

Toy = Callable[..., Recipe]
IDS = (CLS, SEP)
OUTSIDE: dict[str, dict[str, Any]] = {
    "first": {"slots": "first"},
    "rest": {"slots": "rest"},
    "listed": {"slots": (2, 0)},
    "rest shared": {"slots": "rest", "share": "all"},
    "by layer": {"layer_slots": (0, 2, 1)},
    "front": {"positions": "first"},
    "random": {"positions": "random"},
    "one at random": {"positions": "random", "slots": "first"},
    "everywhere": {"everywhere": True},
    "everywhere above": {"everywhere": True, "layers": (1, 2), "share": "all"},
    "scale": {"scale": True},
    "scale above": {"scale": True, "layers": (1,), "share": "by_token"},
    "scale everywhere": {"scale": True, "everywhere": True},
    "product": {"rank": 2},
    "product above": {"rank": 1, "layers": (1, 2), "everywhere": True},
    "product and scale": {"rank": 3, "scale": True, "everywhere": True},
    "biases": {"bias_layers": (0, 1, 2)},
    "biases above": {"bias_layers": (2,), "layers": (1, 2)},
    "biases and all": {"bias_layers": (1,), "rank": 1, "scale": True, "everywhere": True},
}
INSIDE: dict[str, dict[str, Any]] = {
    "keys and values": {"at": "keys-values"},
    "keys and values, all": {"at": "keys-values", "everywhere": True, "scale": True},
    "keys, values, biases": {"at": "keys-values", "bias_layers": (1, 2)},
}
VARIANTS = OUTSIDE | INSIDE


def tuned(name: str = "bert", **settings: Any) -> Any:
    """With random numbers everywhere, where nothing else is asked for."""
    settings = {"special_token_ids": SPECIAL[name], "num_slots": 3, "init_std": 0.5, **settings}
    torch.manual_seed(4)
    model = get_peft_model(build(name), PastaConfig(**settings)).eval()
    if settings["init_std"]:
        fill(model)
    return model


def fill(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pasta_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.5)


@torch.no_grad()
def states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).last_hidden_state


# ---------------------------------------------------------------------------------------------------
# Laws


def refused(variant: str, name: str) -> str | None:
    """Why a variant is not there for an architecture."""
    if name == "deberta-v2" and VARIANTS[variant].get("at") == "keys-values":
        return "seen 0 such"
    if name in ("t5", "modernbert") and "bias_layers" in VARIANTS[variant]:
        return "needs layers with biases"
    return None


@pytest.mark.parametrize("name", ["bert", "distilbert", "deberta-v2", "albert", "t5"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_is_the_backbone(variant: str, name: str) -> None:
    if reason := refused(variant, name):
        with pytest.raises(BackboneError, match=reason):
            tuned(name, init_std=0.0, **VARIANTS[variant])
        return
    model, inputs = tuned(name, init_std=0.0, **VARIANTS[variant]), batch(name)
    assert torch.equal(states(model, inputs), states(build(name), inputs))
    fill(model)
    assert not torch.equal(states(model, inputs), states(build(name), inputs))


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded(variant: str, tmp_path: Path) -> None:
    model, inputs = tuned(**VARIANTS[variant]), batch("bert")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    assert torch.equal(states(model, inputs), states(loaded, inputs))
    assert loaded.peft_config["default"] == PastaConfig.from_pretrained(str(tmp_path))
    with model.disable_adapter():
        assert torch.equal(states(model, inputs), states(build("bert"), inputs))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_do_not_know_each_other(variant: str) -> None:
    model, inputs = tuned(**VARIANTS[variant]).double(), batch("bert")
    together = states(model, inputs)
    for side in ("right", "left"):
        padded = batch("bert", side)
        for row, mask in enumerate(padded["attention_mask"].bool()):
            positions = mask.cumsum(0).sub(1).clamp(min=0)
            given = {k: v[row : row + 1] for k, v in padded.items()}
            alone = states(model, {**given, "position_ids": positions[None]})[0, mask]
            wanted = together[row, inputs["attention_mask"][row].bool()]
            torch.testing.assert_close(alone, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_with_their_own_adapters(variant: str) -> None:
    model, inputs = tuned(**VARIANTS[variant]), batch("bert")
    model.add_adapter("other", PastaConfig(special_token_ids=IDS, num_slots=3, scale=True))
    third = PastaConfig(special_token_ids=IDS, num_slots=3, init_std=0.4, rank=1)
    model.add_adapter("third", third)
    fill(model)
    names = ["third", "default", "other"]
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).last_hidden_state
    for row, name in enumerate(names):
        model.set_adapter(name)
        wanted = states(model, {key: value[row : row + 1] for key, value in inputs.items()})
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(mixed[row, real], wanted[0, real], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "pooling"), [("bert", "cls"), ("bert", "tokens"), ("modernbert", "mean")]
)
@pytest.mark.parametrize("variant", OUTSIDE)
def test_the_packed_engine_trains_as_the_reference(variant: str, name: str, pooling: str) -> None:
    options = PastaOptions(init_std=0.5, dropout=0.2, **OUTSIDE[variant])
    if reason := refused(variant, name):
        with pytest.raises(BackboneError, match=reason):
            make_model(name, pooling, options)
        return
    model = make_model(name, pooling, options)
    fill(model)
    model.get_base_model().dropout.p = 0.0
    numbers = [n for n, p in model.named_parameters() if p.requires_grad]
    check_equal(model, for_pooling(make_batch(name), pooling), num_grads=len(numbers))


def test_a_scale_that_does_not_learn_passes_gradients_on() -> None:
    model = make_model(options=PastaOptions(init_std=0.5, scale=True))
    fill(model)
    for name, parameter in model.named_parameters():
        if "layer.1.pasta_" in name or "layer.2.pasta_vectors" in name:
            parameter.requires_grad = False
    check_equal(model, for_pooling(make_batch("bert"), "cls"), num_grads=5)


def test_keys_and_values_go_to_the_reference_engine(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(options=PastaOptions(at="keys-values"))
    with caplog.at_level("INFO", logger="pastina"):
        assert isinstance(make_engine(model), ReferenceEngine)
    assert "keys and values alone" in caplog.text
    _, grads = learn(make_engine(model, precision="fp32"), for_pooling(make_batch("bert"), "cls"))
    assert len(grads) == LAYERS + 2
    assert all(grad.abs().sum() > 0 for grad in grads.values())


def test_scales_answer_in_other_precisions() -> None:
    model = make_model(options=PastaOptions(init_std=0.5, scale=True)).eval()
    fill(model)
    rows = for_pooling(make_batch("bert"), "cls")
    with torch.no_grad():
        found, wanted = (PackedEngine(model, p).logits(rows) for p in ("bf16", "fp32"))
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()


# ---------------------------------------------------------------------------------------------------
# What is changed where


def added(model: Any, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of each layer what it was given, and what was added to it."""
    seen: list[Tensor] = []
    handles = []
    for layer in (m for m in model.modules() if isinstance(m, PastaLayer)):
        for module in (layer, layer.base_layer):
            handles.append(module.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    states(model, inputs)
    for handle in handles:
        handle.remove()
    return [(given, changed - given) for given, changed in zip(seen[::2], seen[1::2], strict=True)]


def table(model: Any, layer: int, kind: str = "vectors") -> Tensor:
    (found,) = (p for n, p in model.named_parameters() if f"layer.{layer}.pasta_{kind}" in n)
    return found.detach()


PAIR = {"input_ids": torch.tensor([[CLS, 7, 9, SEP, 8, SEP], [CLS, 7, SEP, 0, 0, 0]])}
PAIR["attention_mask"] = (PAIR["input_ids"] != 0).long()


def check_added(model: Any, wanted: dict[int, dict[tuple[int, int], int]]) -> None:
    """wanted: by layer, for (row, token) the number of its vector; nothing is added elsewhere."""
    for layer, (_, delta_BTH) in enumerate(added(model, PAIR)):
        expected = torch.zeros_like(delta_BTH)
        for place, number in wanted.get(layer, {}).items():
            expected[place] += table(model, layer)[number]
        torch.testing.assert_close(delta_BTH, expected, rtol=0, atol=1e-5)


def every_layer(places: dict[tuple[int, int], int]) -> dict[int, dict[tuple[int, int], int]]:
    return dict.fromkeys(range(LAYERS), places)


def test_chosen_slots() -> None:
    check_added(tuned(slots="first"), every_layer({(0, 0): 0, (1, 0): 0}))
    check_added(tuned(slots="rest"), every_layer({(0, 3): 0, (0, 5): 1, (1, 2): 0}))
    check_added(tuned(slots=[2, 0]), every_layer({(0, 0): 0, (0, 5): 1, (1, 0): 0}))
    assert table(tuned(slots="rest", share="all"), 0).shape == (1, HIDDEN)


def test_one_slot_in_each_layer() -> None:
    model = tuned(layer_slots=[0, 2, 1])
    check_added(model, {0: {(0, 0): 0, (1, 0): 0}, 1: {(0, 5): 0}, 2: {(0, 3): 0, (1, 2): 0}})
    assert sum(p.numel() for n, p in model.named_parameters() if "pasta_" in n) == LAYERS * HIDDEN


def test_front_positions() -> None:
    """The second row has two special tokens, but only one ordinary token to take a vector."""
    check_added(tuned(positions="first"), every_layer({(0, 1): 0, (0, 2): 1, (0, 4): 2, (1, 1): 0}))


def test_every_token() -> None:
    model = tuned(everywhere=True)
    assert table(model, 0).shape == (4, HIDDEN)
    for layer, (_, delta_BTH) in enumerate(added(model, PAIR)):
        own = table(model, layer)
        torch.testing.assert_close(delta_BTH[0, 1], own[3], rtol=0, atol=1e-5)
        torch.testing.assert_close(delta_BTH[0, 3], own[1] + own[3], rtol=0, atol=1e-5)
        assert not delta_BTH[1, 3:].any(), "padding"


def test_a_scale() -> None:
    model = tuned(scale=True)
    for layer, (given_BTH, delta_BTH) in enumerate(added(model, PAIR)):
        wanted = given_BTH[0, 3] * table(model, layer, "scales")[1] + table(model, layer)[1]
        torch.testing.assert_close(delta_BTH[0, 3], wanted, rtol=1e-5, atol=1e-5)
        assert not delta_BTH[0, 1].any()
    fresh = get_peft_model(build("bert"), PastaConfig(special_token_ids=IDS, scale=True))
    assert not table(fresh, 0, "scales").any()


def test_dropout_of_a_scale_is_that_of_its_vector() -> None:
    model = tuned(scale=True, dropout=0.5)
    layer: Any = next(m for m in model.modules() if isinstance(m, PastaLayer))
    layer.train()
    place = layer.context.frame
    assert place is None
    seen: list[Any] = []
    change = layer.change
    layer.__dict__["change"] = lambda *args: seen.append(change(*args)) or seen[-1]
    model(**PAIR)
    (_, delta_NH, scale_NH) = seen[0]
    assert scale_NH is not None
    assert torch.equal(delta_NH == 0, scale_NH == 0)
    assert 0.3 < float((delta_NH[:3] == 0).float().mean()) < 0.7


def test_keys_and_values_leave_queries_and_the_residual() -> None:
    """Queries and the layer's own input are those of the backbone in the first layer."""
    model, plain = tuned(at="keys-values", layers=[0]), build("bert")
    seen: dict[str, dict[str, Tensor]] = {"tuned": {}, "plain": {}}
    for which, one in (("tuned", model), ("plain", plain)):
        for name, module in one.named_modules():
            part = name.rpartition(".")[2]
            if "layer.0." in name and part in ("query", "key", "value"):
                module.register_forward_hook(
                    lambda _, args, out, key=part, into=seen[which]: into.update({key: out})
                )
        states(one, PAIR)
    assert torch.equal(seen["tuned"]["query"], seen["plain"]["query"])
    layer: Any = plain.get_submodule("encoder.layer.0.attention.self")
    vectors = table(model, 0)
    for part in ("key", "value"):
        change = seen["tuned"][part] - seen["plain"][part]
        wanted = vectors[0] @ getattr(layer, part).weight.T
        torch.testing.assert_close(change[0, 0], wanted, rtol=1e-4, atol=1e-5)
        assert not change[0, 1].any()
    assert all(not delta.any() for _, delta in added(model, PAIR)[:1])


# ---------------------------------------------------------------------------------------------------
# Ordinary positions


def ranks(ids: Tensor, which: str, mask: Tensor | None = None) -> Tensor:
    special, _ = rank_special_tokens(ids, IDS, mask)
    return rank_ordinary(ids, special, mask, which)


def test_random_positions_are_ordinary_and_as_many_as_special_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (200, 20), generator=generator)
    ids[:, 0], ids[:, 9], ids[:, 17], ids[:, 18:] = CLS, SEP, SEP, 0
    mask = (ids != 0).long()
    found = ranks(ids, "random", mask)
    assert torch.equal(found, ranks(ids.clone(), "random", mask)), "the same at any time"
    assert found.amax(1).tolist() == [3] * 200
    assert not found[:, [0, 9, 17, 18, 19]].any()
    counts = (found > 0).sum(0)[[*range(1, 9), *range(10, 17)]]
    assert counts.min() > 20, "600 draws among 15 places: 40 each"
    assert counts.max() < 62
    lefts = [row[row > 0].tolist() for row in found]
    assert lefts == [[1, 2, 3]] * 200, "slots go from left to right"


def test_random_positions_depend_on_each_token_of_the_row() -> None:
    row = torch.arange(3, 63)[None]
    row[0, 0], row[0, -1] = CLS, SEP
    others = row.repeat(58, 1)
    others[torch.arange(58), torch.arange(1, 59)] += 100
    found = ranks(others, "random")
    places = {tuple(one.nonzero().flatten().tolist()) for one in found}
    assert len(places) > 50
    swapped = row.repeat(58, 1)
    swapped[torch.arange(57), torch.arange(1, 58)] = row[0, 2:59]
    swapped[torch.arange(57), torch.arange(2, 59)] = row[0, 1:58]
    places = {tuple(one.nonzero().flatten().tolist()) for one in ranks(swapped, "random")}
    assert len(places) > 50


def test_rows_with_few_ordinary_tokens() -> None:
    ids = torch.tensor([[CLS, SEP, 0, 0], [CLS, 7, SEP, 0], [CLS, 7, SEP, SEP]])
    mask = (ids != 0).long()
    for which in ("first", "random"):
        assert ranks(ids, which, mask).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]


# ---------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"slots": "last"}, "slots must be one of all, first, rest"),
        ({"slots": []}, "slots must be a list of different"),
        ({"slots": [0, 0]}, "slots must be a list of different"),
        ({"slots": [3]}, r"slots=\[3\] does not go with 3 slots"),
        ({"slots": "rest", "num_slots": 1}, "does not go with 1 slots"),
        ({"layer_slots": [0, 1]}, "names 2 slots, but the model has 3 layers"),
        ({"layer_slots": [0, 1, 3]}, "does not go with 3 slots"),
        ({"layer_slots": [0, -1, 1]}, "layer_slots must name a slot"),
        ({"layer_slots": [0, 0, 0], "layers": [1]}, "leave out layers"),
        ({"layer_slots": [0, 0, 0], "share": "all"}, "leave out share"),
        ({"layer_slots": [0, 0, 0], "slots": "first"}, "leave one out"),
        ({"slots": "first", "share": "by_token"}, "choose tokens by special_token_ids"),
        ({"positions": "last"}, "positions must be one of special, first, random"),
        ({"positions": "first", "share": "by_token"}, "by_token"),
        ({"positions": "first", "fixed_positions": [0]}, "names the positions already"),
        ({"everywhere": 1}, "everywhere must be true or false; seen 1"),
        ({"scale": "yes"}, "scale must be true or false"),
        ({"rank": -1}, "rank must be a whole number from 0 to 256"),
        ({"rank": True}, "rank must be a whole number"),
        ({"rank": 2, "at": "keys-values"}, "leave out at='keys-values'"),
        ({"at": "values"}, "at must be one of residual, keys-values"),
        ({"extra_tokens": 65}, "extra_tokens must be a whole number from 0 to 64"),
    ],
    ids=str,
)
def test_wrong_settings(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        tuned(**settings)


def test_keys_and_values_need_projections_of_their_own() -> None:
    with pytest.raises(BackboneError, match="ModernBertEncoderLayer"):
        tuned("modernbert", at="keys-values")


def test_keys_and_values_without_gradient_checkpointing() -> None:
    model = tuned(at="keys-values")
    model.base_model.model.activation_checkpointing_enable()
    model.train()
    with pytest.raises(BackboneError, match="gradient checkpointing"):
        model(**PAIR)


def test_the_plain_method_is_stored_as_it_was(tmp_path: Path) -> None:
    tuned().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    variants = {"slots", "layer_slots", "positions", "everywhere", "scale", "rank", "at"}
    variants |= {"extra_tokens", "bias_layers"}
    assert not variants & stored.keys()
    tuned(scale=True).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert variants & stored.keys() == {"scale"}


def test_a_file_without_scales_is_refused(tmp_path: Path) -> None:
    tuned().save_pretrained(tmp_path)
    config = PastaConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, PastaConfig)
    config.scale = True
    with pytest.raises(AdapterError, match=r"lacks 3 of 6 tables.*pasta_scales"):
        PeftModel.from_pretrained(build("bert"), tmp_path, config=config)
    tuned(scale=True).save_pretrained(tmp_path)
    config.scale = False
    with pytest.raises(BackboneError, match="pasta_scales"):
        PeftModel.from_pretrained(build("bert"), tmp_path, config=config)


# ---------------------------------------------------------------------------------------------------
# From a recipe to an answer


@pytest.mark.parametrize(
    "options",
    [
        {"slots": "rest"},
        {"layer_slots": [1, 0]},
        {"positions": "random"},
        {"everywhere": True},
        {"scale": True},
        {"rank": 2},
        {"bias_layers": [1]},
        {"at": "keys-values"},
        {"extra_tokens": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["pair", "tag"])
def test_trains_and_answers(kind: str, options: dict[str, Any], toy: Toy, tmp_path: Path) -> None:
    fit = {"epochs": 2, "precision": "fp32"}
    recipe = toy(kind, rows=24, dev_rows=10, method={"name": "pasta", **options}, fit=fit)
    run = pastina.train(recipe, tmp_path / "run")
    result = json.loads((run.folder / "result.json").read_text())
    assert ("reference" in result["engine"]) == ("at" in options)
    predictor = pastina.load(run.adapter, precision="fp32")
    metrics = pastina.evaluate(run.adapter, part="dev", precision="fp32")
    assert metrics == pytest.approx(run.metrics, abs=1e-6)
    texts: Any = ["please send pear", "the saw now"]
    if kind == "pair":
        texts = [("please send", text) for text in texts]
    alone = predictor.predict(texts)
    tasks = Tasks(recipe.backbone.name, precision="fp32")
    if {"scale", "at"} & options.keys():
        with pytest.raises(AdapterError, match="which a bank cannot hold"):
            tasks.add(run.adapter, "one")
        return
    tasks.add(run.adapter, "one")
    for one, other in zip(alone, tasks.predict([("one", text) for text in texts]), strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
        assert one.spans == other.spans or kind == "tag"


def test_extra_tokens_stand_at_the_end_and_cost_room(bert: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert)
    rows = [Row("please send me a pear now thanks", "the saw")]
    plain, more = (encode(rows, tokenizer, "classify", [], 12, extra_tokens=n)[0] for n in (0, 2))
    assert len(plain.input_ids) == len(more.input_ids) == 12
    assert more.input_ids[-3:] == [tokenizer.sep_token_id] * 3
    assert more.token_type_ids is not None
    assert more.token_type_ids[-3:] == [1, 1, 1]
    with pytest.raises(DataError, match="no room"):
        encode(rows, tokenizer, "classify", [], 12, extra_tokens=10)


def test_extra_tokens_must_be_special(toy: Toy, tmp_path: Path) -> None:
    recipe = toy(method={"name": "pasta", "extra_tokens": 2, "special_token_ids": [2]})
    with pytest.raises(RecipeError, match="not one of the special tokens"):
        pastina.train(recipe, tmp_path / "run")


def test_a_bank_refuses_slots_that_there_are_not(bert: Path, tmp_path: Path) -> None:
    from tests.adapter_folder import reseal

    folder = make_adapter(bert, tmp_path / "a", options=PastaOptions(slots="first"))
    path = folder / "adapter_config.json"
    for change, text in (
        ({"slots": [5]}, "does not go with 2 slots"),
        ({"slots": [0, 0]}, "not different"),
        ({"slots": "all", "layer_slots": [0]}, "but the backbone has 2 layers"),
        ({"layer_slots": [0, 1]}, "leave one out"),
        ({"extra_tokens": 24}, "leaves no room"),
        ({"num_slots": 2**30, "slots": "rest"}, "of the shape"),
        ({"scale": True}, "cannot hold"),
        ({"positions": "last"}, "positions"),
    ):
        stored = path.read_text()
        path.write_text(json.dumps(json.loads(stored) | change))
        reseal(folder)
        with pytest.raises(AdapterError, match=text):
            Tasks(str(bert)).add(folder)
        path.write_text(stored)
