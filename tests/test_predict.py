from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pastina
from pastina.answering import checked_row
from pastina.data.rows import Row
from pastina.engine import native
from pastina.engine.affine import Precision
from pastina.errors import DataError, RecipeError
from pastina.predict import Predictor, adapter_folder
from pastina.recipe import make_recipe
from pastina.training.evaluate import evaluate_rows
from tests.backbone_folder import toy_recipe, toy_rows, write_rows

Tasks = Callable[..., Predictor]
TEXTS = ["please send me a pear now", "saw", "we need plum and nail today, thanks", "the the the"]


@pytest.fixture(scope="module")
def tasks(
    backbones: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Predictor]:
    """A task of a kind, trained once for all tests of this file."""
    root = tmp_path_factory.mktemp("tasks")
    known: dict[tuple[str, str], Predictor] = {}

    def task(kind: str = "classify", backbone: str = "bert") -> Predictor:
        if (kind, backbone) not in known:
            folder = root / f"{kind}-{backbone}"
            folder.mkdir()
            sections: dict[str, Any] = {"data": {"max_length": 16, "stride": 4}}
            fit = {"epochs": 12, "lr": 3e-2, "head_lr": 1e-1, "batch": 8}
            recipe = toy_recipe(backbones(backbone), folder, kind, rows=96, fit=fit, **sections)
            known[kind, backbone] = pastina.load(pastina.train(recipe, folder / "run").folder)
        return known[kind, backbone]

    return task


def test_on_the_default_backbone_a_bank_answers_as_the_adapter_alone(tmp_path: Path) -> None:
    """In every precision; and dev scores what it scored in training."""
    data = {"train": str(write_rows(tmp_path / "train.jsonl", toy_rows("classify", 48)))}
    values = {"kind": "classify", "data": data, "fit": {"epochs": 1, "lr": 3e-2}}
    run = pastina.train(make_recipe(values), tmp_path / "run")
    texts = [*TEXTS, " ".join(TEXTS * 20)]
    precisions: tuple[Precision, ...] = ("fp32", "bf16", "int8")
    for precision in precisions if native.kernels() is not None else precisions[:1]:
        predictor = pastina.load(run.adapter, precision=precision)
        tasks = pastina.Tasks(precision=precision)
        tasks.add(run.adapter, "own")
        mixed = tasks.predict([("own", text) for text in texts])
        for one, other in zip(predictor.predict(texts), mixed, strict=True):
            assert numbers(one) == pytest.approx(numbers(other), abs=1e-5)
    assert pastina.evaluate(run.adapter, part="dev")["accuracy"] == run.metrics["accuracy"]


def numbers(answer: Any) -> list[float]:
    """Every number of an answer."""
    if answer.spans is not None:
        return [n for s in answer.spans for n in (s.start, s.end, s.score)]
    return [answer.value] if answer.value is not None else list(answer.scores.values())


KINDS = ["classify", "multilabel", "regress", "tag"]
BACKBONES = ["bert", "roberta", "distilbert", "modernbert"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_does_not_depend_on_the_others(tasks: Tasks, kind: str) -> None:
    predictor = tasks(kind)
    together = predictor.predict(TEXTS)
    for text, answer in zip(TEXTS, together, strict=True):
        (alone,) = predictor.predict([text])
        assert numbers(alone) == pytest.approx(numbers(answer), abs=1e-5)
        assert (alone.label, alone.labels) == (answer.label, answer.labels)
    backwards = predictor.predict(TEXTS[::-1])[::-1]
    for one, other in zip(together, backwards, strict=True):
        assert numbers(one) == pytest.approx(numbers(other), abs=1e-5)
    if kind != "tag":
        assert len({tuple(numbers(answer)) for answer in together}) == len(TEXTS)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_on_every_family(tasks: Tasks, backbone: str) -> None:
    predictor = tasks("classify", backbone)
    together = predictor.predict(TEXTS)
    alone = [predictor.predict([text])[0] for text in TEXTS]
    for one, other in zip(together, alone, strict=True):
        assert numbers(one) == pytest.approx(numbers(other), abs=1e-5)
        assert one.scores is not None
        assert one.scores.keys() == {"fruit", "tool"}
        assert sum(one.scores.values()) == pytest.approx(1)
        assert one.score == max(one.scores.values())


@pytest.mark.parametrize("backbone", ["bert", "roberta"])
def test_spans_are_characters_of_the_text(tasks: Tasks, backbone: str) -> None:
    predictor = tasks("tag", backbone)
    rows = toy_rows("tag", 20, seed=9)
    right = total = 0
    for row, answer in zip(rows, predictor.predict([r["text"] for r in rows]), strict=True):
        assert answer.spans is not None
        for span in answer.spans:
            assert row["text"][span.start : span.end].strip() == row["text"][span.start : span.end]
            assert span.score is not None
            assert 0 < span.score <= 1
        found = {(s.start, s.end, s.label) for s in answer.spans}
        wanted = {(s["start"], s["end"], s["label"]) for s in row["spans"]}
        right, total = right + len(found & wanted), total + len(found | wanted)
    assert right / total > 0.6


def test_a_long_text_is_tagged_through_windows(tasks: Tasks) -> None:
    predictor = tasks("tag")
    fruit = "please send me a pear now thanks "
    text = fruit * 12
    assert len(predictor.encode([checked_row(Row(text), predictor.card)])) > 5
    (answer,) = predictor.predict([text])
    assert answer.spans
    assert not answer.truncated
    starts = {span.start // len(fruit) for span in answer.spans}
    assert starts >= set(range(10)), "spans are found along the whole text"
    assert {text[s.start : s.end] for s in answer.spans} >= {"pear"}


@pytest.mark.parametrize("text", ["\u200b", "\u200b \u200d"])
def test_a_text_of_which_no_token_is_made(tasks: Tasks, text: str) -> None:
    assert tasks("tag").predict([text])[0].spans == ()
    assert tasks().predict([text])[0].label in ("fruit", "tool")


def test_an_end_that_was_not_read_is_told(tasks: Tasks) -> None:
    short, long = tasks().predict(["pear", "pear " * 30])
    assert (short.truncated, long.truncated) == (False, True)
    assert long.as_dict()["truncated"] is True
    assert "truncated" not in short.as_dict()


def test_numbers_are_in_the_units_of_the_data(tasks: Tasks) -> None:
    none, many = tasks("regress").predict(["please send", "please send very very very very"])
    assert none.value is not None
    assert many.value is not None
    assert 5 < none.value < many.value < 27
    assert many.value - none.value > 5


def test_no_texts(tasks: Tasks) -> None:
    assert tasks().predict([]) == []
    assert tasks("tag").predict([]) == []


def test_pairs(tasks: Tasks) -> None:
    predictor = tasks("pair")
    one, other = predictor.predict([("please send", "pear"), ("please send", "hammer")])
    assert one.scores != other.scores
    listed: Any = ["please send", "pear"]
    assert predictor.predict([listed]) == predictor.predict([("please send", "pear")])
    with pytest.raises(DataError, match="text 2: the task 'run' reads pairs of texts"):
        predictor.predict([("a", "b"), "a"])
    with pytest.raises(DataError, match="text 1: the text is empty"):
        predictor.predict([("a", " ")])


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ("pear", r"Write predict\(\[text\]\)"),
        (["pear", "  \n"], "text 2: the text is empty"),
        ([""], "text 1: the text is empty"),
        ([("a", "b")], "text 1: the task 'run' reads single texts, and this is a pair"),
        ([3], "text 1: 3 is neither a text nor a pair"),
        ([("a", "b", "c")], "text 1: .* is neither a text nor a pair"),
        ([None], "text 1: None is neither"),
        (["fine", "say [SEP] now"], r"text 2: 3 special tokens .*'say \[SEP\] now'"),
    ],
)
def test_what_cannot_be_answered(tasks: Tasks, texts: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        tasks().predict(texts)


def test_a_special_token_as_a_word_to_tag(tasks: Tasks) -> None:
    row = Row("say [CLS] now", words=((0, 3), (4, 9), (10, 13)))
    with pytest.raises(DataError, match=r"3 special tokens .*'say \[CLS\] now'"):
        tasks("tag").predict_rows([row])


def test_the_folder_of_a_run_or_of_its_adapter(tasks: Tasks, tmp_path: Path) -> None:
    assert adapter_folder(tmp_path) == tmp_path
    (tmp_path / "adapter").mkdir()
    assert adapter_folder(tmp_path) == tmp_path / "adapter"
    (tmp_path / "task.json").touch()
    assert adapter_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("wrong", ["fp8", None, 16])
def test_a_precision_that_there_is_not(tmp_path: Path, wrong: Any) -> None:
    words = f"no precision {wrong!r}. Take one of auto, fp32, bf16, int8"
    for ask in (pastina.load, pastina.evaluate, pastina.Tasks):
        with pytest.raises(RecipeError, match=words):
            ask(str(tmp_path / "read later"), precision=wrong)


# ---------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("kind", ["classify", "pair", "multilabel", "regress", "tag"])
def test_evaluation_repeats_what_training_measured(tasks: Tasks, kind: str) -> None:
    card = tasks(kind).card
    folder = Path(card.recipe["data"]["dev"]).parent / "run"
    metrics = pastina.evaluate(folder, part="dev")
    assert metrics == pytest.approx(card.metrics["dev"], abs=1e-6)
    assert pastina.evaluate(folder / "adapter", card.recipe["data"]["dev"]) == metrics


def test_the_error_is_in_the_units_of_the_data(tasks: Tasks) -> None:
    predictor = tasks("regress")
    texts, truth = ["please send very", "please send"], [100.0, 7.0]
    rows = [Row(text, label=label) for text, label in zip(texts, truth, strict=True)]
    values = [answer.value for answer in predictor.predict(texts)]
    squares = [(v - t) ** 2 for v, t in zip(values, truth, strict=True) if v is not None]
    expected = (sum(squares) / 2) ** 0.5
    assert evaluate_rows(predictor, rows)["rmse"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "label": "fish"}, r"line 1: the label 'fish' is not one of .*fruit, tool"),
        ({"text": "a", "text_pair": "b", "label": "tool"}, "line 1: the task 'run' reads single"),
        ({"text": "", "label": "tool"}, "line 1"),
    ],
)
def test_rows_that_cannot_be_scored(
    tasks: Tasks, tmp_path: Path, row: dict[str, str], words: str
) -> None:
    predictor = tasks()
    path = write_rows(tmp_path / "rows.jsonl", [row])
    folder = Path(predictor.card.recipe["data"]["dev"]).parent / "run"
    with pytest.raises(DataError, match=words):
        pastina.evaluate(folder, path)
    with pytest.raises(DataError, match="no part 'train' to evaluate on"):
        pastina.evaluate(folder, part="train")


def test_predicting_changes_nothing(tasks: Tasks) -> None:
    predictor: Any = tasks()
    model = predictor.engine.reference.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    predictor.predict(TEXTS)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
