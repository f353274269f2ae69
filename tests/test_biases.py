"""PASTA with the biases of some layers: what learns, what that does, and that tasks stay apart."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pastina
from pastina.backbones import load_backbone
from pastina.bank import Bank
from pastina.engine import PackedEngine, make_engine
from pastina.errors import AdapterError, BackboneError, RecipeError
from pastina.files import CONFIG, WEIGHTS
from pastina.methods.biases import bias_parts
from pastina.methods.layers import find_layers
from pastina.recipe import BackboneSpec, PastaOptions, Recipe
from pastina.tasks import Tasks
from pastina.training.fleet import train_fleet
from tests.adapter_folder import family_folder, make_adapter, reseal
from tests.models import HIDDEN, LAYERS, batch, build
from tests.test_engine import (
    POOLINGS,
    check_equal,
    for_pooling,
    make_backbone,
    make_batch,
    make_model,
)
from tests.test_engine import learn as learn_once
from tests.test_fleet import FP32, assert_as_alone
from tests.test_rates import optimizer_of, rates
from tests.test_variants import fill, states, tuned

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

Toy = Callable[..., Recipe]
CPU = torch.device("cpu")


def layers_of(model: Any) -> list[Any]:
    return list(model.encoder.layer)


def with_biases(model: Any, tuned_model: Any) -> Any:
    """A plain BERT whose own biases are changed by what an adapter has learned."""
    for index, layer in enumerate(layers_of(model)):
        found = [
            parameter.detach()
            for name, parameter in tuned_model.named_parameters()
            if f"layer.{index}.pasta_biases" in name
        ]
        for values in found:
            own = [layer.attention.self.query, layer.attention.self.value]
            own += [layer.attention.output.dense, layer.attention.output.LayerNorm]
            own += [layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm]
            sizes = [len(module.bias) for module in own]
            with torch.no_grad():
                for module, part in zip(own, values.split(sizes), strict=True):
                    module.bias += part
    return model


def test_they_are_the_biases_of_the_backbone() -> None:
    """Without vectors the adapter does what a backbone with these biases does."""
    model, inputs = tuned(bias_layers=[0, 2]), batch("bert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pasta_vectors" in name:
                parameter.zero_()
    changed = with_biases(build("bert"), model)
    found, wanted = states(model, inputs), states(changed, inputs)
    assert (found - states(build("bert"), inputs)).abs().max() > 0.1
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-5)


def test_biases_of_keys_do_nothing() -> None:
    """So they are left out, and nobody misses them."""
    model, plain, inputs = make_backbone("bert"), make_backbone("bert"), batch("bert")
    for layer in layers_of(model):
        with torch.no_grad():
            layer.attention.self.key.bias += torch.randn(HIDDEN)
    real = inputs["attention_mask"].bool()
    found, wanted = states(model, inputs)[real], states(plain, inputs)[real]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    with torch.no_grad():
        layers_of(model)[0].attention.self.query.bias += 1.0
    assert (states(model, inputs)[real] - wanted).abs().max() > 0.01


def test_how_many_learn() -> None:
    """Queries, values, out, down and two norms: 6 H; and the inside of the feed-forward net."""
    inner = build("bert").config.intermediate_size
    count = 6 * HIDDEN + inner
    model = tuned(bias_layers=[0, 2])
    own = {n: p for n, p in model.named_parameters() if "pasta_biases" in n}
    assert [tuple(p.shape) for p in own.values()] == [(count,)] * 2
    assert all(p.requires_grad for p in own.values())
    for name, left_out in (("distilbert", {"k_lin"}), ("deberta-v2", {"key_proj", "query_proj"})):
        plain = build(name)
        layer = plain.get_submodule(find_layers(plain).names[0])
        learns = {id(part.module) for part in bias_parts(layer)}
        others = [
            path.rpartition(".")[2]
            for path, module in layer.named_modules()
            if getattr(module, "bias", None) is not None and id(module) not in learns
        ]
        assert set(others) == left_out


def test_calls_of_one_layer_have_biases_of_their_own() -> None:
    model = tuned("albert", bias_layers=[0, 2])
    ((_, own),) = [(n, p) for n, p in model.named_parameters() if "pasta_biases" in n]
    assert own.shape[0] == 2
    inputs = batch("albert")
    before = states(model, inputs)
    for call in range(2):
        with torch.no_grad():
            kept, own[call] = own[call].clone(), 0.0
        assert not torch.equal(states(model, inputs), before)
        with torch.no_grad():
            own[call] = kept
    assert torch.equal(states(model, inputs), before)


# ---------------------------------------------------------------------------------------------------
# The engine


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("way", ["kernels", "PyTorch"])
@pytest.mark.parametrize("lengths", [(7,), (8, 8, 8), (12, 12, 11, 5, 5)], ids=str)
def test_trains_as_the_reference(
    way: str, pooling: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "PyTorch":
        monkeypatch.setattr("pastina.engine.families.can_fuse", lambda *_: False)
    for name in ("bert", "distilbert"):
        model = make_model(name, pooling, PastaOptions(init_std=0.5, bias_layers=(1, 2)))
        fill(model)
        model.get_base_model().dropout.p = 0.0
        rows = for_pooling(make_batch(name, lengths), pooling)
        check_equal(model, rows, num_grads=LAYERS + 2 + 2)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("way", ["kernels", "PyTorch"])
def test_other_precisions_are_near(
    precision: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "PyTorch":
        monkeypatch.setattr("pastina.engine.families.can_fuse", lambda *_: False)
    model = make_model(options=PastaOptions(init_std=0.5, dropout=0.0, bias_layers=(0, 1, 2)))
    fill(model)
    model.get_base_model().dropout.p = 0.0
    rows = for_pooling(make_batch("bert"), "cls")
    logits, grads = learn_once(PackedEngine(model, precision), rows)
    wanted, wanted_grads = learn_once(PackedEngine(model), rows)
    assert 0 < (logits - wanted).norm() < 0.1 * wanted.norm()
    for name, grad in grads.items():
        assert (grad - wanted_grads[name]).norm() < 0.35 * wanted_grads[name].norm(), name


def test_what_does_not_learn_gets_no_gradient() -> None:
    model = make_model(options=PastaOptions(init_std=0.5, bias_layers=(0, 2)))
    fill(model)
    for name, parameter in model.named_parameters():
        if "layer.0.pasta" in name or "layer.2.pasta_vectors" in name:
            parameter.requires_grad = False
    check_equal(model, for_pooling(make_batch("bert"), "cls"), num_grads=2 + 2)


def test_a_bert_without_some_bias_goes_to_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    backbone = make_backbone("bert")
    layers_of(backbone)[1].output.dense.bias = None
    model = make_model(options=PastaOptions(bias_layers=(1,)))
    own: Any = model.get_base_model().backbone.encoder.layer[1]
    own.base_layer.output.dense.bias = None
    with caplog.at_level("INFO", logger="pastina"):
        assert make_engine(model).name.startswith("reference")
    assert "other parts than BERT" in caplog.text


def test_a_fleet_of_some_with_and_some_without(toy: Toy, tmp_path: Path) -> None:
    own = {"name": "pasta", "bias_layers": [1]}
    recipes = [
        toy(fit=FP32),
        toy(method=own, fit=FP32 | {"bias_lr": 5e-3}),
        toy("tag", method=own | {"bias_layers": [0, 1], "rank": 1}, fit=FP32 | {"seed": 3}),
        toy("pair", head={"pooling": "mean"}, method=own, fit=FP32),
    ]
    runs = train_fleet(recipes, [tmp_path / f"{i}" for i in range(len(recipes))])
    for i, (recipe, run) in enumerate(zip(recipes, runs, strict=True)):
        assert_as_alone(recipe, run, tmp_path / f"alone-{i}")
    biases = [t for n, t in load_file(runs[1].adapter / WEIGHTS).items() if "biases" in n]  # type: ignore[union-attr]
    assert len(biases) == 1
    assert biases[0].abs().max() > 0


def test_steps_take_no_more_and_more_memory() -> None:
    """The pool of a layer gets back what it lent, and nothing else."""
    model = make_model(options=PastaOptions(bias_layers=(0, 1, 2)))
    engine, rows = PackedEngine(model), for_pooling(make_batch("bert"), "cls")
    held = []
    for _ in range(4):
        learn_once(engine, rows)
        pools = [getattr(layer, "_pool", None) for layer in engine.encoder.layers(CPU)]
        held.append(sum(len(memory) for pool in pools if pool for memory in pool._free))
    assert held[1:] == [held[1]] * 3


def test_gradient_checkpointing_is_refused() -> None:
    model = tuned(bias_layers=[1])
    model.base_model.model.activation_checkpointing_enable()
    model.train()
    with pytest.raises(BackboneError, match="bias_layers does not go with gradient checkpointing"):
        model(**batch("bert"))


# ---------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bias_layers": []}, "bias_layers must be a list of different whole numbers"),
        ({"bias_layers": [1, 1]}, "bias_layers must be a list of different"),
        ({"bias_layers": [-1]}, "bias_layers must not hold a number below 0"),
        ({"bias_layers": [3]}, r"bias_layers=\[3\] names layer 3, but the model has 3 layers"),
        ({"bias_layers": [2], "layers": [0, 1]}, "names layer 2, which has no vectors"),
        ({"bias_layers": 2}, "bias_layers must be a list"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        tuned(**settings)


def test_a_rate_of_their_own() -> None:
    own = {"name": "pasta", "bias_layers": [1, 2]}
    found = rates(own, lr=0.1, head_lr=0.5, bias_lr=0.02)
    assert sorted(lr for n, lr in found.items() if "pasta_biases" in n) == [0.02, 0.02]
    assert {lr for n, lr in found.items() if "pasta_vectors" in n} == {0.1}
    assert {lr for n, lr in rates(own, lr=0.1).items() if "biases" in n} == {3e-3}, "BitFit's"
    _, optimizer = optimizer_of(own, lr=0.1, weight_decay=0.3)
    decays = {len(p.shape): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {1: 0.0, 2: 0.3}
    with pytest.raises(RecipeError, match=r"method\.bias_layers, which is not set"):
        optimizer_of({"name": "pasta"}, bias_lr=0.1)


# ---------------------------------------------------------------------------------------------------
# In a bank


@pytest.fixture(scope="module")
def made(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = PastaOptions(bias_layers=(1,))
    return make_adapter(bert, tmp_path_factory.mktemp("made") / "own", options=options)


@pytest.fixture
def bank(bert: Path) -> Bank:
    return Bank(load_backbone(BackboneSpec(name=str(bert)), keep_pooler=True))


def test_they_stand_behind_the_vectors(bank: Bank, made: Path) -> None:
    task, tensors = bank.add(made), load_file(made / WEIGHTS)
    ((_, biases),) = [(key, t) for key, t in tensors.items() if "pasta_biases" in key]
    assert task.plan is not None
    assert task.vectors is not None
    assert (task.plan.bias_layers, task.plan.num_biases) == ((1,), len(biases))
    start, numbers = task.vectors.start, bank.vectors.numbers
    assert torch.equal(task.plan.biases(numbers, start, 1), biases)
    hidden = bank.layers.hidden_size
    assert task.vectors.num_rows == 2 * task.plan.num_vectors + -(-len(biases) // hidden)


def test_rows_that_are_not_full(tmp_path: Path) -> None:
    """Of a net whose inside is no multiple of the hidden size: what fills a row is not read."""
    from transformers import AutoModel, AutoTokenizer, BertConfig

    from tests import backbone_folder

    backbone = family_folder("bert", tmp_path / "tiny")
    sizes: dict[str, Any] = backbone_folder._SIZES | {"intermediate_size": 41}
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    torch.manual_seed(3)
    model: Any = AutoModel.from_config(BertConfig(vocab_size=len(tokenizer), **sizes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(backbone)
    folders = [
        make_adapter(backbone, tmp_path / str(i), options=PastaOptions(bias_layers=(0, 1)), seed=i)
        for i in range(3)
    ]
    tasks = Tasks(str(backbone), precision="fp32")
    for folder in folders:
        tasks.add(folder)
    found = tasks.predict([(str(i % 3), "we need plum") for i in range(6)])
    for i, answer in enumerate(found):
        (alone,) = pastina.load(folders[i % 3], precision="fp32").predict(["we need plum"])
        assert answer.scores == pytest.approx(alone.scores, abs=1e-5)


def test_a_modernbert_with_biases(tmp_path: Path) -> None:
    """The packed engine knows the backbone, but not with such tasks: those go another way."""
    from transformers import AutoConfig, AutoModel

    backbone = family_folder("modernbert", tmp_path / "with")
    config: Any = AutoConfig.from_pretrained(backbone)
    config.attention_bias = config.mlp_bias = config.norm_bias = True
    torch.manual_seed(3)
    model: Any = AutoModel.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(backbone)
    wanted = {"own": PastaOptions(bias_layers=(0, 1)), "plain": PastaOptions()}
    folders = {n: make_adapter(backbone, tmp_path / n, options=o) for n, o in wanted.items()}
    tasks = Tasks(str(backbone), precision="fp32")
    for folder in folders.values():
        tasks.add(folder)
    found = tasks.predict([(name, "we need plum") for name in ("own", "plain", "own")])
    for name, answer in zip(("own", "plain", "own"), found, strict=True):
        (alone,) = pastina.load(folders[name], precision="fp32").predict(["we need plum"])
        assert answer.scores == pytest.approx(alone.scores, abs=1e-5)
    whole = Tasks(str(backbone), precision="int8")
    whole.add(folders["own"])
    (answer,) = whole.predict([("own", "we need plum")])
    assert answer.scores == pytest.approx(found[0].scores, abs=1e-5)


def spoiled(made: Path, folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    import shutil

    shutil.copytree(made, folder)
    own = load_file(folder / WEIGHTS)
    change(own)
    save_file(own, folder / WEIGHTS)
    return reseal(folder)


KEY = "base_model.model.bert.encoder.layer.1.pasta_biases"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own: own.pop(KEY), "lacks the tensor"),
        (lambda own: own.update({KEY: own[KEY][:-1]}), "of the shape"),
        (lambda own: own.update({KEY: own[KEY] * float("nan")}), "pasta_biases holds numbers that"),
        (
            lambda own: own.update({KEY.replace("1", "0"): own[KEY].clone()}),
            "holds an unknown tensor",
        ),
    ],
)
def test_broken_files(bank: Bank, made: Path, tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        bank.add(spoiled(made, tmp_path / "spoiled", change))
    assert (len(bank), bank.vectors.gaps.end) == (0, 0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"bias_layers": [2]}, r"bias_layers: \[2\], but the backbone has 2 layers"),
        ({"bias_layers": []}, "bias_layers: .* not different"),
        ({"bias_layers": [1, 1]}, "bias_layers: .* not different"),
        ({"bias_layers": [-1]}, "bias_layers"),
        ({"bias_layers": None}, "unknown tensor"),
        ({"bias_layers": [1], "layers": [0]}, "names layer 1, which has no vectors"),
    ],
)
def test_broken_configs(bank: Bank, made: Path, tmp_path: Path, config: Any, words: str) -> None:
    folder = spoiled(made, tmp_path / "spoiled", lambda own: None)
    values = json.loads((folder / CONFIG).read_text()) | config
    (folder / CONFIG).write_text(json.dumps(values))
    with pytest.raises(AdapterError, match=words):
        bank.add(reseal(folder))


def test_a_backbone_without_biases_is_refused(tmp_path: Path, made: Path) -> None:
    with pytest.raises(BackboneError, match="needs layers with biases"):
        tuned("modernbert", bias_layers=[0])
