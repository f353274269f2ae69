"""A mix of tasks answers as each task alone, on every family, while tasks come and go."""

import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pastina
from pastina.adapter import read_card
from pastina.answers import Prediction
from pastina.data.rows import Row
from pastina.engine import native
from pastina.engine.asking import Asking
from pastina.engine.encoder import Encoder
from pastina.engine.hooked import HookedEncoder
from pastina.errors import AdapterError, BackboneError, DataError, RecipeError
from pastina.recipe import LinearOptions, PastaOptions
from pastina.tasks import Tasks
from tests.adapter_folder import LONG, family_folder, make_adapter
from tests.backbone_folder import toy_recipe
from tests.test_table import no_addresses

PACKED = ("bert", "roberta", "distilbert", "electra")
HOOKED = ("albert", "mpnet", "deberta")
FAMILIES = (*PACKED, *HOOKED, "modernbert", "bert-no-pooler")
TEXTS = ("saw", "please send me a pear now", "the the the", LONG, "9!", "\u200b")
Request = tuple[str, Any]


@dataclass(frozen=True)
class Many:
    """Tasks on one backbone, and what each of them answers alone."""

    tasks: Tasks
    folders: dict[str, Path]
    alone: dict[Request, Prediction]

    def check(self, requests: Sequence[Request], answers: Sequence[Prediction]) -> None:
        assert len(answers) == len(requests)
        for request, answer in zip(requests, answers, strict=True):
            assert_alike(answer, self.alone[request])

    @property
    def requests(self) -> list[Request]:
        return list(self.alone)


def plans(
    has_pooler: bool, num_layers: int, can_cut: bool, has_biases: bool
) -> dict[str, dict[str, Any]]:
    """Every kind, pooling, method and way to share, texts cut at several lengths, fewer layers."""
    fewer: dict[str, Any] = {"num_layers": num_layers - 1}
    lower = {
        "lower": {"pooling": "mean", **fewer},
        "lower-tagger": {"kind": "tag", "options": {"everywhere": True}, **fewer},
        "lower-probe": {"options": "linear", "num_layers": 1},
        "all-named": {"num_layers": num_layers},
    }
    last = {"layers": (num_layers - 1,)}
    own = {"bias_layers": (num_layers - 1,)}
    biased: dict[str, dict[str, Any]] = {
        "biases": {"options": own, "pooling": "mean"},
        "biases-twin": {"options": own, "pooling": "mean"},
        "biases-cls": {"options": {"bias_layers": (0, num_layers - 1)}, "is_pair": True},
        "biases-tagger": {
            "options": {"bias_layers": tuple(range(num_layers)), "rank": 1, "share": "by_token"},
            "kind": "tag",
        },
    }
    pooler = "pooler" if has_pooler else "cls"
    return (
        {
            "plain": {"labels": ("a", "b", "c"), "pooling": pooler},
            "twin": {"labels": ("a", "b", "c"), "pooling": pooler},
            "by-token": {"options": {"share": "by_token"}, "pooling": "mean"},
            "shared": {"options": {"share": "all", "num_slots": 6}, "kind": "multilabel"},
            "upper": {"options": last, "kind": "regress", "pooling": "mean", "scale": (10.0, 3.0)},
            "spare": {"options": {"num_slots": 5}, "pooling": "mean"},
            "pair": {"is_pair": True, "pooling": pooler, "max_length": 16},
            "pair-by-token": {"is_pair": True, "options": {"share": "by_token"}, "pooling": "mean"},
            "tagger": {"kind": "tag", "max_length": 12},
            "upper-tagger": {"kind": "tag", "labels": ("x",), "options": last | {"share": "all"}},
            "probe": {"options": "linear", "labels": tuple("abcdefg"), "pooling": pooler},
            "probe-tagger": {"options": "linear", "kind": "tag", "max_length": 12, "stride": 7},
            "one-slot": {"options": {"special_token_ids": (1,), "num_slots": 9}, "pooling": "mean"},
            "first": {"options": {"slots": "first"}},
            "rest": {
                "options": {"slots": "rest", "share": "all"},
                "is_pair": True,
                "pooling": "mean",
            },
            "by-layer": {"options": {"layer_slots": (1,) + (0,) * (num_layers - 1)}},
            "front": {"options": {"positions": "first"}, "pooling": "mean"},
            "drawn": {"options": {"positions": "random", "slots": (1,)}, "kind": "tag"},
            "everywhere": {"options": {"everywhere": True} | last, "pooling": "mean"},
            "tied-everywhere": {
                "options": {"everywhere": True, "share": "by_token"},
                "kind": "tag",
            },
            "product": {"options": {"rank": 2, "everywhere": True}, "pooling": "mean"},
            "product-tagger": {"options": {"rank": 1, "share": "by_token"} | last, "kind": "tag"},
            "extra": {"options": {"extra_tokens": 3}, "max_length": 12},
            "extra-tagger": {"options": {"extra_tokens": 2}, "kind": "tag", "max_length": 12},
        }
        | (lower if can_cut else {})
        | (biased if has_biases else {})
    )


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Many]:
    """The tasks on a backbone of a family, made once."""
    known: dict[str, Many] = {}

    def many(name: str) -> Many:
        if name not in known:
            known[name] = _many(name, tmp_path_factory.mktemp(name))
        return known[name]

    return many


def _many(name: str, root: Path) -> Many:
    backbone = family_folder(name, root / "backbone")
    tasks = Tasks(str(backbone), precision="fp32")
    has_pooler = getattr(tasks.bank.backbone.model, "pooler", None) is not None
    folders: dict[str, Path] = {}
    alone: dict[Request, Prediction] = {}
    layers = tasks.bank.layers
    can_cut = len(layers.names) == layers.num_layers
    wanted_tasks = plans(has_pooler, layers.num_layers, can_cut, name != "modernbert")
    for seed, (task, wanted) in enumerate(wanted_tasks.items()):
        options = wanted.pop("options", {})
        method = LinearOptions() if options == "linear" else PastaOptions(**options)
        folders[task] = make_adapter(
            backbone, root / task, options=method, **{"seed": seed, **wanted}
        )
        predictor = pastina.load(folders[task], precision="fp32")
        for text in TEXTS:
            asked = (text, TEXTS[1]) if predictor.card.is_pair else text
            (alone[task, asked],) = predictor.predict([asked])
        tasks.add(folders[task])
    return Many(tasks, folders, alone)


def numbers(answer: Prediction) -> list[float]:
    """Every number of an answer."""
    if answer.spans is not None:
        return [n for s in answer.spans for n in (s.start, s.end, s.score or 0.0)]
    return [answer.value] if answer.value is not None else list((answer.scores or {}).values())


def is_alike(one: Prediction, other: Prediction) -> bool:
    return names(one) == names(other) and numbers(one) == pytest.approx(numbers(other), abs=1e-5)


def assert_alike(one: Prediction, other: Prediction) -> None:
    assert names(one) == names(other)
    assert numbers(one) == pytest.approx(numbers(other), abs=1e-5, rel=1e-5)


def names(answer: Prediction) -> tuple[Any, ...]:
    """All that is not a number; spans and classes must not only be near."""
    spans = None if answer.spans is None else [s.label for s in answer.spans]
    return answer.label, answer.labels, list(answer.scores or ()), spans, answer.truncated


# ---------------------------------------------------------------------------------------------------
# Any mix


@pytest.mark.parametrize("name", FAMILIES)
def test_all_tasks_at_once_answer_as_each_alone(family: Any, name: str) -> None:
    many = family(name)
    wanted = HookedEncoder if name in HOOKED else Encoder
    if name != "modernbert":  # on either path
        assert type(many.tasks.engine.encoder) is wanted
    many.check(many.requests, many.tasks.predict(many.requests))
    backwards = many.requests[::-1]
    many.check(backwards, many.tasks.predict(backwards))


@pytest.mark.parametrize("name", FAMILIES)
def test_each_request_for_itself(family: Any, name: str) -> None:
    many = family(name)
    for request in many.requests:
        many.check([request], many.tasks.predict([request]))


@pytest.mark.parametrize("name", ["bert", "roberta", "albert"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_mix_in_any_order(family: Any, name: str, data: st.DataObject) -> None:
    many = family(name)
    requests = data.draw(st.lists(st.sampled_from(many.requests), max_size=14))
    many.check(requests, many.tasks.predict(requests))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("max_tokens", [1, 30, 80])
def test_however_the_rows_are_cut_into_batches(
    family: Any, name: str, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = family(name)
    engine, sizes = many.tasks.engine, []
    whole, one_batch = type(engine).logits, type(engine)._answered
    monkeypatch.setattr(
        engine, "logits", lambda examples, tasks: whole(engine, examples, tasks, max_tokens)
    )
    monkeypatch.setattr(
        engine,
        "_answered",
        lambda way, e, t, own: sizes.append(len(own)) or one_batch(engine, way, e, t, own),
    )
    requests = random.Random(max_tokens).sample(many.requests, 40)
    many.check(requests, many.tasks.predict(requests))
    assert max(sizes) == (1 if max_tokens == 1 else max(sizes))
    assert len(sizes) > 5


@pytest.mark.parametrize("name", PACKED)
def test_tensors_agree_with_one_call_of_the_kernels(
    family: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = family(name)
    engine, all_at_once = many.tasks.engine, [0]
    logits = type(engine)._batch
    monkeypatch.setattr(
        engine,
        "_batch",
        lambda way, e, t, own: all_at_once.append(len(own)) or logits(engine, way, e, t, own),
    )
    many.check(many.requests, many.tasks.predict(many.requests))
    some = sum(all_at_once)
    monkeypatch.setattr(Asking, "split", lambda self, examples, tasks, batch: ([], batch))
    many.check(many.requests, many.tasks.predict(many.requests))
    num_rows = sum(all_at_once) - some
    # without kernels, and where they do not know the layers, there is only one way
    is_known = native.kernels() is not None and name != "electra"  # its embeddings are projected
    assert some < num_rows / 2 if is_known else some == num_rows


@pytest.mark.parametrize("name", PACKED)
def test_the_hooked_encoder_agrees_with_the_packed_one(
    family: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = family(name)
    hooked = HookedEncoder(many.tasks.bank.backbone.model)
    monkeypatch.setattr(many.tasks.engine, "encoder", hooked)
    monkeypatch.setattr(many.tasks.engine, "_ways", ways := {})
    many.check(many.requests, many.tasks.predict(many.requests))
    assert len(ways) == 2  # all layers, and fewer
    for way in ways.values():
        assert not any(m._forward_pre_hooks for m in way.encoder.backbone.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tasks_of_this_file_are_told_apart(family: Any, name: str) -> None:
    """Else the tests above would show nothing: tasks, texts and vectors must all make a difference."""
    many = family(name)
    seen = {tuple(round(n, 3) for n in numbers(many.alone["plain", text])) for text in TEXTS}
    assert len(seen) == len(TEXTS)
    for text in TEXTS:
        one, other = (many.alone[task, text] for task in ("plain", "twin"))
        assert max(abs(a - b) for a, b in zip(numbers(one), numbers(other), strict=True)) > 0.005
    tasks = many.tasks
    for name_of in ("plain", "by-token", "shared", "upper", "one-slot"):
        rows = tasks.bank[name_of].vectors
        assert rows is not None
        kept = rows.read().clone()
        # each vector for itself; of the slots that only a text with too many special tokens has none
        requests = [r for r in many.requests if r[0] == name_of]
        used = range(len(kept)) if name_of != "one-slot" else ()
        for i in used:
            rows.read()[i] = 0
            answers = tasks.predict(requests)
            rows.read()[i] = kept[i]
            wrong = [
                not is_alike(answer, many.alone[request])
                for request, answer in zip(requests, answers, strict=True)
            ]
            assert any(wrong), f"vector {i} of {name_of} makes no difference"


def test_no_requests(family: Any) -> None:
    assert family("bert").tasks.predict([]) == []
    assert family("bert").tasks.predict(iter([])) == []


def test_predicting_changes_nothing(family: Any) -> None:
    tasks = family("bert").tasks
    tables = [tasks.bank.vectors.numbers, tasks.bank.heads.numbers]
    before = [table.clone() for table in tables]
    weights = {n: t.clone() for n, t in tasks.bank.backbone.model.state_dict().items()}
    state = torch.get_rng_state()
    tasks.predict(family("bert").requests)
    assert all(torch.equal(table, kept) for table, kept in zip(tables, before, strict=True))
    assert all(
        torch.equal(t, weights[n]) for n, t in tasks.bank.backbone.model.state_dict().items()
    )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["classify", "pair", "multilabel", "regress", "tag"])
def test_trained_tasks(bert: Path, tmp_path: Path, kind: str) -> None:
    fit = {"epochs": 2, "lr": 3e-2, "head_lr": 1e-1}
    recipe = toy_recipe(bert, tmp_path, kind, name=f"acme/{kind}", fit=fit)
    run = pastina.train(recipe, tmp_path / "run")
    tasks = Tasks(str(bert), precision="fp32")
    task = tasks.add(run.folder)
    assert tasks.add(run.adapter).digest == task.digest
    card = read_card(run.adapter)
    assert (task.name, task.kind, task.digest) == (f"acme/{kind}", recipe.kind, card.digest)
    texts = [(t, TEXTS[1]) if kind == "pair" else t for t in TEXTS]
    answers = tasks.predict([(task.name, text) for text in texts])
    alone = pastina.load(run.folder, precision="fp32").predict(texts)
    for one, other in zip(answers, alone, strict=True):
        assert_alike(one, other)


def test_rows_with_words_of_their_own(family: Any) -> None:
    many = family("bert")
    row = Row("pear,saw now", words=((0, 4), (4, 5), (5, 8), (9, 12)), where="here")
    tagger, plain = many.tasks.bank["tagger"], many.tasks.bank["plain"]
    found, other = many.tasks.answer([tagger, plain], [row, Row("saw")])
    (alone,) = pastina.load(many.folders["tagger"], precision="fp32").predict_rows([row])
    assert_alike(found, alone)
    assert_alike(other, many.alone["plain", "saw"])


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_other_precisions_do_not_mix_rows_either(family: Any, precision: Any) -> None:
    many = family("bert")
    tasks = Tasks(many.tasks.bank.backbone.files.name, precision=precision)
    for folder in many.folders.values():
        tasks.add(folder)
    # without kernels the last bits depend on the batch, and a number between two steps goes to either
    near = 1e-5 if native.kernels() is not None else 2e-2
    # in fp32 a tagger may give the other tag to a word near the middle between two
    requests = [r for r in many.requests if tasks.bank[r[0]].kind != "tag"]
    together = tasks.predict(requests)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = tasks.predict([request])
        assert numbers(answer) == pytest.approx(numbers(alone), abs=near)
        assert numbers(answer) == pytest.approx(numbers(many.alone[request]), abs=0.3)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
@pytest.mark.skipif(native.kernels() is None, reason="without kernels there is one way")
def test_both_ways_begin_with_the_same_numbers(
    family: Any, name: str, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels' own way for short texts, and the one through tensors, for a batch with a long one."""
    many = family(name)
    tasks = Tasks(many.tasks.bank.backbone.files.name, precision=precision)
    for folder in many.folders.values():
        tasks.add(folder)
    found = tasks.predict(many.requests)
    monkeypatch.setattr(Asking, "split", lambda self, examples, tasks, batch: ([], batch))
    for one, other in zip(found, tasks.predict(many.requests), strict=True):
        assert numbers(one) == pytest.approx(numbers(other), abs=1e-5)


def test_int8_needs_the_packed_engine(family: Any) -> None:
    with pytest.raises(RecipeError, match="no int8 products"):
        Tasks(family("albert").tasks.bank.backbone.files.name, precision="int8")


def test_no_such_backbone(tmp_path: Path) -> None:
    with pytest.raises(BackboneError):
        Tasks(str(tmp_path))


# ---------------------------------------------------------------------------------------------------
# What cannot be answered


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (("plian", "saw"), "There is no task 'plian' among 32. Did you mean 'plain'?"),
        (("x" * 4000, "saw"), "There is no task 'x{200}' among 32"),
        (("plain", " "), "request 2: the text is empty"),
        (("plain", 7), "request 2: 7 is neither a text nor a pair"),
        (("plain", ("a", "b")), "request 2: the task 'plain' reads single texts, and this is a"),
        (("pair", "a"), "request 2: the task 'pair' reads pairs"),
        (("plain", "a [SEP] b"), r"request 2: 3 special tokens but 2 slots, in .*'a \[SEP\] b'"),
        (("plain", "half \ud800"), "request 2: the text holds half of a character"),
        (("plain",), r"request 2: \('plain',\) is not \(task, text\)"),
        ("plain", r"request 2: 'plain' is not \(task, text\)"),
        ((3, "saw"), r"request 2: \(3, 'saw'\) is not"),
    ],
)
def test_a_request_that_cannot_be_answered(family: Any, request_: Any, words: str) -> None:
    many = family("bert")
    good = ("plain", "saw")
    with pytest.raises(DataError, match=words):
        many.tasks.predict([good, request_, good])
    many.check([good], many.tasks.predict([good]))


def test_slots_are_a_matter_of_each_task(family: Any) -> None:
    many = family("bert")
    text = "say [SEP] [CLS] [SEP] now"
    answers = many.tasks.predict([("shared", text), ("probe", text), ("plain", "saw")])
    for task, answer in zip(("shared", "probe"), answers, strict=False):
        (alone,) = pastina.load(many.folders[task], precision="fp32").predict([text])
        assert_alike(answer, alone)
    with pytest.raises(DataError, match="7 special tokens but 6 slots"):
        many.tasks.predict([("shared", text + " [SEP] [SEP]")])


# ---------------------------------------------------------------------------------------------------
# Tasks come and go


@pytest.fixture
def some(bert: Path, tmp_path: Path) -> Callable[..., Path]:
    """Adapters on the tiny BERT."""

    def make(name: str, **wanted: Any) -> Path:
        return make_adapter(bert, tmp_path / name, name="x", **wanted)

    return make


def test_names(bert: Path, some: Callable[..., Path]) -> None:
    tasks = Tasks(str(bert))
    folder = some("one")
    tasks.add(str(folder))
    other = tasks.add(folder, "acme/other")
    assert (len(tasks), [task.name for task in tasks]) == (2, ["x", "acme/other"])
    assert "x" in tasks
    assert "acme" not in tasks
    assert tasks.bank["acme/other"] is other
    tasks.remove("x")
    assert [task.name for task in tasks] == ["acme/other"]
    with pytest.raises(DataError, match="There is no task 'x' among 1"):
        tasks.remove("x")
    with pytest.raises(DataError, match=r"no task 'acme/othr' .* mean 'acme/other'"):
        tasks.predict([("acme/othr", "saw")])


def test_a_task_that_is_replaced_answers_anew_and_others_as_before(
    bert: Path, some: Callable[..., Path]
) -> None:
    tasks = Tasks(str(bert), precision="fp32")
    tasks.add(some("first", seed=1))
    tasks.add(some("stays", seed=2), "stays")
    (first, stays) = tasks.predict([("x", LONG), ("stays", LONG)])
    tasks.add(some("second", seed=3, labels=("a", "b", "c"), pooling="mean"))
    (second, same) = tasks.predict([("x", LONG), ("stays", LONG)])
    assert_alike(same, stays)
    assert first.scores is not None
    assert second.scores is not None
    assert (set(first.scores), set(second.scores)) == ({"fruit", "tool"}, {"a", "b", "c"})
    (tmp,) = pastina.load(some("again", seed=1), precision="fp32").predict([LONG])
    assert_alike(first, tmp)


def test_a_bad_adapter_leaves_the_task_as_it_was(
    bert: Path, backbones: Callable[[str], Path], some: Callable[..., Path], tmp_path: Path
) -> None:
    tasks = Tasks(str(bert), precision="fp32")
    tasks.add(some("good"))
    before = tasks.predict([("x", LONG)])
    other = make_adapter(backbones("bert-no-pooler"), tmp_path / "other", name="x")
    with pytest.raises(AdapterError, match="was trained on"):
        tasks.add(other)
    assert tasks.predict([("x", LONG)]) == before
    assert len(tasks) == 1


class Middle:
    """Does something in the middle of a batch: where its tokens are known, nothing is computed."""

    def __init__(self, encoder: Any, act: Callable[[], None]) -> None:
        self.encoder, self.act = encoder, act

    def pack(self, is_real_BT: torch.Tensor) -> Any:
        return self.encoder.pack(is_real_BT)

    def states(self, *args: Any) -> Any:
        self.act()
        states = self.encoder.states(*args)
        self.act()
        return states


class MiddleOfKernels:
    """The same, before and after the kernels work on the batch."""

    def __init__(self, loaded: Any, act: Callable[[], None]) -> None:
        self.loaded, self.act = loaded, act

    def pastina_ask(self, *args: Any) -> int:
        self.act()
        found = self.loaded.pastina_ask(*args)
        self.act()
        return found


@pytest.mark.parametrize("way", ["tensors", "kernels"])
@pytest.mark.parametrize("act", ["replace", "remove", "grow"])
def test_a_running_batch_keeps_its_tasks(
    bert: Path, some: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, act: str, way: str
) -> None:
    """What happens at the worst moments does not touch it: rows that it reads are not used again."""
    if act == "grow":
        no_addresses(monkeypatch)
    tasks = Tasks(str(bert), precision="fp32")
    tasks.add(some("first", seed=1), "x")
    tasks.add(some("tagger", kind="tag"), "tagger")
    if way == "tensors":
        monkeypatch.setattr(Asking, "split", lambda self, examples, tasks, batch: ([], batch))
    requests = [("x", LONG), ("tagger", LONG), ("x", "saw")]
    before = tasks.predict(requests)
    other = tasks.bank.read(some("second", seed=2))

    def replace() -> None:
        for name in ("x", "tagger", "new"):
            tasks.bank.put(other, name)

    def remove() -> None:
        for name in [task.name for task in tasks]:
            tasks.remove(name)
        tasks.bank.put(other, "new")

    def grow() -> None:
        for i in range(600):
            tasks.bank.put(other, f"{i} {len(tasks)}")

    acts = {"replace": replace, "remove": remove, "grow": grow}
    with monkeypatch.context() as patch:
        if way == "tensors":
            slow: Any = type(tasks.engine)._batch
            patch.setattr(
                tasks.engine,
                "_batch",
                lambda encoder, *rest: slow(tasks.engine, Middle(encoder, acts[act]), *rest),
            )
        else:
            library = native.kernels()
            if library is None:
                pytest.skip(f"the kernels cannot run here: {native.why_not()}")
            patch.setattr(native, "kernels", lambda: MiddleOfKernels(library, acts[act]))
        for _ in range(3):
            tasks.bank.put(tasks.bank.read(some("first", seed=1)), "x")
            tasks.bank.put(tasks.bank.read(some("tagger", kind="tag")), "tagger")
            assert tasks.predict(requests) == before
    if act == "grow":
        assert len(tasks.bank.vectors.numbers) > 2048
        assert tasks.predict(requests) == before


@pytest.fixture
def hectic() -> Iterator[None]:
    """Threads take turns a hundred times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.parametrize("name", ["bert", "albert"])
@pytest.mark.usefixtures("hectic")
def test_threads_that_replace_and_threads_that_ask(
    family: Callable[[str], Many], name: str
) -> None:
    """Each answer is wholly of one version; nobody waits for ever, nobody fails."""
    many = family(name)
    folder = many.tasks.bank.backbone.files.name
    tasks = Tasks(folder, precision="fp32")
    versions = [tasks.bank.read(many.folders[task]) for task in ("plain", "by-token", "shared")]
    for task in ("upper", "tagger"):
        tasks.add(many.folders[task])
    tasks.bank.put(versions[0], "changing")
    truth = {
        text: [many.alone[task, text] for task in ("plain", "by-token", "shared")] for text in TEXTS
    }
    seen: set[int] = set()
    wrong: list[Any] = []
    stop = threading.Event()

    def guarded(work: Iterator[None]) -> Callable[[], None]:
        def run() -> None:
            try:
                for _ in work:
                    if stop.is_set():
                        return
            except BaseException as error:
                wrong.append(error)
                stop.set()

        return run

    def replace(seed: int) -> Iterator[None]:
        draw = random.Random(seed)
        while True:
            tasks.bank.put(draw.choice(versions), "changing")
            other = f"other {seed} {draw.randrange(50)}"
            if other in tasks and draw.random() < 0.5:
                tasks.remove(other)
            else:
                tasks.bank.put(draw.choice(versions), other)
            list(tasks)
            yield

    def ask(seed: int) -> Iterator[None]:
        draw = random.Random(seed)
        for _ in range(60):
            text = draw.choice(TEXTS)
            first, number, tags = tasks.predict(
                [("changing", text), ("upper", text), ("tagger", text)]
            )
            found = [is_alike(first, version) for version in truth[text]]
            assert sum(found) == 1, f"of no version: {first}"
            seen.add(found.index(True))
            assert_alike(number, many.alone["upper", text])
            assert_alike(tags, many.alone["tagger", text])
            with pytest.raises(DataError, match="no task"):
                tasks.predict([("nobody", text)])
            yield

    askers = [threading.Thread(target=guarded(ask(seed))) for seed in range(2)]
    writers = [threading.Thread(target=guarded(replace(seed))) for seed in range(2)]
    for thread in (*askers, *writers):
        thread.start()
    for thread in askers:
        thread.join(240)
    stop.set()
    for thread in writers:
        thread.join(60)
    assert not wrong, wrong
    assert not any(thread.is_alive() for thread in (*askers, *writers))
    assert seen == {0, 1, 2}
