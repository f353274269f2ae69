"""What a bank takes in and what it refuses, what that costs in work and memory."""

import gc
import json
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import pastina
from pastina.backbones import load_backbone
from pastina.bank import Adapter, Bank, Task, split_by_plan
from pastina.errors import AdapterError, DataError
from pastina.files import CARD, CONFIG, WEIGHTS
from pastina.recipe import BackboneSpec, FullOptions, LinearOptions, PastaOptions
from pastina.tasks import Tasks
from tests.adapter_folder import LONG, family_folder, make_adapter, reseal
from tests.test_tasks import assert_alike

HIDDEN, SLOTS = 32, 2
VECTORS = "base_model.model.bert.encoder.layer.{}.pasta_vectors"
WEIGHT, BIAS = "base_model.model.classifier.weight", "base_model.model.classifier.bias"


@pytest.fixture(scope="session")
def backbone(bert: Path) -> Any:
    return load_backbone(BackboneSpec(name=str(bert)), keep_pooler=True)


@pytest.fixture
def bank(backbone: Any) -> Bank:
    return Bank(backbone)


@pytest.fixture(scope="session")
def made(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Adapters on the tiny BERT, made once; not to be spoiled."""
    root = tmp_path_factory.mktemp("made")
    wanted: dict[str, dict[str, Any]] = {
        "plain": {"pooling": "pooler"},
        "by-token": {"options": PastaOptions(share="by_token")},
        "shared": {"options": PastaOptions(share="all", num_slots=4), "kind": "multilabel"},
        "upper": {"options": PastaOptions(layers=(1,)), "labels": ("a", "b", "c")},
        "number": {"kind": "regress", "scale": (10.0, 3.0)},
        "tagger": {"kind": "tag", "max_length": 12},
        "probe": {"options": LinearOptions(), "labels": tuple("abcdefg")},
        "full": {"options": FullOptions()},
    }

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            make_adapter(bert, root / name, **wanted[name])
        return root / name

    return folder


@pytest.fixture
def spoiled(made: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of an adapter with another config, card or tensors, whose digest is right."""

    def copy(
        config: dict[str, Any] | None = None,
        card: dict[str, Any] | None = None,
        tensors: Callable[[dict[str, torch.Tensor]], Any] | None = None,
        of: str = "plain",
    ) -> Path:
        folder = Path(shutil.copytree(made(of), tmp_path / "spoiled", dirs_exist_ok=True))
        values = json.loads((folder / CONFIG).read_text()) | (config or {})
        (folder / CONFIG).write_text(json.dumps(values))
        if tensors is not None:
            own = load_file(folder / WEIGHTS)
            tensors(own)
            save_file({key: tensor.contiguous() for key, tensor in own.items()}, folder / WEIGHTS)
        return reseal(folder, **(card or {}))

    return copy


def is_untouched(bank: Bank) -> bool:
    return (len(bank), bank.vectors.gaps.end, bank.heads.gaps.end, bank._kept) == (0, 0, 0, {})


# ---------------------------------------------------------------------------------------------------
# What stands in it


def test_vectors_stand_in_the_order_of_layers(bank: Bank, made: Callable[[str], Path]) -> None:
    for name, layers, num_vectors in (
        ("plain", (0, 1), 2),
        ("by-token", (0, 1), 2),
        ("shared", (0, 1), 1),
        ("upper", (1,), 2),
        ("tagger", (0, 1), 2),
    ):
        task, tensors = bank.add(made(name)), load_file(made(name) / WEIGHTS)
        assert task.plan is not None
        assert task.vectors is not None
        assert (task.plan.layers, task.plan.num_vectors) == (layers, num_vectors)
        expected = torch.cat([tensors[VECTORS.format(layer)] for layer in layers])
        assert torch.equal(task.vectors.read(), expected)
        assert torch.equal(task.head.read()[:, :-1], tensors[WEIGHT])
        assert torch.equal(task.head.read()[:, -1], tensors[BIAS])
    probe = bank.add(made("probe"))
    assert (probe.plan, probe.vectors) == (None, None)
    assert torch.equal(probe.head.read()[:, :-1], load_file(made("probe") / WEIGHTS)[WEIGHT])


def test_vectors_of_layers_that_are_one(tmp_path: Path) -> None:
    """ALBERT calls one layer several times; its file has one table for all calls."""
    folder = family_folder("albert", tmp_path / "albert")
    for layers in (None, (0, 2)):
        adapter = make_adapter(folder, tmp_path / "a", options=PastaOptions(layers=layers))
        bank = Bank(load_backbone(BackboneSpec(name=str(folder)), keep_pooler=True))
        task = bank.add(adapter)
        (table,) = (t for key, t in load_file(adapter / WEIGHTS).items() if "pasta" in key)
        assert task.plan is not None
        assert task.vectors is not None
        assert task.plan.layers == (layers or (0, 1, 2))
        assert torch.equal(task.vectors.read(), table.view(-1, HIDDEN))


def test_equal_labels_and_plans_are_kept_once(bank: Bank, made: Callable[[str], Path]) -> None:
    one, other = bank.add(made("plain"), "a"), bank.add(made("plain"), "b")
    assert one.labels is other.labels
    assert one.plan is other.plan
    upper = bank.add(made("upper"))
    assert upper.plan is not one.plan
    assert dict(split_by_plan([one, upper, other])) == {one.plan: [0, 2], upper.plan: [1]}
    assert split_by_plan([bank.add(made("probe"))]) == []
    for name in ("a", "b", "upper", "probe"):
        bank.remove(name)
    assert bank._kept == {}


def test_half_precision_files(bank: Bank, spoiled: Callable[..., Path]) -> None:
    def half(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            tensors[key] = tensors[key].half()

    task = bank.add(spoiled(tensors=half))
    assert task.head.read().dtype == torch.float32


# ---------------------------------------------------------------------------------------------------
# What is refused, with the digest in order


def without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensor})


def poison(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


UPPER = VECTORS.format(1)
CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LINEAR"}, "is of 'LINEAR', the card says 'pasta'"),
    ({"peft_type": "LORA"}, "is of 'LORA'"),
    ({"peft_type": None}, "peft_type: "),
    ({"num_slots": None}, "special_token_ids and num_slots do not say which"),
    ({"num_slots": 0}, "num_slots: "),
    ({"num_slots": 3}, r"is torch.float32 of the shape \(2, 32\), .* of the shape \(3, 32\)"),
    ({"num_slots": 10**9}, "of the shape"),
    ({"num_slots": True}, "num_slots: "),
    ({"num_slots": 2.0}, "num_slots: "),
    ({"special_token_ids": []}, "special_token_ids: .* not different numbers"),
    ({"special_token_ids": [2, 2]}, "special_token_ids: .* not different numbers"),
    ({"special_token_ids": [-1]}, "special_token_ids.0: "),
    ({"special_token_ids": [2**70]}, "special_token_ids.0: "),
    ({"special_token_ids": "2"}, "special_token_ids: "),
    ({"special_token_ids": None}, "special_token_ids and num_slots do not say which"),
    ({"special_token_ids": None, "fixed_positions": [0, 4]}, "do not say which tokens have vec"),
    ({"special_token_ids": [1, 2, 3], "share": "by_token"}, r"expected .* \(3, 32\)"),
    ({"share": "some"}, "share: "),
    ({"share": "all"}, r"expected .* \(1, 32\)"),
    ({"layers": []}, "layers: .* not different numbers"),
    ({"layers": [0]}, "holds an unknown tensor"),
    ({"layers": [0, 1, 2]}, r"layers: \[0, 1, 2\], but the backbone has 2 layers"),
    ({"layers": [0, 0]}, "layers: .* not different"),
    ({"layers": [True, 0]}, "layers.0: "),
    ({"target_modules": ["bert.encoder.layer.1", "bert.encoder.layer.0"]}, "target_modules: "),
    ({"target_modules": ["bert.encoder.layer.0"]}, "target_modules: "),
    ({"target_modules": "all-linear"}, "target_modules: "),
]
TENSORS: list[tuple[Any, str]] = [
    (without(UPPER), f"lacks the tensor '{UPPER}'"),
    (without(WEIGHT), f"lacks the tensor '{WEIGHT}'"),
    (without(BIAS), f"lacks the tensor '{BIAS}'"),
    (put("more", torch.zeros(1)), "holds an unknown tensor, 'more'"),
    (put("x." + UPPER, torch.zeros(2, HIDDEN)), "holds an unknown tensor"),
    (put(UPPER, torch.zeros(3, HIDDEN)), r"shape \(3, 32\)"),
    (put(UPPER, torch.zeros(2, HIDDEN + 1)), r"shape \(2, 33\)"),
    (put(UPPER, torch.zeros(1, 2, HIDDEN)), r"shape \(1, 2, 32\)"),
    (put(UPPER, torch.zeros(())), r"shape \(\)"),
    (put(UPPER, torch.zeros(0, HIDDEN)), r"shape \(0, 32\)"),
    (put(UPPER, torch.zeros(2, HIDDEN, dtype=torch.int64)), "is torch.int64"),
    (put(UPPER, torch.zeros(2, HIDDEN, dtype=torch.bool)), "is torch.bool"),
    (put(WEIGHT, torch.zeros(3, HIDDEN)), r"shape \(3, 32\)"),
    (put(WEIGHT, torch.zeros(2, 0)), r"shape \(2, 0\)"),
    (put(WEIGHT, torch.zeros(2)), r"shape \(2,\)"),
    (put(BIAS, torch.zeros(2, 1)), r"shape \(2, 1\)"),
    (put(UPPER, torch.full((2, HIDDEN), 1e300, dtype=torch.float64)), "not finite"),
    (poison(UPPER, float("nan")), f"{UPPER} holds numbers that are not finite"),
    (poison(WEIGHT, float("inf")), f"{WEIGHT} holds numbers that are not finite"),
    (poison(BIAS, float("-inf")), f"{BIAS} holds numbers that are not finite"),
]
CARDS: list[tuple[dict[str, Any], str]] = [
    ({"method": "full"}, "works inside the backbone"),
    ({"method": "linear"}, "is of 'PASTA', the card says 'linear'"),
    ({"method": "dance"}, "works inside the backbone"),
    ({"labels": []}, "labels: there are none"),
    ({"labels": ["a"]}, r"expected .* \(1, 32\)"),
    ({"kind": "tag"}, "pooling: 'pooler' does not go with the kind tag"),
    ({"pooling": "tokens"}, "pooling: 'tokens' does not go with the kind classify"),
    ({"pooling": "max"}, "pooling: 'max' does not go"),
    ({"max_length": 67}, "max_length: 67, but the backbone reads at most 66"),
    ({"max_length": 2}, "max_length: 2 leaves no room"),
    ({"max_length": 4, "is_pair": True}, "max_length: 4 leaves no room"),
    ({"max_length": -5}, "leaves no room"),
    ({"target_std": float("nan")}, "target: .* not both usable"),
    ({"target_mean": float("inf")}, "target: .* not both usable"),
    ({"target_std": 1e300}, "target: .* not both usable"),
    ({"kind": "tag", "pooling": "tokens", "stride": 22}, "stride: 22 does not go with windows"),
    ({"kind": "tag", "pooling": "tokens", "stride": -1}, "stride: -1 does not go"),
]


@pytest.mark.parametrize(("config", "words"), CONFIGS)
def test_configs(bank: Bank, spoiled: Callable[..., Path], config: Any, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        bank.add(spoiled(config=config))
    assert is_untouched(bank)


@pytest.mark.parametrize(("tensors", "words"), TENSORS)
def test_tensors(bank: Bank, spoiled: Callable[..., Path], tensors: Any, words: str) -> None:
    with pytest.raises(AdapterError, match=words.replace("base_model.", "base_model[.]")):
        bank.add(spoiled(tensors=tensors))
    assert is_untouched(bank)


@pytest.mark.parametrize(("card", "words"), CARDS)
def test_cards(bank: Bank, spoiled: Callable[..., Path], card: Any, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        bank.add(spoiled(card=card))
    assert is_untouched(bank)


def test_nothing_was_wrong_before_it_was_spoiled(bank: Bank, spoiled: Callable[..., Path]) -> None:
    assert bank.add(spoiled()).name == "plain"
    assert bank.add(spoiled(config={"target_modules": None, "more": [1]})).name == "plain"
    assert bank.add(spoiled(card={"max_length": 66}), "longest").max_length == 66
    assert bank.add(spoiled(card={"max_length": 3}), "shortest").max_length == 3
    with pytest.raises(AdapterError, match="vectors"):
        bank.add(spoiled(of="probe", tensors=put(UPPER, torch.zeros(2, HIDDEN))))


@pytest.mark.parametrize("of", ["shared", "by-token"])
def test_slots_that_no_text_can_have(bank: Bank, spoiled: Callable[..., Path], of: str) -> None:
    """They would take memory for each row of a batch; a text of 24 tokens has 24 at most."""
    task = bank.add(spoiled(of=of, config={"num_slots": 2**60}))
    assert task.plan is not None
    assert task.plan.rule.num_slots == task.max_length == 24


@pytest.mark.parametrize("name", [CARD, CONFIG, WEIGHTS])
def test_files(bank: Bank, spoiled: Callable[..., Path], name: str) -> None:
    folder = spoiled()
    path = folder / name
    content = path.read_bytes()
    for broken in (content[:-1], content[:1], b"", b"\xff" + content, b"null", b"[" * 100_000):
        path.write_bytes(broken)
        with pytest.raises(AdapterError):
            bank.add(folder)
        if name != CARD:
            reseal(folder)
            with pytest.raises(AdapterError, match=name):
                bank.add(folder)
    path.unlink()
    with pytest.raises(AdapterError, match=f"is not an adapter: {name} is missing"):
        bank.add(folder)
    path.mkdir()
    with pytest.raises(AdapterError, match=f"{name} is missing"):
        bank.add(folder)
    assert is_untouched(bank)


@pytest.mark.parametrize("folder", ["/nowhere", "/dev/null", "a\0b", "x" * 5000])
def test_folders_that_are_none(bank: Bank, folder: str) -> None:
    with pytest.raises(AdapterError):
        bank.add(folder)


@pytest.mark.parametrize(
    "recipe",
    ['{"a": "\\ud800"}', '{"a": ' * 400 + "1" + "}" * 400, '{"a": ' + "9" * 5000 + "}"],
    ids=["half a character", "deep", "long number"],
)
def test_cards_that_json_allows(bank: Bank, spoiled: Callable[..., Path], recipe: str) -> None:
    folder = spoiled()
    values = json.loads((folder / CARD).read_text())
    text = json.dumps(values | {"recipe": {}}).replace('"recipe": {}', f'"recipe": {recipe}')
    (folder / CARD).write_text(text)
    with pytest.raises(AdapterError):
        bank.add(folder)


def test_full_fine_tuning_needs_its_own_backbone(bank: Bank, made: Callable[[str], Path]) -> None:
    with pytest.raises(
        AdapterError, match=r"trained with 'full'.* pastina.load\(\) loads this one"
    ):
        bank.add(made("full"))
    assert is_untouched(bank)


def test_another_backbone(
    bank: Bank, backbones: Callable[[str], Path], made: Callable[[str], Path], tmp_path: Path
) -> None:
    other = make_adapter(backbones("bert-no-pooler"), tmp_path / "other")
    with pytest.raises(AdapterError, match=r"was trained on .* with weights .* has weights"):
        bank.add(other)
    assert is_untouched(bank)


def test_a_backbone_without_its_pooler(bert: Path, made: Callable[[str], Path]) -> None:
    bank = Bank(load_backbone(BackboneSpec(name=str(bert)), keep_pooler=False))
    with pytest.raises(AdapterError, match="the backbone was loaded without one"):
        bank.add(made("plain"))
    assert bank.add(made("tagger")).kind == "tag"


def test_what_was_checked_is_what_is_used(
    bank: Bank, spoiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is read once: somebody may put another adapter there meanwhile."""
    folder, opened = spoiled(), []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read(path))
    bank.add(folder)
    assert sorted(opened) == sorted([CARD, CONFIG, WEIGHTS])


# ---------------------------------------------------------------------------------------------------
# Anything at all

odd = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 70),
        st.sampled_from([2**31, 2**63, 2**64, -(2**70), 10**400]),
        st.floats(),
        st.text(max_size=4),
        st.sampled_from(["none", "all", "by_token", "PASTA", "LINEAR", "tokens", "mean", "tag"]),
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = ["peft_type", "special_token_ids", "num_slots", "share", "layers", "fixed_positions"]
KEYS += ["target_modules", "modules_to_save", "task_type", "base_model_name_or_path", "dropout"]
ids = st.lists(st.integers(0, 4), max_size=4)
likely = st.fixed_dictionaries(
    {},
    optional={
        "share": st.sampled_from(["none", "all", "by_token"]),
        "num_slots": st.none() | st.integers(1, 4),
        "special_token_ids": st.none() | ids,
        "layers": st.none() | ids,
    },
)
fuzz = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def assert_refused_or_right(tasks: Tasks, folder: Path, *, may_fail_alone: bool = False) -> None:
    """It is refused in one sentence, or it answers as `pastina.load` does; others do not notice."""
    try:
        task = tasks.add(folder, "odd")
    except AdapterError:
        assert len(tasks) == 1
        return
    request = ("odd", (LONG, "saw") if task.is_pair else LONG)
    found: Any = None
    complaint = ""
    try:
        found, _ = tasks.predict([request, ("good", LONG)])
    except DataError as error:
        complaint = str(error)
    finally:
        tasks.remove("odd")
    if (json.loads((folder / CONFIG).read_text()).get("num_slots") or 0) > 1000:
        return  # alone it would take memory for each slot
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alone = pastina.load(folder, precision="fp32")
    except Exception:
        assert may_fail_alone
        return
    if complaint:
        with pytest.raises(DataError) as caught:
            alone.predict([request[1]])
        assert str(caught.value).replace("text 1", "request 1") == complaint
    else:
        assert_alike(found, alone.predict([request[1]])[0])


@pytest.fixture(scope="session")
def tasks(bert: Path, made: Callable[[str], Path]) -> Tasks:
    tasks = Tasks(str(bert), precision="fp32")
    tasks.add(made("upper"), "good")
    return tasks


@fuzz
@given(
    config=st.dictionaries(st.sampled_from(KEYS), odd, min_size=1, max_size=3),
    of=st.sampled_from(["plain", "by-token", "shared", "tagger", "probe"]),
)
def test_any_config(
    tasks: Tasks, spoiled: Callable[..., Path], config: dict[str, Any], of: str
) -> None:
    assert_refused_or_right(tasks, spoiled(config=config, of=of), may_fail_alone=True)


@fuzz
@given(config=likely, of=st.sampled_from(["plain", "by-token", "shared", "upper", "tagger"]))
def test_any_config_of_the_right_form(
    tasks: Tasks, spoiled: Callable[..., Path], config: dict[str, Any], of: str
) -> None:
    assert_refused_or_right(tasks, spoiled(config=config, of=of))


@fuzz
@given(content=odd, of=st.sampled_from(["plain", "probe"]))
def test_anything_in_place_of_a_config(
    tasks: Tasks, spoiled: Callable[..., Path], content: Any, of: str
) -> None:
    folder = spoiled(of=of)
    (folder / CONFIG).write_text(json.dumps(content))
    reseal(folder)
    with pytest.raises(AdapterError):
        tasks.add(folder)


likely_card = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(["classify", "multilabel", "tag", "regress"]),
        "pooling": st.sampled_from(["cls", "mean", "pooler", "tokens"]),
        "is_pair": st.booleans(),
        "labels": st.lists(st.text(max_size=2), min_size=1, max_size=3),
        "max_length": st.integers(2, 70),
        "stride": st.integers(-1, 30),
        "target_mean": st.floats(-1e3, 1e3),
        "target_std": st.floats(-1e3, 1e3),
    },
)
CARD_KEYS = ["name", "kind", "labels", "method", "is_pair", "pooling", "max_length", "stride"]
CARD_KEYS += ["target_mean", "target_std", "trained_parameters", "metrics", "recipe", "created"]


@fuzz
@given(
    card=st.dictionaries(st.sampled_from(CARD_KEYS), odd, min_size=1, max_size=3) | likely_card,
    of=st.sampled_from(["plain", "number", "tagger", "probe"]),
)
def test_any_card(tasks: Tasks, spoiled: Callable[..., Path], card: Any, of: str) -> None:
    try:
        folder = spoiled(card=card, of=of)
    except ValueError:
        return  # not even a card: it has no digest that could be right
    assert_refused_or_right(tasks, folder)


@fuzz
@given(data=st.data())
def test_any_bytes_in_the_tensors(
    tasks: Tasks, spoiled: Callable[..., Path], data: st.DataObject
) -> None:
    folder = spoiled()
    content = bytearray((folder / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header))] = data.draw(st.integers(32, 126))
    (folder / WEIGHTS).write_bytes(content)
    reseal(folder)
    try:
        tasks.bank.read(folder)
    except AdapterError:
        return


DTYPES = ["F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "?"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_type_of_number(tasks: Tasks, spoiled: Callable[..., Path], dtype: str) -> None:
    folder = spoiled()
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header[BIAS]["dtype"] = dtype
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    reseal(folder)
    if dtype == "F32":
        assert tasks.bank.read(folder).head.shape == (2, HIDDEN + 1)
    else:
        with pytest.raises(AdapterError):
            tasks.bank.read(folder)


# ---------------------------------------------------------------------------------------------------
# Work and memory


def random_adapter(like: Adapter, i: int, num_labels: int = 2) -> Adapter:
    """Another adapter of its own: name, digest, labels and numbers."""
    card = like.card.model_copy(
        update={
            "name": f"acme/task{i}",
            "digest": f"{i:064x}",
            "labels": tuple(f"label {i} {k}" for k in range(num_labels)),
        }
    )
    head = torch.full((num_labels, like.head.shape[1]), float(i))
    vectors = None if like.vectors is None else torch.full_like(like.vectors, float(i))
    return replace(like, card=card, vectors=vectors, head=head)


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """Counts the calls of functions, Python's and C's."""
    count, profiler = [0], sys.getprofile()

    def count_one(frame: Any, event: str, arg: Any) -> None:
        count[0] += event in ("call", "c_call")

    gc.collect()
    gc.disable()  # what it would call belongs to others
    sys.setprofile(count_one)
    try:
        yield count
    finally:
        sys.setprofile(profiler)
        gc.enable()


def calls_of(act: Callable[[], Any]) -> int:
    with counted_calls() as count:
        act()
    return count[0]


def test_work_does_not_grow_with_the_number_of_tasks(
    bank: Bank, made: Callable[[str], Path]
) -> None:
    like = bank.read(made("plain"))
    work: dict[int, tuple[int, ...]] = {}
    places: list[Any] = []
    bank.add(made("upper"), "new")  # what is found out once
    bank.remove("new")
    for i in range(3000):
        if i in (10, 100, 2999):
            work[i] = (
                calls_of(lambda: bank.add(made("plain"), "new")),
                calls_of(lambda: bank.add(made("upper"), "new")),
                calls_of(lambda: bank.put(like, "new")),
                calls_of(lambda: bank["new"]),
                calls_of(lambda: bank.remove("new")),
            )
            places.append(bank.vectors.numbers.data_ptr())
        bank.put(random_adapter(like, i))
    assert len(set(work.values())) == 1, work
    assert len(set(places)) == 1, "the table was not copied"


def has_its_own_numbers(task: Task) -> bool:
    value = float(task.labels[0].split()[1])
    tables = [task.head] if task.vectors is None else [task.head, task.vectors]
    is_own = [bool((rows.read() == value).all()) for rows in tables]
    return all(is_own) and len(task.labels) == task.head.num_rows


def test_room_is_used_again(bank: Bank, made: Callable[[str], Path]) -> None:
    """10,000 times in and out: as much room as for the tasks that are in at a time."""
    likes = [bank.read(made(name)) for name in ("plain", "upper", "probe")]
    draw = random.Random(3)
    names: list[str] = []
    for i in range(10_000):
        like = draw.choice(likes)
        name = bank.put(random_adapter(like, i, draw.choice((2, 3, 7, 40)))).name
        names.append(name)
        if len(names) > 20:
            bank.remove(names.pop(draw.randrange(len(names))))
        if i % 3 == 0:
            bank.put(random_adapter(draw.choice(likes), i, 5), draw.choice(names))
    assert len(bank) == 20
    assert bank.vectors.gaps.end <= 22 * 4
    assert bank.heads.gaps.end <= 22 * 40
    assert len(bank._kept) <= 20 + len(likes)
    assert all(has_its_own_numbers(task) for task in bank)
    for name in names:
        bank.remove(name)
    bank.put(likes[0])
    bank.remove(likes[0].card.name)
    bank.put(likes[0])
    assert (bank.vectors.gaps.end, bank.heads.gaps.end, len(bank._kept)) == (4, 2, 2)


def test_a_name_that_is_not_there_is_cheap(bank: Bank, made: Callable[[str], Path]) -> None:
    like = bank.read(made("probe"))
    for i in range(3000):
        bank.put(random_adapter(like, i))
    with counted_calls() as count, pytest.raises(DataError, match=r"among 3000. .* 'acme/task77'"):
        bank["acme/tsk77"]
    assert count[0] < 3000 * 40
    with pytest.raises(DataError, match=r"There is no task 'zzz' among 3000\.$"):
        bank["zzz"]


MEMORY = """
import gc, sys
from pathlib import Path
from tests import backbone_folder
from tests.test_bank import random_adapter
from tests.adapter_folder import make_adapter
import torch
from pastina.backbones import load_backbone
from pastina.bank import Bank
from pastina.recipe import BackboneSpec

torch.set_num_threads(1)
backbone_folder._SIZES.update(hidden_size=384, num_hidden_layers=6)
folder = Path(sys.argv[1])
backbone = backbone_folder.save_backbone("bert", folder / "backbone")
adapter = make_adapter(backbone, folder / "adapter")
bank = Bank(load_backbone(BackboneSpec(name=str(backbone))))
like = bank.read(adapter)

def resident():
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return [int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")]

bank.put(random_adapter(like, 0))
before, _ = resident()
for i in range(10_000):
    bank.put(random_adapter(like, i))
after, most = resident()
numbers = sum(t.vectors.read().nbytes + t.head.read().nbytes for t in bank)
assert len(bank) == 10_000 and numbers == 10_000 * 4 * (6 * 2 * 384 + 2 * 385)
assert float(bank["acme/task9999"].vectors.read()[11, 383]) == 9999
print((after - before) / numbers, (most - before) / numbers)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_tasks_take_little_more_memory_than_their_numbers(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    at_rest, at_most = map(float, done.stdout.split())
    assert 0.95 < at_rest < 1.2
    assert at_most < 1.2
