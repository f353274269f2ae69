"""Tasks on the lower layers of a backbone: trained, stored, mixed with others, loaded elsewhere."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForTokenClassification

import pastina
from pastina.adapter import load_adapter, read_card
from pastina.backbones import load_backbone
from pastina.engine.encoder import Encoder
from pastina.engine.hooked import HookedEncoder
from pastina.engine.readout import Part
from pastina.errors import AdapterError, BackboneError, RecipeError
from pastina.files import CARD
from pastina.looking.look import look
from pastina.recipe import BackboneSpec, PastaOptions, make_recipe
from pastina.tasks import Tasks
from pastina.training.fleet import train_fleet
from tests.adapter_folder import LONG, make_adapter, reseal
from tests.backbone_folder import toy_recipe
from tests.test_tasks import assert_alike

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
FAMILIES = ("bert", "roberta", "distilbert", "electra", "modernbert", "mpnet", "deberta")
FIT = {"precision": "fp32", "lr": 3e-2, "head_lr": 3e-2, "batch": 8, "epochs": 2}


def lower(folder: Path, num_layers: int) -> Any:
    return load_backbone(BackboneSpec(name=str(folder), num_layers=num_layers))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_is_what_transformers_leaves(
    backbones: Callable[[str], Path], name: str
) -> None:
    folder = backbones(name)
    found = lower(folder, -1)
    total = load_backbone(BackboneSpec(name=str(folder))).model.config.num_hidden_layers
    assert found.num_layers == total - 1
    wanted = AutoModel.from_pretrained(folder, num_hidden_layers=total - 1).eval()
    ids = torch.tensor([[5, 8, 7, 6, 9, 4]])
    with torch.no_grad():
        states = [m(input_ids=ids).last_hidden_state for m in (found.model, wanted)]
        whole = AutoModel.from_pretrained(folder).eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(states[0], states[1], atol=1e-6, rtol=1e-6)
    assert (states[0] - whole).abs().max() > 0.01


def test_a_pooler_goes_with_the_last_layer(backbones: Callable[[str], Path]) -> None:
    folder = backbones("bert")
    whole, same = load_backbone(BackboneSpec(name=str(folder))), lower(folder, 2)
    assert whole.num_layers is same.num_layers is None
    assert whole.pooling == same.pooling == "pooler"
    assert same.model.pooler is not None
    fewer = lower(folder, 1)
    assert fewer.pooling == "cls"
    assert fewer.model.pooler is None


@pytest.mark.parametrize("num_layers", [3, -2, -7])
def test_layers_that_are_not_there(backbones: Callable[[str], Path], num_layers: int) -> None:
    with pytest.raises(
        BackboneError, match=rf"num_layers = {num_layers}.*bert has 2 layers\. Take 1"
    ):
        lower(backbones("bert"), num_layers)


def test_refusals(backbones: Callable[[str], Path]) -> None:
    with pytest.raises(BackboneError, match="layers are called several times each, or"):
        lower(backbones("albert"), 1)
    for wrong, words in ((0, "learns nothing"), (1.5, "integer"), ("two", "integer")):
        with pytest.raises(RecipeError, match=words):
            make_recipe({"data": {"train": "x.csv"}, "backbone": {"num_layers": wrong}})


@pytest.fixture(scope="module")
def tagger(
    backbones: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    """A recipe for all layers but the top one, and its run."""
    folder = tmp_path_factory.mktemp("tagger")
    method = {"name": "pasta", "everywhere": True}
    recipe = toy_recipe(backbones("bert"), folder, "tag", fit=FIT, method=method, name="low")
    spec = BackboneSpec(name=str(backbones("bert")), num_layers=-1)
    recipe = recipe.model_copy(update={"backbone": spec})
    return recipe, pastina.train(recipe, folder / "run")


def test_trained_stored_and_loaded(tagger: tuple[Any, Any]) -> None:
    recipe, run = tagger
    card = read_card(run.adapter)
    assert card.backbone.num_layers == 1
    assert "(its lowest layer)" in (run.adapter / "README.md").read_text()
    predictor = pastina.load(run.adapter, precision="fp32")
    assert pastina.evaluate(run.adapter, part="dev", precision="fp32") == pytest.approx(run.metrics)
    texts = ["please send me a pear now", LONG]
    alone = predictor.predict(texts)
    tasks = Tasks(recipe.backbone.name, precision="fp32")
    tasks.add(run.adapter)
    found = tasks.predict([("low", text) for text in texts])
    for one, other in zip(found, alone, strict=True):
        assert_alike(one, other)


def test_a_look_sees_as_many_layers(backbones: Callable[[str], Path], tmp_path: Path) -> None:
    folder = make_adapter(backbones("bert"), tmp_path / "low", num_layers=1)
    (text,) = look(folder, ["please send me a pear"]).texts
    assert text.before.vertical_LH.shape[0] == text.after.vertical_LH.shape[0] == 1


def test_a_fleet_trains_both_depths_as_if_alone(
    tagger: tuple[Any, Any], backbones: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe, run = tagger
    whole = recipe.model_copy(
        update={"backbone": BackboneSpec(name=str(backbones("bert"))), "name": "high"}
    )
    members = train_fleet([recipe, whole], [tmp_path / "low", tmp_path / "high"])
    assert members[0].metrics == pytest.approx(run.metrics, abs=1e-4)  # type: ignore[union-attr]
    alone = pastina.train(whole, tmp_path / "alone")
    assert members[1].metrics == pytest.approx(alone.metrics, abs=1e-4)  # type: ignore[union-attr]
    hidden = load_backbone(whole.backbone).model.config.hidden_size
    more = alone.trained_parameters - run.trained_parameters
    assert more == 3 * hidden  # of a layer: [CLS], [SEP], every token


def test_peft_and_transformers_load_it_on_as_many_layers(
    tagger: tuple[Any, Any], backbones: Callable[[str], Path]
) -> None:
    _, run = tagger
    loaded = load_adapter(run.adapter)
    num_labels = loaded.model.config.num_labels = loaded.model.classifier.out_features
    plain = AutoModelForTokenClassification.from_pretrained(
        backbones("bert"), num_hidden_layers=1, num_labels=num_labels
    )
    model = PeftModel.from_pretrained(plain, run.adapter).eval()
    inputs = loaded.backbone.tokenizer(["please send me a pear"], return_tensors="pt")
    with torch.no_grad():
        logits = [m(**inputs).logits for m in (model, loaded.model)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


def test_a_card_of_before_is_as_valid_as_ever(
    backbones: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its digest was made without a field that it does not have."""
    folder = make_adapter(backbones("bert"), tmp_path / "old")
    values = json.loads((folder / CARD).read_text())
    assert values["backbone"].pop("num_layers") is None
    (folder / CARD).write_text(json.dumps(values))
    assert read_card(folder).digest == values["digest"]
    values["backbone"]["num_layers"] = 1
    (folder / CARD).write_text(json.dumps(values))
    with pytest.raises(AdapterError, match="was changed after it was written"):
        read_card(folder)


def test_a_bank_refuses_layers_that_it_does_not_have(
    backbones: Callable[[str], Path], tmp_path: Path
) -> None:
    bert = backbones("bert")
    low = make_adapter(bert, tmp_path / "low", num_layers=1)
    high = make_adapter(bert, tmp_path / "high")
    tasks = Tasks(BackboneSpec(name=str(bert), num_layers=1), precision="fp32")
    tasks.add(low)
    with pytest.raises(AdapterError, match="it wants all layers of the backbone, which has 1 here"):
        tasks.add(high)
    with pytest.raises(AdapterError, match="with all layers, this backbone has its lowest layer"):
        load_adapter(high, loaded=lower(bert, 1))
    both = Tasks(str(bert), precision="fp32")
    both.add(low)
    both.add(high)
    assert both.predict([("low", LONG)]) == tasks.predict([("low", LONG)])
    backbone = json.loads((high / CARD).read_text())["backbone"]
    for num_layers, words in (
        (3, "it wants 3 layers of the backbone, which has 2"),
        (1, "not the layers"),
    ):
        reseal(high, backbone=backbone | {"num_layers": num_layers})
        with pytest.raises(AdapterError, match=words):
            both.add(high)
    reseal(low, pooling="pooler")
    with pytest.raises(AdapterError, match="the pooler belongs to the last layer"):
        both.add(low)


def test_a_copy_is_made_when_nobody_runs_the_backbone(
    backbones: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks of a batch that is running would stay in the copy for good."""
    model = load_backbone(BackboneSpec(name=str(backbones("mpnet")))).model
    encoder, inside, go_on = HookedEncoder(model), threading.Event(), threading.Event()
    copies: list[HookedEncoder] = []
    run = type(model).forward

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside.set()
        assert go_on.wait(60)
        return run(self, *args, **kwargs)

    ids = torch.tensor([[5, 8, 7, 6]])
    packed = encoder.pack(torch.ones_like(ids, dtype=torch.bool))
    part = Part(slice(0, 1), "mean")
    monkeypatch.setattr(type(model), "forward", slow)
    runs = threading.Thread(target=encoder.states, args=({"input_ids": ids}, packed, {}, [part]))
    makes = threading.Thread(target=lambda: copies.append(encoder.lower(1)))
    runs.start()
    assert inside.wait(60)
    makes.start()
    makes.join(0.2)
    assert not copies
    go_on.set()
    for thread in (runs, makes):
        thread.join(60)
    assert not any(m._forward_pre_hooks for m in copies[0].backbone.modules())
    mine, theirs = (m.get_input_embeddings().weight for m in (model, copies[0].backbone))
    assert mine.data_ptr() == theirs.data_ptr()


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_lower_layers_are_frozen_once(backbones: Callable[[str], Path], name: str) -> None:
    model = load_backbone(BackboneSpec(name=str(backbones(name)))).model
    whole = Encoder(model)
    num_layers = model.config.num_hidden_layers
    device = torch.device("cpu")
    few, all_of_them = whole.lower(num_layers - 1).layers(device), whole.layers(device)
    assert len(few) == num_layers - 1
    assert all(own is one for own, one in zip(few[:-1], all_of_them, strict=False))
    last: Any = few[-1]
    there: Any = all_of_them[num_layers - 2]
    if name == "bert":
        assert last is there
    else:
        assert last.attention is there.attention
        assert last.last != there.last


def test_albert_cannot_be_cut_in_a_bank(backbones: Callable[[str], Path], tmp_path: Path) -> None:
    folder = make_adapter(backbones("albert"), tmp_path / "task", options=PastaOptions())
    backbone = json.loads((folder / CARD).read_text())["backbone"]
    reseal(folder, backbone=backbone | {"num_layers": 2})
    with pytest.raises(AdapterError, match="layers are called several times each"):
        Tasks(str(backbones("albert"))).add(folder)
