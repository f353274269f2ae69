import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import pastina
from pastina import adapter as module
from pastina import files as files_module
from pastina.adapter import (
    CARD,
    CONFIG,
    WEIGHTS,
    Card,
    list_adapters,
    load_adapter,
    read_card,
    save_adapter,
    size_on_disk,
)
from pastina.backbones import load_backbone
from pastina.errors import AdapterError
from pastina.heads import TaskModel
from pastina.recipe import BackboneSpec
from tests.adapter_folder import make_adapter
from tests.backbone_folder import toy_recipe

Folders = Callable[[str], Path]
TEXTS = ["please send me a pear now", "the saw", "we need plum and nail today, thanks"]


@pytest.fixture(scope="module")
def trained(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tiny BERT with its own pooler."""
    folder = tmp_path_factory.mktemp("adapter")
    recipe = toy_recipe(bert, folder, name="toys", fit={"epochs": 1})
    return pastina.train(recipe, folder / "run").folder


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to be spoiled."""
    return Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))


def reseal(folder: Path, **changes: Any) -> None:
    """Change the card and write the digest that belongs to what the folder holds now."""
    values = json.loads((folder / CARD).read_text()) | changes
    if values["format"] == module.FORMAT:
        values["digest"] = module.adapter_digest(folder, Card.model_validate(values))
    (folder / CARD).write_text(json.dumps(values))


# ---------------------------------------------------------------------------------------------------
# What is written


def test_the_files_of_an_adapter(adapter: Path, bert: Path) -> None:
    assert {path.name for path in adapter.iterdir()} == {CARD, WEIGHTS, CONFIG, "README.md"}
    card = read_card(adapter)
    assert (card.name, card.kind, card.method) == ("toys", "classify", "pasta")
    assert card.labels == ("fruit", "tool")
    assert (card.pooling, card.is_pair, card.max_length) == ("pooler", False, 32)
    assert card.backbone.name == str(bert)
    vectors, head = 2 * 2 * 32, 32 * 2 + 2  # layers, slots, hidden; hidden, classes
    assert card.trained_parameters == vectors + head
    tensors = load_file(adapter / WEIGHTS)
    assert sum(tensor.numel() for tensor in tensors.values()) == card.trained_parameters
    assert json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"] == str(bert)
    assert size_on_disk(adapter) == sum(p.stat().st_size for p in adapter.iterdir())


def test_the_card_holds_what_is_needed_to_train_it_again(adapter: Path) -> None:
    from pastina.recipe import make_recipe

    card = read_card(adapter)
    recipe = make_recipe(card.recipe)
    assert recipe.fit.epochs == 1
    assert recipe.fit.lr is not None
    assert set(card.versions) >= {"pastina", "python", "torch", "transformers", "peft"}
    assert set(card.metrics["dev"]) == {"accuracy", "macro_f1", "matthews", "f1"}


def test_the_readme_tells_people(adapter: Path, bert: Path) -> None:
    text, card = (adapter / "README.md").read_text(), read_card(adapter)
    for part in (
        "# toys",
        "`fruit`, `tool`",
        f"| dev | accuracy | {card.metrics['dev']['accuracy']:.4f} |",
        "pastina.load(",
        card.digest,
        f"base_model: {bert}",
    ):
        assert part in text


def test_an_adapter_answers_as_the_model_did(trained: Path, adapter: Path) -> None:
    first, second = pastina.load(trained), pastina.load(adapter)
    assert first.predict(TEXTS) == second.predict(TEXTS)
    assert len({answer.scores["fruit"] for answer in first.predict(TEXTS) if answer.scores}) == 3


# ---------------------------------------------------------------------------------------------------
# Identity


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, CARD])
def test_any_changed_byte_is_noticed(adapter: Path, name: str) -> None:
    path = adapter / name
    content = bytearray(path.read_bytes())
    for at in range(0, len(content), max(len(content) // 12, 1)):
        changed = content.copy()
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(AdapterError):
            read_card(adapter)
    path.write_bytes(content)
    assert read_card(adapter).name == "toys"


@pytest.mark.parametrize(
    "changes", [{"labels": ["tool", "fruit"]}, {"pooling": "cls"}, {"max_length": 31}]
)
def test_a_card_that_somebody_edited_is_refused(adapter: Path, changes: dict[str, Any]) -> None:
    values = json.loads((adapter / CARD).read_text()) | changes
    (adapter / CARD).write_text(json.dumps(values))
    with pytest.raises(AdapterError, match="was changed after it was written"):
        pastina.load(adapter)


def test_a_card_written_differently_is_the_same_card(adapter: Path) -> None:
    values = json.loads((adapter / CARD).read_text())
    (adapter / CARD).write_text(json.dumps(dict(reversed(values.items()))))
    assert read_card(adapter).name == "toys"


# ---------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, CARD])
def test_a_missing_file(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    with pytest.raises(AdapterError, match=f"{name} is missing"):
        pastina.load(adapter)


def test_no_adapter_at_all(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is not an adapter"):
        pastina.load(tmp_path)
    with pytest.raises(AdapterError, match="is not an adapter"):
        pastina.load(tmp_path / "nowhere")


def test_pickles_are_not_read(adapter: Path) -> None:
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=f"{WEIGHTS} is missing"):
        pastina.load(adapter)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "not a task card"), ("[]", "not a task card"), ('{"name": 1}', "not a task card")],
)
def test_a_card_that_is_none(adapter: Path, content: str, words: str) -> None:
    (adapter / CARD).write_text(content)
    with pytest.raises(AdapterError, match=words):
        pastina.load(adapter)


def test_a_newer_format(adapter: Path) -> None:
    reseal(adapter, format=2, something_new=True)
    with pytest.raises(AdapterError, match="has format 2; this version of pastina reads format 1"):
        pastina.load(adapter)


@pytest.mark.parametrize("changes", [{"kind": "dance"}, {"unknown": 1}, {"max_length": "long"}])
def test_a_card_with_other_fields(adapter: Path, changes: dict[str, Any]) -> None:
    values = json.loads((adapter / CARD).read_text()) | changes
    (adapter / CARD).write_text(json.dumps(values))
    with pytest.raises(AdapterError, match=rf"task\.json: {next(iter(changes))}: "):
        pastina.load(adapter)


def test_broken_tensors(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-10])
    reseal(adapter)
    with pytest.raises(AdapterError, match=f"{WEIGHTS} is broken"):
        pastina.load(adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(adapter: Path, value: float) -> None:
    tensors = load_file(adapter / WEIGHTS)
    name = next(iter(tensors))
    tensors[name].view(-1)[3] = value
    save_file(tensors, adapter / WEIGHTS)
    reseal(adapter)
    with pytest.raises(AdapterError, match="not finite"):
        pastina.load(adapter)


@pytest.mark.parametrize("lost", ["classifier", "layer.1.pasta_vectors"])
def test_a_tensor_too_few(adapter: Path, lost: str) -> None:
    tensors = load_file(adapter / WEIGHTS)
    kept = {name: tensor for name, tensor in tensors.items() if lost not in name}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, adapter / WEIGHTS)
    reseal(adapter)
    with pytest.raises(AdapterError, match="lacks"):
        pastina.load(adapter)


def test_a_label_too_many(adapter: Path) -> None:
    reseal(adapter, labels=["a", "b", "c"])
    with pytest.raises(AdapterError, match="does not fit"):
        pastina.load(adapter)


def test_another_backbone(adapter: Path, backbones: Folders) -> None:
    other = backbones("bert-no-pooler")
    with pytest.raises(AdapterError, match=r"was trained on .* with weights .* has weights"):
        pastina.load(adapter, backbone=str(other))


def test_another_tokenizer(adapter: Path, bert: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bert, tmp_path / "other"))
    path = other / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(AdapterError, match=r"was trained on .* with tokenizer .* has tokenizer"):
        pastina.load(adapter, backbone=str(other))


def test_other_settings_of_the_same_weights(adapter: Path, bert: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bert, tmp_path / "other"))
    path = other / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"transformers_version": "9.9"}))
    assert pastina.load(adapter, backbone=str(other)).card.name == "toys"
    path.write_text(json.dumps(settings | {"layer_norm_eps": 0.1}))
    with pytest.raises(AdapterError, match=r"with settings .* has settings"):
        pastina.load(adapter, backbone=str(other))


def test_the_same_backbone_elsewhere(adapter: Path, bert: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(bert, tmp_path / "moved"))
    moved = pastina.load(adapter, backbone=str(other))
    assert moved.predict(TEXTS) == pastina.load(adapter).predict(TEXTS)


def test_a_backbone_in_memory(adapter: Path, bert: Path) -> None:
    backbone = load_backbone(BackboneSpec(name=str(bert)))
    assert load_adapter(adapter, loaded=backbone).backbone is backbone


# ---------------------------------------------------------------------------------------------------
# Writing is all or nothing


class Crash(BaseException):
    """The machine goes down."""


def crash(*args: Any, **kwargs: Any) -> None:
    raise Crash


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (module, "_readme"),
        (module, "fsync"),
        (module, "adapter_digest"),
        (files_module, "_exchange"),
        (Path, "rename"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_crash_while_writing_leaves_the_old_adapter(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, where: Any, what: str
) -> None:
    loaded = load_adapter(adapter)
    loaded.model.requires_grad_(True)
    if where is Path:
        monkeypatch.setattr(files_module, "_exchange", lambda one, other: False)
    card = loaded.card.model_copy(update={"name": "newer"})
    with monkeypatch.context() as patch:
        patch.setattr(where, what, crash)
        with pytest.raises(Crash):
            save_adapter(loaded.model, card, adapter)
    assert read_card(adapter) == loaded.card
    assert [path for path, _ in list_adapters(adapter.parent)] == [adapter]
    assert list(adapter.parent.glob(".*")) == []


def test_a_system_without_exchange_puts_the_old_one_back(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_adapter(adapter)
    renames, rename = [], Path.rename

    def second_fails(path: Path, to: Path) -> Path:
        renames.append(path.name)
        if len(renames) == 2:
            raise OSError("disk full")
        return rename(path, to)

    monkeypatch.setattr(files_module, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(loaded.model, loaded.card, adapter)
    assert len(renames) == 3
    assert read_card(adapter) == loaded.card


@pytest.mark.parametrize("has_exchange", [True, False])
def test_replacing_an_adapter(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, has_exchange: bool
) -> None:
    loaded = load_adapter(adapter)
    (adapter / "old.txt").write_text("of the old one")
    if not has_exchange:
        monkeypatch.setattr(files_module, "_exchange", lambda one, other: False)
    card = loaded.card.model_copy(update={"name": "newer"})
    written = save_adapter(loaded.model, card, adapter)
    assert read_card(adapter) == written
    assert written.name == "newer"
    assert not (adapter / "old.txt").exists()
    assert list(adapter.parent.glob(".*")) == []


def test_numbers_that_are_not_finite_are_not_written(adapter: Path, tmp_path: Path) -> None:
    loaded = load_adapter(adapter)
    with torch.no_grad():
        head = dict(loaded.model.named_parameters())
        name = next(name for name in head if "classifier" in name and "default" in name)
        head[name].requires_grad_(True).fill_(float("nan"))
    with pytest.raises(AdapterError, match="not finite"):
        save_adapter(loaded.model, loaded.card, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------
# Many


def test_listing_names_what_is_broken(adapter: Path) -> None:
    root = adapter.parent
    shutil.copytree(adapter, root / "acme" / "tickets")
    shutil.copytree(adapter, root / ".adapter.123.new")
    broken = Path(shutil.copytree(adapter, root / "broken"))
    (broken / WEIGHTS).unlink()
    found = dict(list_adapters(root))
    assert list(found) == [root / "acme" / "tickets", adapter, broken]
    assert isinstance(found[broken], AdapterError)
    assert isinstance(found[adapter], Card)
    with pytest.raises(AdapterError, match="There is no folder"):
        list(list_adapters(root / "nowhere"))


# ---------------------------------------------------------------------------------------------------
# For PEFT it is an adapter like any other


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's use of it
@torch.no_grad()
def test_it_loads_in_plain_peft(adapter: Path, bert: Path) -> None:
    """On transformers' own class, whose head on the pooler is the same function."""
    predictor = pastina.load(adapter, precision="fp32")
    tokenizer = predictor.tokenizer
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    scores = torch.softmax(model(**inputs).logits, -1)
    ours = [answer.scores for answer in predictor.predict(TEXTS)]
    expected = torch.tensor([[s["fruit"], s["tool"]] for s in ours if s])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)

    auto = peft.AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=2)
    torch.testing.assert_close(torch.softmax(auto.eval()(**inputs).logits, -1), scores)


@torch.no_grad()
def test_it_loads_on_a_task_model(adapter: Path, bert: Path) -> None:
    backbone = load_backbone(BackboneSpec(name=str(bert)))
    task_model = TaskModel(backbone.model, 2, pooling="pooler")
    model = peft.PeftModel.from_pretrained(task_model, str(adapter)).eval()
    inputs = backbone.tokenizer(TEXTS, padding=True, return_tensors="pt")
    first = torch.softmax(model(**inputs).logits, -1)[0]
    scores = pastina.load(adapter, precision="fp32").predict(TEXTS[:1])[0].scores
    assert scores is not None
    assert scores["fruit"] == pytest.approx(first[0].item(), abs=1e-5)


def test_others_may_read_it_as_any_new_file(bert: Path, tmp_path: Path) -> None:
    """A server runs as another user than the one who trained, and needs every file of an adapter."""
    folder = make_adapter(bert, tmp_path / "task")
    plain = tmp_path / "plain.txt"
    plain.write_text("x")
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 4
    assert set(modes.values()) == {plain.stat().st_mode}, modes
